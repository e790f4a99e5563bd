"""Names of the previous version. They work in this version, with one notice each that gives the new name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from a2sf.errors import Notice

T = TypeVar("T")
METHODS = {"foresee": "precompute", "of_layer": "layer_budget", "least_budget": "min_budget"}
"""What a policy may override: old name -> new name."""


@functools.cache  # one notice for a name, however often it is used
def notice(old: str, new: str) -> None:
    """Warn that `old` is now called `new`."""
    warnings.warn(f"{old} is now called {new}; the old name works in this version only.", Notice, stacklevel=3)


def renamed_fields(**names: str) -> Callable[[type[T]], type[T]]:
    """Class decorator for a dataclass whose fields had other names: they can still be given and read.

    Args:
        names: old name -> new name.
    """

    def decorate(cls: type[T]) -> type[T]:
        init = cls.__init__

        @functools.wraps(init)
        def __init__(self: T, *args: Any, **given: Any) -> None:
            for old, new in names.items():
                if old in given:
                    notice(f"{cls.__name__}({old}=…)", new)
                    given[new] = given.pop(old)  # replace() gives both, and the old name is the change
            init(self, *args, **given)

        cls.__init__ = __init__  # type: ignore[method-assign, assignment]
        for old, new in names.items():
            setattr(cls, old, property(functools.partial(_read, f"{cls.__name__}.{old}", new)))
        return cls

    return decorate


def _read(old: str, new: str, instance: Any) -> Any:
    notice(old, new)
    return getattr(instance, new)


def rename_methods(cls: type) -> None:
    """Let a policy class that overrides a method by its old name override the new one, and the other way round."""
    for old, new in METHODS.items():
        defined = vars(cls)
        if old in defined and new not in defined:
            notice(f"{cls.__name__}.{old}", new)
            setattr(cls, new, defined[old])
        elif new in defined:
            setattr(cls, old, defined[new])  # for super() calls in a subclass by the old name
