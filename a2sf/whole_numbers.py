"""Numbers that a policy's own code gives, checked where they enter."""

from __future__ import annotations

import operator
from typing import Any


def whole_number(name: str, value: Any) -> int:
    """`value` as an int, where it is a whole number of any type (of numpy, or a tensor of one element).

    Raises:
        ValueError: if it is of another type, a float with a whole value included.
    """
    if type(value) is int:
        return value
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} must be a whole number, got {value}; round it, with int() or //") from error


def set_whole_numbers(of: object, *names: str) -> None:
    """Make these fields of a frozen dataclass ints.

    Raises:
        ValueError: as `whole_number`.
    """
    for name in names:
        value = getattr(of, name)
        if type(value) is not int:
            object.__setattr__(of, name, whole_number(name, value))
