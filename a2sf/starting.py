"""What a process of the command sets before it imports large libraries. `import a2sf` sets nothing of this."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLES = {
    "HYDRA_FULL_ERROR": "1",  # so that Hydra raises what we explain
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""How long a thread of OpenMP goes on using its core while it waits: some tens of microseconds (GNU), 1 ms (LLVM, Intel).

The defaults are some milliseconds and 200 ms. Where other processes use the cores, each step of a model waits for a thread
that has no core at the moment, and the defaults spend several times the work's own processor time on waiting.
"""
OWN_CHOICE = ("OMP_WAIT_POLICY", *WAITING)
"""Whoever sets one of these has chosen how threads wait."""


def set_environment() -> None:
    """Set the variables that libraries read while they are imported; what is set already stays."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    if not any(name in os.environ for name in OWN_CHOICE):
        os.environ.update(WAITING)


@contextmanager
def importing() -> Iterator[None]:
    """Import large libraries inside: Python's garbage collector, which would search their objects many times, rests."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # modules stay until the process ends: later searches need not look at them either
        atexit.register(gc.unfreeze)
        if enabled:
            gc.enable()
