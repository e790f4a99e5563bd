"""Numbers of tasks and metrics: of Python or NumPy, or an array or tensor with one element."""

from __future__ import annotations

import numbers
from decimal import Decimal
from typing import Any


def number_of(value: Any) -> float | None:
    """A real number of any type as a float, including NaN and infinity; None for anything else, such as text."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # NumPy or torch, on any device
        value = value.item()
    return float(value) if isinstance(value, numbers.Real | Decimal) else None


def is_number(value: Any) -> bool:
    """Whether a value of a configuration is an int or a float; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def index_of(value: Any) -> int | None:
    """An integer of any type as an int; None for anything else."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return int(value) if isinstance(value, numbers.Integral) else None
