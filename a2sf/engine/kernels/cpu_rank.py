"""The ranking part of the CPU kernel's step: what a token's attention adds to the scores, priorities, and evictions."""

from __future__ import annotations

from a2sf.engine.kernels.cpu_simd import (
    LANES,
    add,
    as_ints,
    at_least,
    at_most_unsigned,
    both,
    divide,
    equal,
    fma,
    in_order,
    load,
    multiply,
    not_less,
    smaller_int,
    smallest_int,
    spread,
    spread_int,
    store,
    where,
    where_int,
)
from a2sf.engine.kernels.cpu_state import F32, I32, LARGEST_INT, inner, leaf

SHARE = F32(1 - 1e-5)
"""As `a2sf.engine.priorities.SHARE`."""


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
def _rank(states, s, shape, ranks, sums, at_0, first, last):
    """Priorities `b + m * A / N` of all slots, as integers in their order; of several heads, their sum."""
    for j in range(0, states.used[s] * LANES, LANES):
        at = s * shape.slots + j
        priority = load(states.scores, at)
        if shape.by_age:
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
def score(states, s, shape, scratch, factor, now, w_at, row_size, i_at):
    """Add the newest token's attention to the scores; weights and denominators of its heads are at `w_at` and `i_at`."""
    if shape.counted:
        _count(states, s, shape, factor, scratch.weights, w_at, row_size, scratch.inverse, i_at)
    else:
        _score(states, s, shape, factor, scratch.weights, w_at, row_size, scratch.inverse, i_at)
    if shape.by_age:
        _age(states, s, shape, factor, now)


@leaf
def evict(states, s, shape, call, scratch, thread, row, head, token, budget, oldest, newest):
    """Drop tokens among positions oldest..newest until `budget` are cached, if there are more than may be."""
    if states.count[s] > budget + shape.spare:
        ranked, at = shape.by_age + shape.weighted + shape.biased > 0, thread * (shape.slots + LANES)
        if ranked:
            _rank(states, s, shape, scratch.ranks, scratch.sums, at, True, True)
        for e in range(states.count[s] - budget):
            if ranked:
                gone = _evict_ranked(states, s, shape, scratch.ranks, at, oldest, newest)
            else:
                gone = _evict(states, s, shape, oldest, newest)
            if gone == LARGEST_INT:  # only a malformed state protects more than its budget
                gone = _evict(states, s, shape, 0, LARGEST_INT - 1)
            _note(shape, call, row, head, token, e, gone)
        states.count[s] = budget


@inner
def evict_together(states, s, step, shape, call, scratch, thread, row, token, budget, oldest, newest):
    """`evict` for all heads of a layer, which hold the same tokens in the same slots: states `s`, `s + step`, ..."""
    if states.count[s] > budget + shape.spare:
        at = thread * (shape.slots + LANES)
        for head in range(shape.heads):
            of_head = s + head * step
            _rank(states, of_head, shape, scratch.ranks, scratch.sums, at, head == 0, head == shape.heads - 1)
        for head in range(shape.heads):
            of_head = s + head * step
            for e in range(states.count[of_head] - budget):
                gone = _evict_ranked(states, of_head, shape, scratch.ranks, at, oldest, newest)
                if gone == LARGEST_INT:
                    gone = _evict_ranked(states, of_head, shape, scratch.ranks, at, 0, LARGEST_INT - 1)
                _note(shape, call, row, head, token, e, gone)
            states.count[of_head] = budget


@leaf
def _note(shape, call, row, head, token, e, gone):
    if call.evicted.size:
        call.evicted[((row * shape.heads + head) * call.tokens + token) * shape.most + e] = gone
