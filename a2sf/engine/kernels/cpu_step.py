"""The compiled step of the CPU kernel: a block of tokens of one KV head on a store of slots.

A KV head's cache is a set of slots in no particular order. Slots are freed by eviction and filled again, never moved.
A block of `w` consecutive tokens takes three steps:
    1. its keys and values fill free slots, and one matrix product gives the logits of all its queries with all slots;
    2. token by token: mask the slots that are not cached at this step, normalise, add to the scores, evict one;
    3. one matrix product of the weights with the values gives the outputs.
Keys are held in panels [D, 16 slots], so that both products read memory in order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from a2sf.engine import priorities
from a2sf.engine.kernels.cpu_simd import (
    LANES,
    TILE_ROWS,
    TILE_VECTORS,
    add,
    as_ints,
    at_least,
    at_most_unsigned,
    bits,
    both,
    divide,
    equal,
    exp2,
    fma,
    in_order,
    larger,
    largest,
    load,
    lowest_bit,
    multiply,
    not_less,
    prefetch,
    scatter,
    smaller_int,
    smallest_int,
    spread,
    spread_int,
    store,
    subtract,
    tile1,
    tile2,
    tile3,
    tile4,
    total,
    where,
    where_int,
)

F32, I32, LARGEST_INT = np.float32, np.int32, np.int32(2**31 - 1)
DEPTH = 64
"""Slots whose values are multiplied at a time: they stay in the first-level cache for all queries of a block."""
LEAST_SUM = np.float32(1e-18)
SHARE = np.float32(priorities.SHARE)


class Shape(NamedTuple):
    """Sizes that all functions share, and what the rule asks for (0 or 1 but for `spare`)."""

    heads: int  # KV heads
    group: int  # query heads per KV head
    D: int  # key size
    V: int  # value size
    slots: int  # per state, a multiple of 16
    room: int  # of them can be filled
    block: int  # tokens of the largest block
    spare: int = 0  # tokens that may be cached beyond the budget before some are evicted
    most: int = 1  # evictions of a step, at most: what a trace has room for
    counted: int = 0  # a query adds 1 for what gets its share of attention, instead of the attention
    by_age: int = 0  # priorities are divided by the number of terms, `Store.terms`
    weighted: int = 0  # and multiplied by `Store.weights`
    biased: int = 0  # and added to `Store.biases`


class Store(NamedTuple):
    """States, flat. An empty slot has position -1; `used` panels have been touched since the state was empty."""

    keys: Any  # float32 [states, slots / 16, D, 16]
    values: Any  # float32 [states, room, V rounded up to 16]
    scores: Any  # float32 [states, slots]
    terms: Any  # float32 [states, slots], `N` of docs/semantics.md; this and the next two are empty where they are not used
    weights: Any  # float32 [states, slots], `m`
    biases: Any  # float32 [states, slots], `b`
    positions: Any  # int32 [states, slots]
    count: Any  # int64 [states]
    used: Any  # int64 [states]
    seen: Any  # int64 [states]
    tainted: Any  # int64 [states], 1 once a key or value was not finite


class Scratch(NamedTuple):
    """One block's intermediates per thread, flat; rows are (token, query head of the group)."""

    query: Any  # float32 [threads, rows, D]
    weights: Any  # float32 [threads, rows, slots + 16]
    output: Any  # float32 [threads, rows, V rounded up to 16]
    inverse: Any  # float32 [threads, rows], 1 / softmax denominator
    fresh: Any  # int64 [threads, block], the slots of the block's tokens
    ranks: Any  # int32 [threads, slots + 16], priorities as integers in their order


class Call(NamedTuple):
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


# without wrappers for Python, reference counts and checks: they are most of the code that LLVM would have to compile
OPTIONS = {"no_cfunc_wrapper": True, "error_model": "numpy", "_nrt": False}
inner = njit(no_cpython_wrapper=True, **OPTIONS)
leaf = njit(no_cpython_wrapper=True, forceinline=True, **OPTIONS)


@leaf
def padded(n):
    return (n + LANES - 1) // LANES * LANES


