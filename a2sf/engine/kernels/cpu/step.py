"""The compiled step of the CPU kernel: a block of tokens of one KV head on a store of slots.

A KV head's cache is a set of slots in no particular order. Slots are freed by eviction and filled again, never moved.
A block of `w` consecutive tokens takes three steps:
    1. its keys and values fill free slots, and one matrix product gives the logits of all its queries with all slots;
    2. token by token: mask the slots that are not cached at this step, normalise, add to the scores, evict one;
    3. one matrix product of the weights with the values gives the outputs.
Keys lie in panels [D, 16 slots], so that both products read memory in order.

`a2sf/bench/scan/scan.py` does the same in plain loops and products of torch: to read, and to measure against this.
"""

from __future__ import annotations

import numpy as np

from a2sf.compat.numba import inner, leaf
from a2sf.engine.kernels.cpu.rank import evict, evict_together, score
from a2sf.engine.kernels.cpu.simd import (
    HIGH_VECTORS,
    LANES,
    TILE_ROWS,
    TILE_VECTORS,
    add,
    after,
    at_least,
    at_most_unsigned,
    exp2,
    fma,
    high1,
    high2,
    larger,
    largest,
    load,
    multiply,
    prefetch,
    scatter,
    spread,
    spread_int,
    store,
    store_all,
    subtract,
    tile1,
    tile2,
    tile3,
    tile4,
    total,
    transpose,
    where,
)
from a2sf.engine.kernels.cpu.state import COUNT, F32, I32, SEEN, TAINTED, USED, clear, free_slots, padded

DEPTH = 64
"""Slots whose values are multiplied at a time: they stay in the first-level cache for all queries of a block."""
TOGETHER = 4
"""Keys that enter a panel at a time and are worth transposing it: less lines of memory are written than one by one."""
LEAST_SUM = np.float32(1e-18)


@leaf
def _product(a, a_at, a_row, rows, b, b_at, b_row, b_vector, vectors, depth, c, c_at, c_row, fresh):
    """C = A @ B (or C += A @ B unless fresh); rows are rounded up to whole tiles."""
    for j in range(0, vectors, TILE_VECTORS):
        n = min(TILE_VECTORS, vectors - j)
        b_j, c_j, r = b_at + j * b_vector, c_at + j * LANES, 0
        while r < rows:
            a_r, c_r = a_at + r * a_row, c_j + r * c_row
            high = n <= HIGH_VECTORS and rows - r > TILE_ROWS
            if n == 4:
                tile4(a, a_r, a_row, b, b_j, b_row, b_vector, depth, c, c_r, c_row, fresh)
            elif n == 3:
                tile3(a, a_r, a_row, b, b_j, b_row, b_vector, depth, c, c_r, c_row, fresh)
            elif n == 2 and high:
                high2(a, a_r, a_row, b, b_j, b_row, b_vector, depth, c, c_r, c_row, fresh)
            elif n == 2:
                tile2(a, a_r, a_row, b, b_j, b_row, b_vector, depth, c, c_r, c_row, fresh)
            elif high:
                high1(a, a_r, a_row, b, b_j, b_row, b_vector, depth, c, c_r, c_row, fresh)
            else:
                tile1(a, a_r, a_row, b, b_j, b_row, b_vector, depth, c, c_r, c_row, fresh)
            r += TILE_ROWS << high


@leaf
def _scaled_copy(source, source_at, n, factor, target, target_at):
    in_vectors = n // LANES * LANES
    i = 0
    while i < in_vectors:
        store(target, target_at + i, multiply(load(source, source_at + i), spread(factor)))
        i = after(i)
    for i in range(in_vectors, n):
        target[target_at + i] = source[source_at + i] * factor


@leaf
def _key_at(call, row, head, token):
    return row * call.strides[1, 0] + head * call.strides[1, 1] + token * call.strides[1, 2]


