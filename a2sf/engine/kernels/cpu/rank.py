"""The ranking part of the CPU kernel's step: what a token's attention adds to the scores, priorities, and evictions."""

from __future__ import annotations

from a2sf.compat.numba import inner, leaf
from a2sf.engine.kernels.cpu.simd import (
    LANES,
    add,
    after,
    as_ints,
    at_least,
    at_most_unsigned,
    bits,
    both,
    divide,
    equal,
    fma,
    in_order,
    load,
    multiply,
    not_less,
    ones,
    smaller_int,
    smallest_int,
    spread,
    spread_int,
    store,
    store_all,
    where,
    where_int,
)
from a2sf.engine.kernels.cpu.state import COUNT, F32, I32, LARGEST_INT, USED

SHARE = F32(1 - 1e-5)
"""As `a2sf.engine.priorities.SHARE`."""


@leaf
def _score(states, s, shape, factor, weights, at, row_size, inverse, inverse_at):
    """A <- a * A + the group's probabilities."""
    j, end = 0, states.counters[s, USED] * LANES
    while j < end:
        mass = spread(F32(0))
        for g in range(shape.group):
            mass = fma(load(weights, at + g * row_size + j), spread(inverse[inverse_at + g]), mass)
        old = load(states.scores, s * shape.slots + j)
        store(states.scores, s * shape.slots + j, fma(spread(factor), old, mass))
        j = after(j)


@inner
def _count(states, s, shape, factor, weights, at, row_size, inverse, inverse_at):
    """A <- a * A + the number of the group's heads whose attention to a token is at least 1 / n."""
    n = F32(states.counters[s, COUNT])
    j, end = 0, states.counters[s, USED] * LANES
    while j < end:
        heads = spread(F32(0))
        for g in range(shape.group):
            p = multiply(load(weights, at + g * row_size + j), spread(inverse[inverse_at + g]))
            heads = add(heads, where(not_less(multiply(p, spread(n)), spread(SHARE)), spread(F32(1)), spread(F32(0))))
        old = load(states.scores, s * shape.slots + j)
        store(states.scores, s * shape.slots + j, fma(spread(factor), old, heads))
        j = after(j)


@inner
def _age(states, s, shape, factor, now):
    """N <- a * N + 1 of the tokens that are cached at time `now`."""
    j, end = s * shape.slots, s * shape.slots + states.counters[s, USED] * LANES
    while j < end:
        cached = at_most_unsigned(load(states.positions, j), spread_int(I32(now)))
        old = load(states.terms, j)
        store_all(states.terms, j, where(cached, fma(spread(factor), old, spread(F32(1))), old))
        j = after(j)


@inner
def _rank(states, s, shape, ranks, sums, at_0, first, last):
    """Priorities `b + m * A / N` of all slots, as integers in their order; of several heads, their sum."""
    j, end = 0, states.counters[s, USED] * LANES
    while j < end:
        at = s * shape.slots + j
        priority = load(states.scores, at)
        if shape.mean_over_age:
            priority = divide(priority, load(states.terms, at))
        if shape.weighted:
            priority = multiply(priority, load(states.weights, at))
        if shape.biased:
            priority = add(priority, load(states.biases, at))
        if not first:
            priority = add(priority, load(sums, at_0 + j))
        if last:
            store(ranks, at_0 + j, in_order(priority))
        else:
            store(sums, at_0 + j, priority)
        j = after(j)


@leaf
def _free(states, at, oldest, newest):
    """Which of 16 slots from `at` hold one of the positions oldest..newest."""
    position = load(states.positions, at)
    return both(at_least(position, spread_int(I32(oldest))), at_least(spread_int(I32(newest)), position))


@leaf
def _with_rank(states, at, ranks, ranks_at, rank, oldest, newest):
    """Which of them have rank `rank`."""
    return both(_free(states, at, oldest, newest), equal(as_ints(load(ranks, ranks_at)), rank))


@leaf
def _clear(states, at, lanes):
    """Empty some of 16 slots from `at`."""
    store_all(states.positions, at, where_int(lanes, spread_int(I32(-1)), load(states.positions, at)))


@leaf
def _drop(states, s, shape, evicted):
    """Empty the slot of position `evicted`."""
    j, end = s * shape.slots, s * shape.slots + states.counters[s, USED] * LANES
    while j < end:
        _clear(states, j, equal(load(states.positions, j), spread_int(I32(evicted))))
        j = after(j)