@leaf
def _product(a, a_at, a_row, rows, b, b_at, b_row, b_vector, vectors, depth, c, c_at, c_row, fresh):
    """C = A @ B (or C += A @ B unless fresh); rows are rounded up to whole tiles."""
    for j in range(0, vectors, TILE_VECTORS):
        n = min(TILE_VECTORS, vectors - j)
        b_j, c_j = b_at + j * b_vector, c_at + j * LANES
        for r in range(0, rows, TILE_ROWS):
            a_r, c_r = a_at + r * a_row, c_j + r * c_row
            if n == 4:
                tile4(a, a_r, a_row, b, b_j, b_row, b_vector, depth, c, c_r, c_row, fresh)
            elif n == 3:
                tile3(a, a_r, a_row, b, b_j, b_row, b_vector, depth, c, c_r, c_row, fresh)
            elif n == 2:
                tile2(a, a_r, a_row, b, b_j, b_row, b_vector, depth, c, c_r, c_row, fresh)
            else:
                tile1(a, a_r, a_row, b, b_j, b_row, b_vector, depth, c, c_r, c_row, fresh)


@leaf
def _scaled_copy(source, source_at, n, factor, target, target_at):
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        store(target, target_at + i, multiply(load(source, source_at + i), spread(factor)))
    for i in range(whole, n):
        target[target_at + i] = source[source_at + i] * factor


@inner
def add_panel(states, s, shape):
    width, slot = padded(shape.V), states.used[s] * LANES
    store(states.positions, s * shape.slots + slot, spread_int(I32(-1)))
    # weight 0 times an unset value must be 0
    at = s * shape.room
    for i in range((at + slot) * width, (at + min(slot + LANES, shape.room)) * width, LANES):
        store(states.values, i, spread(F32(0)))
    states.used[s] += 1


@inner
def _clear(states, s, shape, slot):
    states.positions[s * shape.slots + slot] = -1
    width = padded(shape.V)
    at = (s * shape.room + slot) * width
    for v in range(at, at + width, LANES):
        store(states.values, v, spread(F32(0)))


@inner
def _free_slots(states, s, shape, wanted, fresh, fresh_at):
    """Write the numbers of `wanted` free slots to fresh[fresh_at:], lowest first, so that they are less than `room`."""
    found, panel = 0, 0
    while found < wanted:
        if panel == states.used[s]:
            add_panel(states, s, shape)
        free = bits(at_least(spread_int(I32(-1)), load(states.positions, s * shape.slots + panel * LANES)))
        while free != 0 and found < wanted:
            fresh[fresh_at + found] = panel * LANES + lowest_bit(free)
            free &= free - 1
            found += 1
        panel += 1


@leaf
def _insert(states, s, shape, call, row, head, start, w, fresh, fresh_at):
    """Put keys, values and positions of `w` tokens from `start` into the fresh slots; false if some are not finite."""
    D, V, width = shape.D, shape.V, padded(shape.V)
    whole_d, whole_v = D // LANES * LANES, V // LANES * LANES
    lost, rest = spread(F32(0)), F32(0)  # x - x is 0 for a finite x
    for i in range(w):
        slot = fresh[fresh_at + i]
        at = s * shape.slots + slot
        k_at = row * call.strides[1, 0] + head * call.strides[1, 1] + (start + i) * call.strides[1, 2]
        k_to = (at - slot % LANES) * D + slot % LANES
        for d in range(0, whole_d, LANES):
            lost = add(lost, subtract(load(call.key, k_at + d), load(call.key, k_at + d)))
            scatter(call.key, k_at + d, states.keys, k_to + d * LANES)
        for d in range(whole_d, D):
            x = call.key[k_at + d]
            rest += x - x
            states.keys[k_to + d * LANES] = x
        v_at = row * call.strides[2, 0] + head * call.strides[2, 1] + (start + i) * call.strides[2, 2]
        v_to = (s * shape.room + slot) * width
        for v in range(0, whole_v, LANES):
            x_v = load(call.value, v_at + v)
            lost = add(lost, subtract(x_v, x_v))
            store(states.values, v_to + v, x_v)
        for v in range(whole_v, V):
            x = call.value[v_at + v]
            rest += x - x
            states.values[v_to + v] = x
        states.positions[at] = states.seen[s] + i
        states.scores[at] = 0
        token = (row * shape.heads + head) * call.tokens + start + i
        if shape.by_age:
            states.terms[at] = 0
        if shape.weighted:
            states.weights[at] = call.weight[token]
        if shape.biased:
            states.biases[at] = call.bias[token]
    return total(lost) + rest == F32(0)


