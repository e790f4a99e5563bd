"""The two tiers: `make test` leaves out what is marked `full`, and tries fewer random examples."""

from __future__ import annotations

import os

VARIABLE = "A2SF_TESTS"
"""`quick` where tests marked `full` are left out; set by the conftest."""


def examples(n: int) -> int:
    """How many random examples a test takes: `n`, or a third of them in `make test`."""
    return -(-n // 3) if os.environ.get(VARIABLE) == "quick" else n
