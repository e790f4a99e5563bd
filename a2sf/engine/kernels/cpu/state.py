"""What the CPU kernel works on: its sizes, states of slots, scratch memory and inputs; and taking and freeing slots."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from a2sf.compat.numba import inner, leaf
from a2sf.engine.kernels.cpu.simd import LANES, at_least, bits, load, lowest_bit, spread, spread_int, store

F32, I32, LARGEST_INT = np.float32, np.int32, np.int32(2**31 - 1)


class Shape(NamedTuple):
    """Sizes that all functions share, and the parts of the rule (0 or 1 but for `spare`)."""

    heads: int  # KV heads
    group: int  # query heads per KV head
    D: int  # key size
    V: int  # value size
    slots: int  # per state, a multiple of 16
    room: int  # of them can be filled
    block: int  # tokens of the largest block
    spare: int = 0  # tokens that may be cached beyond the budget before some are evicted
    most: int = 1  # evictions of a step, at most: what a trace has room for
    count_above_uniform: int = 0  # a query adds 1 where its attention is at least 1 / n, instead of the attention
    mean_over_age: int = 0  # priorities are divided by the number of terms, `FlatStates.terms`
    weighted: int = 0  # and multiplied by `FlatStates.weights`
    biased: int = 0  # and added to `FlatStates.biases`
    shared: int = 0  # all heads of a layer retain the same tokens


class FlatStates(NamedTuple):
    """States, flat. An empty slot has position -1."""

    keys: Any  # float32 [states, slots / 16, D, 16]
    values: Any  # float32 [states, room, V rounded up to 16]
    scores: Any  # float32 [states, slots]
    terms: Any  # float32 [states, slots], `N` of docs/semantics.md; this and the next two are empty where they are not used
    weights: Any  # float32 [states, slots], `m`
    biases: Any  # float32 [states, slots], `b`
    positions: Any  # int32 [states, slots]
    counters: Any  # int64 [states, 8], the columns named below; a cache line each, which no two threads write to


COUNT, USED, SEEN, TAINTED = range(4)
"""Columns of `FlatStates.counters`: cached tokens, panels touched since the state was empty, tokens read, and 1 once a key
or value was not finite."""


class Scratch(NamedTuple):
    """One block's intermediates per thread (and head, where heads run side by side), flat; rows are (token, query head)."""

    query: Any  # float32 [threads, rows, D]
    weights: Any  # float32 [threads, rows, slots + 16]
    output: Any  # float32 [threads, rows, V rounded up to 16]
    inverse: Any  # float32 [threads, rows rounded up to 16], 1 / softmax denominator
    fresh: Any  # int64 [threads, block rounded up to 16], the slots of the block's tokens
    keys: Any  # int64 [threads, 16], where the keys of a panel's slots come from
    ranks: Any  # int32 [threads, slots + 16], priorities as integers in their order
    sums: Any  # float32 [threads, slots + 16], priorities summed over heads


class KernelCall(NamedTuple):
    """Flat inputs and outputs of one call; strides are (row, head, token), the last dimension is contiguous."""

    query: Any
    key: Any
    value: Any
    strides: Any  # int64 [3, 3], of query, key, value
    output: Any  # float32 [B, T, H, V], flat
    evicted: Any  # int32 [B, K, T, most], flat, or empty
    weight: Any  # float32 [B, K, T], flat, or empty; of the tokens, as is the bias
    bias: Any
    tokens: int  # T
    scale: Any  # float32, times log2(e)


class Given(NamedTuple):
    """States in the canonical form: given to start from, or to be filled; all empty arrays if there are none."""

    positions: Any  # int64 [S, K, N]
    scores: Any  # float32 [S, K, N]
    keys: Any  # float32 [S, K, N, D]
    values: Any  # float32 [S, K, N, V]
    seen: Any  # int64 [S]
    weights: Any  # float32 [S, K, N], as are the biases; empty where they are not used
    biases: Any


def whole(n):
    """`n` rounded up to whole vectors."""
    return (n + LANES - 1) // LANES * LANES


padded = leaf(whole)
"""The same, compiled."""


@inner
def add_panel(states, s, shape):
    width, slot = padded(shape.V), states.counters[s, USED] * LANES
    store(states.positions, s * shape.slots + slot, spread_int(I32(-1)))
    # weight 0 times an unset value must be 0
    at = s * shape.room
    for i in range((at + slot) * width, (at + min(slot + LANES, shape.room)) * width, LANES):
        store(states.values, i, spread(F32(0)))
    states.counters[s, USED] += 1


@inner
def clear(states, s, shape, slot):
    states.positions[s * shape.slots + slot] = -1
    width = padded(shape.V)
    at = (s * shape.room + slot) * width
    for v in range(at, at + width, LANES):
        store(states.values, v, spread(F32(0)))


@inner
def free_slots(states, s, shape, wanted, fresh, fresh_at):
    """Write the numbers of `wanted` free slots to fresh[fresh_at:], lowest first, so that they are less than `room`."""
    found, panel = 0, 0
    while found < wanted:
        if panel == states.counters[s, USED]:
            add_panel(states, s, shape)
        free = bits(at_least(spread_int(I32(-1)), load(states.positions, s * shape.slots + panel * LANES)))
        while free != 0 and found < wanted:
            fresh[fresh_at + found] = panel * LANES + lowest_bit(free)
            free &= free - 1
            found += 1
        panel += 1
