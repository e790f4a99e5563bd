"""Memory of the CPU kernel: states of slots, and scratch memory for a block of tokens."""

from __future__ import annotations

import numpy as np
import torch

from a2sf.engine.kernels.cpu_simd import LANES, TILE_ROWS
from a2sf.engine.kernels.cpu_state import Scratch, Shape, Store

LINE = 8
"""int64 numbers per cache line: two threads that write to one line wait for each other, token by token."""


def allocate(states: int, shape: Shape) -> Store:
    """Memory for `states` states, empty."""
    n = states * shape.slots
    terms, weights, biases = (_memory(n if used else 0) for used in (shape.by_age, shape.weighted, shape.biased))
    counters = _memory(states * LINE, torch.int64).reshape(states, LINE)
    counters[:] = 0
    return Store(
        keys=_memory(n * shape.D),
        values=_memory(states * shape.room * _whole(shape.V)),
        scores=_memory(n),
        terms=terms,
        weights=weights,
        biases=biases,
        positions=_memory(n, torch.int32),
        counters=counters,
    )


def make_scratch(threads: int, shape: Shape) -> Scratch:
    """Memory for blocks of `shape.block` tokens."""
    parts = threads * (shape.heads if shape.shared else 1)
    rows, row = -(-shape.block * shape.group // TILE_ROWS) * TILE_ROWS, shape.slots + LANES
    return Scratch(
        query=_memory(parts * rows * shape.D),
        weights=_memory(parts * rows * row),
        output=_memory(parts * rows * _whole(shape.V)),
        inverse=_memory(parts * _whole(rows)),
        fresh=_memory(parts * _whole(shape.block), torch.int64),
        keys=_memory(parts * LANES, torch.int64),
        ranks=_memory(threads * row, torch.int32),
        sums=_memory(threads * row),
    )


def _memory(n: int, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """`n` numbers, not set, from the start of a cache line: vectors that lie across two lines cost twice."""
    return torch.empty(n, dtype=dtype).numpy()


def _whole(n: int) -> int:
    """`n` rounded up to whole vectors."""
    return -(-n // LANES) * LANES