@leaf
def _exponentials(states, s, shape, weights, at):
    """2 ** (logit - largest) of one row; the largest is over all slots that are cached at some step of the block."""
    slots_at = s * shape.slots
    top = spread(F32(-np.inf))
    for j in range(0, states.used[s] * LANES, LANES):
        filled = at_least(load(states.positions, slots_at + j), spread_int(I32(0)))
        top = larger(where(filled, load(weights, at + j), spread(F32(-np.inf))), top)
    top = spread(largest(top))
    for j in range(0, states.used[s] * LANES, LANES):
        store(weights, at + j, exp2(subtract(load(weights, at + j), top)))


@leaf
def _mask(states, s, shape, now, weights, at):
    """Set a row's weights to 0 where a slot is not cached at time `now`; return the sum of the rest."""
    sums = spread(F32(0))
    for j in range(0, states.used[s] * LANES, LANES):
        cached = at_most_unsigned(load(states.positions, s * shape.slots + j), spread_int(I32(now)))
        kept = where(cached, load(weights, at + j), spread(F32(0)))
        store(weights, at + j, kept)
        sums = add(sums, kept)
    return total(sums)


@inner
def _recompute(states, s, shape, now, query, query_at, weights, at):
    """`_exponentials` and `_mask` relative to the largest logit cached at `now`, for a row that underflowed."""
    slots_at, low = s * shape.slots, spread(F32(-np.inf))
    top = low
    for j in range(0, states.used[s] * LANES, LANES):
        logits = spread(F32(0))
        for d in range(shape.D):
            logits = fma(spread(query[query_at + d]), load(states.keys, (slots_at + j) * shape.D + d * LANES), logits)
        cached = at_most_unsigned(load(states.positions, slots_at + j), spread_int(I32(now)))
        logits = where(cached, logits, low)
        store(weights, at + j, logits)
        top = larger(logits, top)
    top = spread(largest(top))
    for j in range(0, states.used[s] * LANES, LANES):
        store(weights, at + j, exp2(subtract(load(weights, at + j), top)))
    return _mask(states, s, shape, now, weights, at)


@leaf
def _score(states, s, shape, factor, weights, at, row_size, inverse, inverse_at):
    """A <- a * A + the group's probabilities."""
    for j in range(0, states.used[s] * LANES, LANES):
        mass = spread(F32(0))
        for g in range(shape.group):
            mass = fma(load(weights, at + g * row_size + j), spread(inverse[inverse_at + g]), mass)
        old = load(states.scores, s * shape.slots + j)
        store(states.scores, s * shape.slots + j, fma(spread(factor), old, mass))


@inner
def _count(states, s, shape, factor, weights, at, row_size, inverse, inverse_at):
    """A <- a * A + the number of the group's heads that give a token at least its share of attention."""
    n = F32(states.count[s])
    for j in range(0, states.used[s] * LANES, LANES):
        heads = spread(F32(0))
        for g in range(shape.group):
            p = multiply(load(weights, at + g * row_size + j), spread(inverse[inverse_at + g]))
            heads = add(heads, where(not_less(multiply(p, spread(n)), spread(SHARE)), spread(F32(1)), spread(F32(0))))
        old = load(states.scores, s * shape.slots + j)
        store(states.scores, s * shape.slots + j, fma(spread(factor), old, heads))


@inner
def _age(states, s, shape, factor, now):
    """N <- a * N + 1 of the tokens that are cached at time `now`."""
    for j in range(s * shape.slots, s * shape.slots + states.used[s] * LANES, LANES):
        cached = at_most_unsigned(load(states.positions, j), spread_int(I32(now)))
        old = load(states.terms, j)
        store(states.terms, j, where(cached, fma(spread(factor), old, spread(F32(1))), old))


