"""Numbers as tasks and metrics give them: Python's, numpy's, or an array or tensor that holds one."""

from __future__ import annotations

import numbers
from decimal import Decimal
from typing import Any


def number_of(value: Any) -> float | None:
    """A real number of any kind as a float, NaN and infinity included; None for anything else, text above all."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # of numpy or torch, on any device
        value = value.item()
    return float(value) if isinstance(value, numbers.Real | Decimal) else None


def index_of(value: Any) -> int | None:
    """A whole number of any kind as an int; None for anything else."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return int(value) if isinstance(value, numbers.Integral) else None
