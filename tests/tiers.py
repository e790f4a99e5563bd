"""The three tiers: `make test` leaves out what is marked `full`, and `make test-all` what is marked `exhaustive`."""

from __future__ import annotations

import os

VARIABLE = "A2SF_TESTS"
"""`quick`, `full` or `exhaustive`, by what is left out; set by the conftest."""


def of(expression: str) -> str:
    """The tier that pytest's `-m` asks for."""
    return "quick" if "not full" in expression else "full" if "not exhaustive" in expression else "exhaustive"


def is_left_out(mark: str) -> bool:
    """Whether tests with this mark are left out, so that they need not be made: twenty thousand take seconds."""
    return mark in {"quick": ("full", "exhaustive"), "full": ("exhaustive",)}.get(os.environ.get(VARIABLE, ""), ())


def examples(n: int) -> int:
    """How many random examples a test takes: `n`, or a third of them in `make test`."""
    return -(-n // 3) if os.environ.get(VARIABLE) == "quick" else n