@inner
def _rank(states, s, shape, ranks, ranks_at):
    """Priorities `b + m * A / N` of all slots, as integers in their order."""
    for j in range(0, states.used[s] * LANES, LANES):
        at = s * shape.slots + j
        priority = load(states.scores, at)
        if shape.by_age:
            priority = divide(priority, load(states.terms, at))
        if shape.weighted:
            priority = multiply(priority, load(states.weights, at))
        if shape.biased:
            priority = add(priority, load(states.biases, at))
        store(ranks, ranks_at + j, in_order(priority))


@inner
def _evict_ranked(states, s, shape, ranks, ranks_at, oldest, newest):
    """`_evict` by the ranks of the slots instead of their scores."""
    at, end, none = s * shape.slots, states.used[s] * LANES, spread_int(LARGEST_INT)
    least = none
    for j in range(0, end, LANES):
        position = load(states.positions, at + j)
        free = both(at_least(position, spread_int(I32(oldest))), at_least(spread_int(I32(newest)), position))
        least = smaller_int(where_int(free, load(ranks, ranks_at + j), none), least)
    least = spread_int(smallest_int(least))
    victim = none
    for j in range(0, end, LANES):
        position = load(states.positions, at + j)
        free = both(at_least(position, spread_int(I32(oldest))), at_least(spread_int(I32(newest)), position))
        found = both(free, equal(load(ranks, ranks_at + j), least))
        victim = smaller_int(where_int(found, position, none), victim)
    lowest = smallest_int(victim)
    for j in range(0, end, LANES):
        position = load(states.positions, at + j)
        store(states.positions, at + j, where_int(equal(position, spread_int(lowest)), spread_int(I32(-1)), position))
    return lowest


@leaf
def _evict(states, s, shape, oldest, newest):
    """Drop the token with the least score among positions oldest..newest, the oldest of equals; return its position.

    Without branches and in whole vectors: each step waits for the eviction of the step before.
    """
    at, end, none = s * shape.slots, states.used[s] * LANES, spread_int(LARGEST_INT)
    least = none
    for j in range(0, end, LANES):
        position = load(states.positions, at + j)
        free = both(at_least(position, spread_int(I32(oldest))), at_least(spread_int(I32(newest)), position))
        # scores are not negative, so their bits are in their order
        least = smaller_int(where_int(free, as_ints(load(states.scores, at + j)), none), least)
    least = spread_int(smallest_int(least))
    victim = none
    for j in range(0, end, LANES):
        position = load(states.positions, at + j)
        free = both(at_least(position, spread_int(I32(oldest))), at_least(spread_int(I32(newest)), position))
        found = both(free, equal(as_ints(load(states.scores, at + j)), least))
        victim = smaller_int(where_int(found, position, none), victim)
    lowest = smallest_int(victim)
    for j in range(0, end, LANES):
        position = load(states.positions, at + j)
        store(states.positions, at + j, where_int(equal(position, spread_int(lowest)), spread_int(I32(-1)), position))
    return lowest


@leaf
def _prefetch(shape, call, row, head, token):
    """A token's inputs lie far from those of the token before, so that the processor does not foresee the access."""
    k_at = row * call.strides[1, 0] + head * call.strides[1, 1] + token * call.strides[1, 2]
    for d in range(0, shape.D, LANES):
        prefetch(call.key, k_at + d)
    v_at = row * call.strides[2, 0] + head * call.strides[2, 1] + token * call.strides[2, 2]
    for v in range(0, shape.V, LANES):
        prefetch(call.value, v_at + v)
    for g in range(head * shape.group, (head + 1) * shape.group):
        q_at = row * call.strides[0, 0] + g * call.strides[0, 1] + token * call.strides[0, 2]
        for d in range(0, shape.D, LANES):
            prefetch(call.query, q_at + d)
        out = ((row * call.tokens + token) * shape.heads * shape.group + g) * shape.V
        for v in range(0, shape.V, LANES):
            prefetch(call.output, out + v)