@leaf
def _insert_keys(states, s, shape, call, scratch, part, row, head, start, w):
    """Put the keys of `w` tokens from `start` into the fresh slots, whose positions are set; panel by panel."""
    D, in_vectors, fresh, lanes_at = shape.D, shape.D // LANES * LANES, part * padded(shape.block), part * LANES
    i = 0
    while i < w:
        panel, first = scratch.fresh[fresh + i] // LANES, i
        to = (s * shape.slots + panel * LANES) * D
        while i < w and scratch.fresh[fresh + i] // LANES == panel:
            i += 1
        if i - first >= TOGETHER:
            for lane in range(LANES):  # any key for the lanes that keep what they hold
                scratch.keys[lanes_at + lane] = _key_at(call, row, head, start + first)
            for j in range(first, i):
                scratch.keys[lanes_at + scratch.fresh[fresh + j] % LANES] = _key_at(call, row, head, start + j)
            new = at_least(
                load(states.positions, s * shape.slots + panel * LANES), spread_int(I32(states.counters[s, SEEN]))
            )
            d = 0
            while d < in_vectors:
                transpose(call.key, scratch.keys, lanes_at, d, states.keys, to + d * LANES, new)
                d = after(d)
        for j in range(first, i):
            k_at, k_to = _key_at(call, row, head, start + j), to + scratch.fresh[fresh + j] % LANES
            d = 0 if i - first < TOGETHER else in_vectors
            while d < in_vectors:
                scatter(call.key, k_at + d, states.keys, k_to + d * LANES)
                d = after(d)
            for d in range(in_vectors, D):
                states.keys[k_to + d * LANES] = call.key[k_at + d]


@leaf
def _insert(states, s, shape, call, scratch, part, row, head, start, w):
    """Put keys, values and positions of `w` tokens from `start` into the fresh slots; false if some are not finite."""
    D, V, width, fresh = shape.D, shape.V, padded(shape.V), part * padded(shape.block)
    whole_d, whole_v = D // LANES * LANES, V // LANES * LANES
    lost_k = lost_v = spread(F32(0))  # x - x is 0 for a finite x
    rest = F32(0)
    for i in range(w):
        slot = scratch.fresh[fresh + i]
        at = s * shape.slots + slot
        k_at = _key_at(call, row, head, start + i)
        d = 0
        while d < whole_d:
            lost_k = add(lost_k, subtract(load(call.key, k_at + d), load(call.key, k_at + d)))
            d = after(d)
        for d in range(whole_d, D):
            rest += call.key[k_at + d] - call.key[k_at + d]
        v_at = row * call.strides[2, 0] + head * call.strides[2, 1] + (start + i) * call.strides[2, 2]
        v_to = (s * shape.room + slot) * width
        v = 0
        while v < whole_v:
            x_v = load(call.value, v_at + v)
            lost_v = add(lost_v, subtract(x_v, x_v))
            store(states.values, v_to + v, x_v)
            v = after(v)
        for v in range(whole_v, V):
            x = call.value[v_at + v]
            rest += x - x
            states.values[v_to + v] = x
        states.positions[at] = states.counters[s, SEEN] + i
        states.scores[at] = 0
        token = (row * shape.heads + head) * call.tokens + start + i
        if shape.mean_over_age:
            states.terms[at] = 0
        if shape.weighted:
            states.weights[at] = call.weight[token]
        if shape.biased:
            states.biases[at] = call.bias[token]
    _insert_keys(states, s, shape, call, scratch, part, row, head, start, w)
    return total(add(lost_k, lost_v)) + rest == F32(0)


@leaf
def _exponentials(states, s, shape, weights, at):
    """2 ** (logit - largest) of one row; the largest is over all slots that are cached at some step of the block."""
    slots_at = s * shape.slots
    top = spread(F32(-np.inf))
    j, end = 0, states.counters[s, USED] * LANES
    while j < end:
        filled = at_least(load(states.positions, slots_at + j), spread_int(I32(0)))
        top = larger(where(filled, load(weights, at + j), spread(F32(-np.inf))), top)
        j = after(j)
    top = spread(largest(top))
    j, end = 0, states.counters[s, USED] * LANES
    while j < end:
        store(weights, at + j, exp2(subtract(load(weights, at + j), top)))
        j = after(j)