@leaf
def _evict(states, s, shape, ranks, ranks_at, oldest, newest, traced):
    """Evict the token with the least rank among positions oldest..newest; ties: the oldest first.

    `ranks` are integers, or floats that are not negative, whose bits are in their order. The code works on whole vectors and
    has no branch that a processor predicts badly, because each step waits for the eviction of the step before. Therefore
    equal ranks, which are rare, are only counted; positions are compared only if there are some, or for a trace.

    Returns:
        `LARGEST_INT` if no token may be evicted; else the token's position, or any smaller number unless `traced`.
    """
    at, end, none = s * shape.slots, states.counters[s, USED] * LANES, spread_int(LARGEST_INT)
    least, j = none, 0
    while j < end:
        rank = where_int(_free(states, at + j, oldest, newest), as_ints(load(ranks, ranks_at + j)), none)
        least, j = smaller_int(rank, least), after(j)
    least = spread_int(smallest_int(least))
    found, j = 0, 0
    while j < end:
        lanes = _with_rank(states, at + j, ranks, ranks_at + j, least, oldest, newest)
        found, j = found + ones(bits(lanes)), after(j)
    if found == 1 and not traced:
        j = 0
        while j < end:
            _clear(states, at + j, _with_rank(states, at + j, ranks, ranks_at + j, least, oldest, newest))
            j = after(j)
        return I32(0)
    victim, j = none, 0
    while j < end:
        lanes = _with_rank(states, at + j, ranks, ranks_at + j, least, oldest, newest)
        victim, j = smaller_int(where_int(lanes, load(states.positions, at + j), none), victim), after(j)
    evicted = smallest_int(victim)
    _drop(states, s, shape, evicted)
    return evicted


@leaf
def score(states, s, shape, scratch, factor, now, w_at, row_size, i_at):
    """Add the newest token's attention to the scores; weights and denominators of its heads are at `w_at` and `i_at`."""
    if shape.count_above_uniform:
        _count(states, s, shape, factor, scratch.weights, w_at, row_size, scratch.inverse, i_at)
    else:
        _score(states, s, shape, factor, scratch.weights, w_at, row_size, scratch.inverse, i_at)
    if shape.mean_over_age:
        _age(states, s, shape, factor, now)


@leaf
def evict(states, s, shape, call, scratch, thread, row, head, token, budget, oldest, newest):
    """Evict tokens among positions oldest..newest until `budget` are cached, if there are more than there may be."""
    if states.counters[s, COUNT] > budget + shape.spare:
        ranked, at, traced = (
            shape.mean_over_age + shape.weighted + shape.biased > 0,
            thread * (shape.slots + LANES),
            _traces(call),
        )
        if ranked:
            _rank(states, s, shape, scratch.ranks, scratch.sums, at, True, True)
        for e in range(states.counters[s, COUNT] - budget):
            if ranked:
                evicted = _evict(states, s, shape, scratch.ranks, at, oldest, newest, traced)
            else:
                evicted = _evict(states, s, shape, states.scores, s * shape.slots, oldest, newest, traced)
            if evicted == LARGEST_INT:  # only a malformed state protects more than its budget
                evicted = _evict(states, s, shape, states.scores, s * shape.slots, 0, LARGEST_INT - 1, True)
            _note(shape, call, row, head, token, e, evicted)
        states.counters[s, COUNT] = budget


@inner
def evict_together(states, s, step, shape, call, scratch, thread, row, token, budget, oldest, newest):
    """`evict` for all heads of a layer, which have the same tokens in the same slots: states `s`, `s + step`, ..."""
    if states.counters[s, COUNT] > budget + shape.spare:
        at = thread * (shape.slots + LANES)
        for head in range(shape.heads):
            of_head = s + head * step
            _rank(states, of_head, shape, scratch.ranks, scratch.sums, at, head == 0, head == shape.heads - 1)
        for e in range(states.counters[s, COUNT] - budget):
            evicted = _evict(states, s, shape, scratch.ranks, at, oldest, newest, True)
            if evicted == LARGEST_INT:
                evicted = _evict(states, s, shape, scratch.ranks, at, 0, LARGEST_INT - 1, True)
            _note(shape, call, row, 0, token, e, evicted)
            for head in range(1, shape.heads):
                _drop(states, s + head * step, shape, evicted)
                _note(shape, call, row, head, token, e, evicted)
        for head in range(shape.heads):
            states.counters[s + head * step, COUNT] = budget


@leaf
def _traces(call):
    """Whether evictions are traced."""
    return call.evicted.size > 0


@leaf
def _note(shape, call, row, head, token, e, evicted):
    if _traces(call):
        call.evicted[((row * shape.heads + head) * call.tokens + token) * shape.most + e] = evicted
