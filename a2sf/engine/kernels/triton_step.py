"""The Triton kernel's own code: what one program does, token by token, in Triton's part of Python.

The rule is compiled in: what it does not ask for costs nothing. `a2sf.engine.kernels.triton_kernel` launches it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def _jit(*varying: str) -> Callable[[Any], Any]:
    """Compile a function, once for all values of `varying`; Triton's habit is one for 1, one for multiples of 16, ..."""
    return (lambda function: function) if triton is None else triton.jit(do_not_specialize=list(varying))


@_jit()
def _better(priority, position, free, n, least, oldest, victim):
    """The least priority of each lane so far, its position (the oldest of equals) and slot, after slots `n`."""
    priority = tl.where(priority == priority, priority, float("inf"))  # NaN goes last
    better = free & ((priority < least) | ((priority == least) & (position < oldest)))
    return tl.where(better, priority, least), tl.where(better, position, oldest), tl.where(better, n, victim)


@_jit("T", "spare", "ages", "events")
def recursion(
    query,  # [B, T, H, D], times the scale
    key,  # [B, T, K, D]
    value,  # [B, T, K, V]
    weight,  # [B, K, T], `m` of the new tokens
    bias,  # [B, K, T], and `b`
    output,  # [B, T, H, V]
    gone,  # int32 [B, K, events, 2], column and position of each eviction
    keys,  # [B, K, D, slots], the slot buffer: in and out, in any order of position
    values,  # [B, K, slots, V]
    scores,  # [B, K, slots]
    positions,  # int64 [B, K, slots]
    weights,  # [B, K, slots]
    biases,  # [B, K, slots]
    logits,  # [B, K, G, slots], scratch
    ranks,  # [B, K / HEADS, slots], scratch: priorities; the scores, where they are what ranks
    terms,  # [B, ages], `N` of a token by its age
    cached,  # int64 [B, K], how many slots are filled at the start: the first ones
    seen,  # int64 [B], as are length, budget, recent, sinks
    length,
    budget,
    recent,
    sinks,
    factor,  # [B]
    T,
    slots,
    spare,  # tokens beyond the budget that may be cached between two steps
    ages,
    events,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    PADDED_G: tl.constexpr,  # powers of two, masked
    PADDED_D: tl.constexpr,
    PADDED_V: tl.constexpr,
    TILE: tl.constexpr,  # slots at a time while attending,
    WIDE_TILE: tl.constexpr,  # and while scoring
    HEADS: tl.constexpr,  # KV heads of a program: one, or all that share a kept set
    HOLES: tl.constexpr,  # whether several tokens may go at once, so that empty slots lie between filled ones
    SCORED: tl.constexpr,  # the parts of the rule
    COUNTED: tl.constexpr,
    BY_AGE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    RANKED: tl.constexpr,  # whether `ranks` is not `scores`
    SHARE: tl.constexpr,
):
    # Threads of the program hand data to each other through global memory, and Triton does not order a store before
    # another thread's load, nor a load before another thread's store. `debug_barrier` does, for all threads of the
    # program, and no other program touches this row and head. Barriers stand wherever a location changes hands.
    first = tl.program_id(0).to(tl.int64) * HEADS  # the program's first KV head, counted through all rows
    row = first // K
    ranks += first // HEADS * slots
    terms += row * ages

    first_position = tl.load(seen + row)
    row_length, row_budget = tl.load(length + row), tl.load(budget + row)
    row_recent, row_sinks = tl.load(recent + row), tl.load(sinks + row)
    row_factor = tl.load(factor + row)

    g, d, v = tl.arange(0, PADDED_G), tl.arange(0, PADDED_D), tl.arange(0, PADDED_V)
    real_g, real_d, real_v = g < G, d < D, v < V
    begun = tl.load(cached + first)
    count = begun  # of cached tokens
    used = begun  # slots from this one on are empty
    slot = begun  # where the next token goes

    for t in range(row_length):
        token = row * T + t
        now = first_position + t
        count += 1
        used = tl.maximum(used, slot + 1)
        # the least priority among the unprotected, the oldest of equals, and the first empty slot; per lane first
        least = tl.full([WIDE_TILE], float("inf"), row_factor.dtype)
        oldest = tl.full([WIDE_TILE], 2**62, tl.int64)
        victim = tl.zeros([WIDE_TILE], tl.int64)
        hole = tl.zeros([WIDE_TILE], tl.int64) + used

        for here in range(first, first + HEADS):
            head = here % K
            keys_, values_ = keys + here * D * slots, values + here * slots * V
            scores_, positions_ = scores + here * slots, positions + here * slots
            weights_, biases_, logits_ = weights + here * slots, biases + here * slots, logits + here * slots * G

            # insert, with score 0
            new_key = tl.load(key + (token * K + head) * D + d, mask=real_d)
            new_value = tl.load(value + (token * K + head) * V + v, mask=real_v)
            tl.store(keys_ + d * slots + slot, new_key, mask=real_d)
            tl.store(values_ + slot * V + v, new_value, mask=real_v)
            tl.store(scores_ + slot, 0.0)
            tl.store(positions_ + slot, now)
            if WEIGHTED:
                tl.store(weights_ + slot, tl.load(weight + here * T + t))
            if BIASED:
                tl.store(biases_ + slot, tl.load(bias + here * T + t))
            tl.debug_barrier()  # the slot is written before it is read

            # attend to the cached tokens: softmax online, logits kept for the scores
            heads = token * K * G + head * G + g
            q = tl.load(query + heads[:, None] * D + d, mask=real_g[:, None] & real_d, other=0.0)
            peak = tl.full([PADDED_G], float("-inf"), q.dtype)
            total = tl.zeros([PADDED_G], q.dtype)
            attended = tl.zeros([PADDED_G, PADDED_V], q.dtype)
            for begin in range(0, used, TILE):
                n = begin + tl.arange(0, TILE)
                filled = n < used
                if HOLES:
                    filled = tl.load(positions_ + n, mask=filled, other=-1) >= 0
                k_tile = tl.load(keys_ + d[:, None] * slots + n, mask=real_d[:, None] & filled, other=0.0)
                v_tile = tl.load(values_ + n[:, None] * V + v, mask=filled[:, None] & real_v, other=0.0)
                product = q[:, :, None] * k_tile
                if PADDED_G >= 16:  # where Triton would make a matrix product of the sum, which rounds to TF32
                    product = tl.where(filled, product, 0.0)
                logit = tl.where(filled, tl.sum(product, axis=1), float("-inf"))
                if SCORED:
                    tl.store(logits_ + g[:, None] * slots + n, logit, mask=real_g[:, None] & filled)
                higher = tl.maximum(peak, tl.max(logit, axis=1))  # finite: a tile has a filled slot,
                base = higher
                if HOLES:  # or not
                    base = tl.where(higher > float("-inf"), higher, 0.0)
                shrink = tl.exp(peak - base)
                power = tl.exp(logit - base[:, None])
                total = total * shrink + tl.sum(power, axis=1)
                product = power[:, :, None] * v_tile
                if PADDED_G >= 16:
                    product = tl.where(filled[:, None], product, 0.0)
                attended = attended * shrink[:, None] + tl.sum(product, axis=1)
                peak = higher
            tl.store(output + heads[:, None] * V + v, attended / total[:, None], mask=real_g[:, None] & real_v)
            tl.debug_barrier()  # the logits are written before they are read

            # score, rank, and look for who goes; what the last head finds holds for all that share a kept set
            least = tl.full([WIDE_TILE], float("inf"), q.dtype)
            oldest = tl.full([WIDE_TILE], 2**62, tl.int64)
            for begin in range(0, used, WIDE_TILE):
                n = begin + tl.arange(0, WIDE_TILE)
                position = tl.load(positions_ + n, mask=n < used, other=-1)
                filled = position >= 0
                if HOLES:
                    hole = tl.minimum(hole, tl.where(filled, used, n))
                score = tl.load(scores_ + n, mask=filled, other=0.0)
                if SCORED:
                    mask = real_g[:, None] & filled
                    logit = tl.load(logits_ + g[:, None] * slots + n, mask=mask, other=float("-inf"))
                    p = tl.exp(logit - peak[:, None]) / total[:, None]
                    if COUNTED:
                        p = (p * count.to(p.dtype) >= SHARE).to(p.dtype)
                    score = row_factor * score + tl.sum(p, axis=0)
                priority = score
                if BY_AGE:
                    priority = priority / tl.load(terms + (now - position), mask=filled, other=1.0)
                if WEIGHTED:
                    priority = priority * tl.load(weights_ + n, mask=filled, other=0.0)
                if BIASED:
                    priority = priority + tl.load(biases_ + n, mask=filled, other=0.0)
                if HEADS > 1:  # noqa: SIM102 (settled when compiled, the next is not)
                    if here > first:  # the sum over heads ranks as their mean does
                        priority += tl.load(ranks + n, mask=filled, other=0.0)
                # Several threads may hold a copy of the same element. All of them read the old score before one writes
                # the new one; a copy that read it later would count this token twice and choose another victim.
                tl.debug_barrier()
                if SCORED:
                    tl.store(scores_ + n, score, mask=filled)
                if RANKED:
                    tl.store(ranks + n, priority, mask=filled)
                free = filled & (position >= row_sinks) & (position <= now - row_recent)
                least, oldest, victim = _better(priority, position, free, n, least, oldest, victim)

        # evict; the next token goes to the slot that was vacated last, another empty one, or a new one
        slot = used
        if HOLES:
            slot = tl.min(hole, axis=0)
        excess = tl.where(count > row_budget + spare, count - row_budget, 0)
        # Triton 3.5 to 3.7 take a variable that bounds a loop and does no more for unchanging; this keeps `count` alive
        event = begun + t + 1 - count  # tokens that went so far
        for e in range(excess):
            if HOLES:
                tl.debug_barrier()  # positions are read before one is taken away, priorities written before they are read
                if e > 0:
                    least = tl.full([WIDE_TILE], float("inf"), least.dtype)
                    oldest = tl.full([WIDE_TILE], 2**62, tl.int64)
                    for begin in range(0, used, WIDE_TILE):
                        n = begin + tl.arange(0, WIDE_TILE)
                        position = tl.load(positions + first * slots + n, mask=n < used, other=-1)
                        free = (position >= row_sinks) & (position <= now - row_recent)  # an empty slot's is -1
                        priority = tl.load(ranks + n, mask=free, other=0.0)
                        least, oldest, victim = _better(priority, position, free, n, least, oldest, victim)
                    tl.debug_barrier()
            oldest = tl.where(least == tl.min(least, axis=0), oldest, 2**62)
            leaves = tl.min(oldest, axis=0)
            slot = tl.max(tl.where(oldest == leaves, victim, 0), axis=0)
            for here in range(first, first + HEADS):
                tl.store(gone + (here * events + event + e) * 2, t)
                tl.store(gone + (here * events + event + e) * 2 + 1, leaves.to(tl.int32))
                if HOLES:
                    tl.store(positions + here * slots + slot, -1)
        count -= excess
        tl.debug_barrier()  # scores are written and read before the next token takes the vacated slot

    if slot < used:
        for here in range(first, first + HEADS):
            tl.store(positions + here * slots + slot, -1)