@leaf
def _mask(states, s, shape, now, weights, at):
    """Set a row's weights to 0 where a slot is not cached at time `now`; return the sum of the rest."""
    sums = spread(F32(0))
    j, end = 0, states.counters[s, USED] * LANES
    while j < end:
        cached = at_most_unsigned(load(states.positions, s * shape.slots + j), spread_int(I32(now)))
        shown = where(cached, load(weights, at + j), spread(F32(0)))
        store_all(weights, at + j, shown)
        sums = add(sums, shown)
        j = after(j)
    return total(sums)


@inner
def _recompute(states, s, shape, now, query, query_at, weights, at):
    """`_exponentials` and `_mask` relative to the largest logit cached at `now`, for a row that underflowed."""
    slots_at, low = s * shape.slots, spread(F32(-np.inf))
    top = low
    j, end = 0, states.counters[s, USED] * LANES
    while j < end:
        logits = spread(F32(0))
        for d in range(shape.D):
            logits = fma(spread(query[query_at + d]), load(states.keys, (slots_at + j) * shape.D + d * LANES), logits)
        cached = at_most_unsigned(load(states.positions, slots_at + j), spread_int(I32(now)))
        logits = where(cached, logits, low)
        store(weights, at + j, logits)
        top = larger(logits, top)
        j = after(j)
    top = spread(largest(top))
    j, end = 0, states.counters[s, USED] * LANES
    while j < end:
        store(weights, at + j, exp2(subtract(load(weights, at + j), top)))
        j = after(j)
    return _mask(states, s, shape, now, weights, at)


@leaf
def _prefetch(shape, call, row, head, token):
    """A token's inputs lie far from those of the token before, so that the processor does not prefetch them itself."""
    k_at = row * call.strides[1, 0] + head * call.strides[1, 1] + token * call.strides[1, 2]
    d = 0
    while d < shape.D:
        prefetch(call.key, k_at + d)
        d = after(d)
    v_at = row * call.strides[2, 0] + head * call.strides[2, 1] + token * call.strides[2, 2]
    v = 0
    while v < shape.V:
        prefetch(call.value, v_at + v)
        v = after(v)
    for g in range(head * shape.group, (head + 1) * shape.group):
        q_at = row * call.strides[0, 0] + g * call.strides[0, 1] + token * call.strides[0, 2]
        d = 0
        while d < shape.D:
            prefetch(call.query, q_at + d)
            d = after(d)
        out = ((row * call.tokens + token) * shape.heads * shape.group + g) * shape.V
        v = 0
        while v < shape.V:
            prefetch(call.output, out + v)
            v = after(v)


@leaf
def _enter(states, s, shape, call, scratch, part, head, row, start, w):
    """Put `w` tokens into free slots; false if some are not finite."""
    if states.counters[s, TAINTED] != 0:  # a step may have freed several slots
        for slot in range(min(states.counters[s, USED] * LANES, shape.room)):
            if states.positions[s * shape.slots + slot] < 0:
                clear(states, s, shape, slot)
    free_slots(states, s, shape, w, scratch.fresh, part * padded(shape.block))
    return _insert(states, s, shape, call, scratch, part, row, head, start, w)


@inner
def _taint(states, s, shape, scratch, part, w):
    """Take all but the first of `w` new tokens back; from then on tokens are read one by one.

    A weight of 0 does not hide NaN or infinity. A slot that is freed is then the lowest free one, so that the next token
    overwrites it before anything is multiplied with it.
    """
    states.counters[s, TAINTED] = 1
    for i in range(1, w):
        clear(states, s, shape, scratch.fresh[part * padded(shape.block) + i])


