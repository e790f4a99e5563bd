"""Memory of the CPU kernel: states of slots, scratch memory for a block of tokens, and tensors of a call as flat arrays."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from a2sf.engine.kernels.cpu.simd import LANES, TILE_ROWS
from a2sf.engine.kernels.cpu.state import FlatStates, Given, KernelCall, Scratch, Shape, whole
from a2sf.engine.priorities import token_numbers
from a2sf.engine.state import EvictionState
from a2sf.policies.rule import ACCUMULATED, Rule

LINE = 8
"""int64 numbers per cache line: two threads that write to one line wait for each other, token by token."""


def allocate(states: int, shape: Shape) -> FlatStates:
    """Memory for `states` states, empty."""
    n = states * shape.slots
    terms, weights, biases = (_memory(n if used else 0) for used in (shape.mean_over_age, shape.weighted, shape.biased))
    counters = _memory(states * LINE, torch.int64).reshape(states, LINE)
    counters[:] = 0
    return FlatStates(
        keys=_memory(n * shape.D),
        values=_memory(states * shape.room * whole(shape.V)),
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
        output=_memory(parts * rows * whole(shape.V)),
        inverse=_memory(parts * whole(rows)),
        fresh=_memory(parts * whole(shape.block), torch.int64),
        keys=_memory(parts * LANES, torch.int64),
        ranks=_memory(threads * row, torch.int32),
        sums=_memory(threads * row),
    )


def _memory(n: int, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """`n` numbers, not set, from the start of a cache line: vectors that lie across two lines cost twice."""
    return torch.empty(n, dtype=dtype).numpy()


def rule_flags(rule: Rule) -> dict[str, int]:
    """The parts of a rule, as fields of `Shape`."""
    return {
        "count_above_uniform": int(rule.count_above_uniform),
        "mean_over_age": int(rule.mean_over_age),
        "weighted": int(rule.weight is not None),
        "biased": int(rule.bias is not None),
        "shared": int(rule.shared),
    }


def _fixed(rule: Rule, key: Tensor, value: Tensor, positions: Tensor) -> list[Tensor]:
    """`m` and `b` of tokens, float32; empty where the rule has none."""
    key, value = key.detach().float(), value.detach().float()
    made = token_numbers(rule, key, value, positions)
    return [(_NO_NUMBERS if x is None else x).float().contiguous() for x in made]


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    evicted: Tensor,
    scale: float,
    rule: Rule = ACCUMULATED,
    positions: Tensor | None = None,
) -> KernelCall:
    """`output` is float32 [B, T, H, V], `evicted` int32 [B, K, T, most] or empty, both contiguous; `positions` [B, 1, T]."""
    (q, q_strides), (k, k_strides), (v, v_strides) = (_flat(x) for x in (query, key, value))
    strides = np.array((q_strides, k_strides, v_strides), np.int64)
    scale_2 = np.float32(scale * math.log2(math.e))
    fixed = (_NO_NUMBERS,) * 2 if positions is None else _fixed(rule, key, value, positions.expand(*key.shape[:3]))
    weight, bias = (x.reshape(-1).numpy() for x in fixed)
    return KernelCall(
        q, k, v, strides, output.view(-1).numpy(), evicted.view(-1).numpy(), weight, bias, query.shape[2], scale_2
    )


def _flat(x: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """The memory that `x` lies in as one dimension, float32, and its strides but the last, which is 1."""
    x = x.detach().float()
    if x.stride(-1) != 1:
        x = x.contiguous()
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.as_strided((span,), (1,)).numpy(), x.stride()[:3]


def empty_slots(rows: int, K: int, slots: int, D: int, V: int) -> EvictionState:
    """A state to be filled by the kernel."""
    return EvictionState(
        positions=torch.full((rows, K, slots), -1),
        scores=torch.zeros(rows, K, slots),
        keys=torch.zeros(rows, K, slots, D),
        values=torch.zeros(rows, K, slots, V),
        seen=torch.empty(rows, dtype=torch.int64),
    )


def as_arrays(state: EvictionState, rule: Rule = ACCUMULATED) -> Given:
    """A state as the kernel reads or fills it, with what the rule fixes of its tokens."""
    scores, keys, values = (x.detach().float().contiguous().numpy() for x in (state.scores, state.keys, state.values))
    weights, biases = (
        x.reshape(state.positions.shape if x.numel() else (0, 0, 0)).numpy()
        for x in _fixed(rule, state.keys, state.values, state.positions)
    )
    positions, seen = (x.contiguous().numpy() for x in (state.positions, state.seen))
    return Given(positions, scores, keys, values, seen, weights, biases)


_NO_NUMBERS = torch.empty(0)
NO_STATE = as_arrays(empty_slots(0, 1, 0, 1, 1))
NO_TRACE = torch.empty(0, dtype=torch.int32)
_NO_TOKENS = torch.empty(0, 1, 1, 1)
NO_CALL = make_call(_NO_TOKENS, _NO_TOKENS, _NO_TOKENS, _NO_TOKENS, NO_TRACE, 1.0)
