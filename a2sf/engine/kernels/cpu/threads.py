"""Threads for the CPU kernel: torch's own where possible.

After an operation torch's worker threads spin for a while and wait for the next one. A second set of threads
would compete with them for the same cores, so compiled code is run by the OpenMP library that torch has loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def in_threads(body: Callable[[int], None], threads: int) -> None:
    """Call `body(0)`, ..., `body(threads - 1)` at the same time; worth it where `body` releases the GIL."""
    if threads <= 1:
        body(0)
        return
    team = _team()
    if team is None:
        others = [_pool(threads - 1).submit(body, i) for i in range(1, threads)]
        body(0)
        for other in others:
            other.result()
        return

    # a team may be smaller than requested, so its threads draw numbers until none is left
    numbers, errors = iter(range(threads)), []

    def worker(_: Any) -> None:
        try:
            for i in numbers:
                body(i)
        except BaseException as error:  # it cannot pass through foreign code
            errors.append(error)

    team(_BODY(worker), None, threads, 0)
    if errors:
        raise errors[0]


@cache
def _team() -> Any:
    """`GOMP_parallel(function, data, threads, flags)` of torch's OpenMP library; None if it is another library."""
    try:
        run = ctypes.CDLL("libgomp.so.1").GOMP_parallel
    except (OSError, AttributeError):
        return None
    run.argtypes, run.restype = (_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return run


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "a2sf")