@leaf
def _logits(states, s, shape, call, scratch, part, head, row, start, w):
    """The weights of `w` new tokens' queries on all slots, before masks and denominators."""
    G, D, row_size = shape.group, shape.D, shape.slots + LANES
    rows = (shape.block * G + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    q_at, w_at = part * rows * D, part * rows * row_size
    for i in range(w):
        for g in range(G):
            q = row * call.strides[0, 0] + (head * G + g) * call.strides[0, 1] + (start + i) * call.strides[0, 2]
            _scaled_copy(call.query, q, D, call.scale, scratch.query, q_at + (i * G + g) * D)
    _product(
        scratch.query, q_at, D, w * G, states.keys, s * shape.slots * D, LANES, D * LANES, states.counters[s, USED], D,
        scratch.weights, w_at, row_size, w > 0,
    )  # fmt: skip
    for r in range(w * G):
        _exponentials(states, s, shape, scratch.weights, w_at + r * row_size)


@leaf
def _weigh(states, s, shape, scratch, part, i, factor, scored):
    """Normalise the weights of the block's token `i`, and score it."""
    G, row_size, now = shape.group, shape.slots + LANES, states.counters[s, SEEN] + i
    rows = (shape.block * G + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    q_at, w_at, i_at = part * rows * shape.D, part * rows * row_size, part * padded(rows)
    for r in range(i * G, (i + 1) * G):
        sum_r = _mask(states, s, shape, now, scratch.weights, w_at + r * row_size)
        if not sum_r > LEAST_SUM:
            at = w_at + r * row_size
            sum_r = _recompute(states, s, shape, now, scratch.query, q_at + r * shape.D, scratch.weights, at)
        scratch.inverse[i_at + r] = F32(1) / sum_r
    states.counters[s, COUNT] += 1
    if scored:
        score(states, s, shape, scratch, factor, now, w_at + i * G * row_size, row_size, i_at + i * G)


@leaf
def _attend(states, s, shape, call, scratch, part, head, row, start, w, panels):
    """The outputs of `w` new tokens."""
    G, V, heads = shape.group, shape.V, shape.heads * shape.group
    width, row_size = padded(V), shape.slots + LANES
    rows = (shape.block * G + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    w_at, o_at, i_at = part * rows * row_size, part * rows * width, part * padded(rows)
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
    states.counters[s, SEEN] += w


@inner
def block(states, s, shape, call, scratch, thread, head, row, start, limit, budget, recent, sinks, factor, scored):
    """Read up to `limit` tokens from `start` of `row` into state `s`; return how many were read."""
    w = limit if states.counters[s, TAINTED] == 0 else 1
    if not _enter(states, s, shape, call, scratch, thread, head, row, start, w):
        _taint(states, s, shape, scratch, thread, w)
        w = 1
    _logits(states, s, shape, call, scratch, thread, head, row, start, w)
    panels = states.counters[s, USED]
    for i in range(w):
        _prefetch(shape, call, row, head, start + w + i)
        _weigh(states, s, shape, scratch, thread, i, factor, scored)
        newest = states.counters[s, SEEN] + i - recent
        evict(states, s, shape, call, scratch, thread, row, head, start + i, budget, sinks, newest)
    _attend(states, s, shape, call, scratch, thread, head, row, start, w, panels)
    return w


@inner
def block_together(
    states, s, step, shape, call, scratch, thread, row, start, limit, budget, recent, sinks, factor, scored
):  # fmt: skip
    """`block` for all heads of a layer, token by token side by side: states `s`, `s + step`, ..."""
    w, part = limit if states.counters[s, TAINTED] == 0 else 1, thread * shape.heads
    finite = True
    for h in range(shape.heads):
        finite &= _enter(states, s + h * step, shape, call, scratch, part + h, h, row, start, w)
    if not finite:  # slots are the same in all heads, so all read on token by token
        for h in range(shape.heads):
            _taint(states, s + h * step, shape, scratch, part + h, w)
        w = 1
    for h in range(shape.heads):
        _logits(states, s + h * step, shape, call, scratch, part + h, h, row, start, w)
    panels = states.counters[s, USED]
    for i in range(w):
        for h in range(shape.heads):
            _prefetch(shape, call, row, h, start + w + i)
            _weigh(states, s + h * step, shape, scratch, part + h, i, factor, scored)
        newest = states.counters[s, SEEN] + i - recent
        evict_together(states, s, step, shape, call, scratch, thread, row, start + i, budget, sinks, newest)
    for h in range(shape.heads):
        _attend(states, s + h * step, shape, call, scratch, part + h, h, row, start, w, panels)
    return w
