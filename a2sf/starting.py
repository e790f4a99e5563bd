"""Settings of a command's process before it imports large libraries. `import a2sf` sets nothing."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLES = {
    "HYDRA_FULL_ERROR": "1",  # Hydra raises its errors, which `app.process` explains
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""How long a waiting thread of OpenMP uses its core: some tens of microseconds (GNU), 1 ms (LLVM, Intel).

The defaults are some milliseconds and 200 ms. If other processes use the cores, each step of a model waits for a thread that
has no core, and with the defaults the other threads use several times the work's processor time for waiting.
"""
CHOICES = ("OMP_WAIT_POLICY", *WAITING)
"""Variables by which a user chooses how threads wait."""


def set_environment() -> None:
    """Set the variables that libraries read while they are imported; variables that are set already are not changed."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    if not any(name in os.environ for name in CHOICES):
        os.environ.update(WAITING)


@contextmanager
def importing() -> Iterator[None]:
    """Turn off Python's garbage collector in the block, because it would search the objects of large imports many times."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # modules are needed until the process ends: later searches skip them, too
        atexit.register(gc.unfreeze)
        if enabled:
            gc.enable()