@inner
def block(states, s, shape, call, scratch, thread, head, row, start, limit, budget, recent, sinks, factor, scored):
    """Read up to `limit` tokens from `start` of `row` into state `s`; return how many were read."""
    G, D, V = shape.group, shape.D, shape.V
    width, row_size = padded(V), shape.slots + LANES
    rows = (shape.block * G + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    q_at, w_at, o_at, i_at = (thread * rows * D, thread * rows * row_size, thread * rows * width, thread * rows)
    slots_at, f_at, heads = s * shape.slots, thread * shape.block, shape.heads * G

    w = limit if states.tainted[s] == 0 else 1
    if states.tainted[s] != 0:  # a step may have freed several slots
        for slot in range(min(states.used[s] * LANES, shape.room)):
            if states.positions[slots_at + slot] < 0:
                _clear(states, s, shape, slot)
    _free_slots(states, s, shape, w, scratch.fresh, f_at)
    if not _insert(states, s, shape, call, row, head, start, w, scratch.fresh, f_at):
        # a weight of 0 does not hide NaN or infinity: from here on one token at a time. A slot that is freed is then the
        # lowest free one, so that the next token overwrites it before anything is multiplied with it
        states.tainted[s] = 1
        for i in range(1, w):
            _clear(states, s, shape, scratch.fresh[f_at + i])
        w = 1
    for i in range(w):
        for g in range(G):
            q = row * call.strides[0, 0] + (head * G + g) * call.strides[0, 1] + (start + i) * call.strides[0, 2]
            _scaled_copy(call.query, q, D, call.scale, scratch.query, q_at + (i * G + g) * D)
    panels = states.used[s]
    _product(
        scratch.query, q_at, D, w * G, states.keys, slots_at * D, LANES, D * LANES, panels, D,
        scratch.weights, w_at, row_size, w > 0,
    )  # fmt: skip
    for r in range(w * G):
        _exponentials(states, s, shape, scratch.weights, w_at + r * row_size)

    for i in range(w):
        now = states.seen[s] + i
        _prefetch(shape, call, row, head, start + w + i)
        for r in range(i * G, (i + 1) * G):
            sum_r = _mask(states, s, shape, now, scratch.weights, w_at + r * row_size)
            if not sum_r > LEAST_SUM:
                at = w_at + r * row_size
                sum_r = _recompute(states, s, shape, now, scratch.query, q_at + r * D, scratch.weights, at)
            scratch.inverse[i_at + r] = F32(1) / sum_r
        states.count[s] += 1
        if scored:
            at = w_at + i * G * row_size
            if shape.counted:
                _count(states, s, shape, factor, scratch.weights, at, row_size, scratch.inverse, i_at + i * G)
            else:
                _score(states, s, shape, factor, scratch.weights, at, row_size, scratch.inverse, i_at + i * G)
            if shape.by_age:
                _age(states, s, shape, factor, now)
        if states.count[s] > budget + shape.spare:
            ranked = shape.by_age + shape.weighted + shape.biased > 0
            if ranked:
                _rank(states, s, shape, scratch.ranks, thread * row_size)
            for e in range(states.count[s] - budget):
                if ranked:
                    gone = _evict_ranked(states, s, shape, scratch.ranks, thread * row_size, sinks, now - recent)
                else:
                    gone = _evict(states, s, shape, sinks, now - recent)
                if gone == LARGEST_INT:  # only a malformed state protects more than its budget
                    gone = _evict(states, s, shape, now - now, now)
                if call.evicted.size:
                    at = (row * shape.heads + head) * call.tokens + start + i
                    call.evicted[at * shape.most + e] = gone
            states.count[s] = budget

    slots = min(panels * LANES, shape.room)
    for j in range(0, slots, DEPTH):
        _product(
            scratch.weights, w_at + j, row_size, w * G, states.values, (s * shape.room + j) * width, width, LANES,
            width // LANES, min(DEPTH, slots - j), scratch.output, o_at, width, j == 0,
        )  # fmt: skip
    for i in range(w):
        for g in range(G):
            r, to = i * G + g, ((row * call.tokens + start + i) * heads + head * G + g) * V
            _scaled_copy(scratch.output, o_at + r * width, V, scratch.inverse[i_at + r], call.output, to)
    states.seen[s] += w
    return w
