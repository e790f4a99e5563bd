"""The Triton kernel's own code: what one program does, token by token, in Triton's part of Python.

The rule is compiled in: what it does not use costs nothing. `a2sf.engine.kernels.gpu.launch` launches it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


NUMBERS = ("T", "spare", "ages", "events", "K", "one")
OF_ROWS = ("members", "cached", "seen", "length", "budget", "recent", "sinks", "factor")


def _jit(*numbers: str, of_rows: Sequence[str] = ()) -> Callable[[Any], Any]:
    """Compile a function once for all values of `numbers`, and for all alignments of the tensors `of_rows`.

    By default Triton compiles one for 1, one for multiples of 16, one for aligned tensors, ...: seconds each, and the
    self-check (`a2sf.engine.kernels.gpu.self_check`) could run another one than the call.
    """
    if triton is None:
        return lambda function: function
    return triton.jit(do_not_specialize=list(numbers), do_not_specialize_on_alignment=list(of_rows))


@_jit()
def _better(priority, position, free, n, least, oldest, victim):
    """The least priority of each lane so far, its position (ties: the oldest) and slot, after slots `n`."""
    priority = tl.where(priority == priority, priority, float("inf"))  # NaN goes last
    better = free & ((priority < least) | ((priority == least) & (position < oldest)))
    return tl.where(better, priority, least), tl.where(better, position, oldest), tl.where(better, n, victim)


@_jit(*NUMBERS, of_rows=OF_ROWS)
def recursion(
    members,  # int64 [programs * HEADS / K], the rows of this launch
    query,  # [B, T, K, SIZES, PADDED_G], times the scale
    key,  # [B, T, K, D]
    value,  # [B, T, K, V]
    weight,  # [B, K, T], `m` of the new tokens
    bias,  # [B, K, T], and `b`
    output,  # [B, T, H, V]
    evicted,  # int32 [B, K, events, 2], column and position of each eviction
    keys,  # [B, K, slots / 32, SIZES, 32], the slot buffer: in and out, in any order of position
    values,  # [B, K, slots, V]
    scores,  # [B, K, slots]
    positions,  # int64 [B, K, slots]
    weights,  # [B, K, slots]
    biases,  # [B, K, slots]
    powers,  # [B, K, slots, PADDED_G], scratch: logits, then shares of attention
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
    K,
    one,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    PADDED_G: tl.constexpr,  # powers of two
    PADDED_D: tl.constexpr,
    PADDED_V: tl.constexpr,
    SIZES: tl.constexpr,  # D, up to a multiple of AT_ONCE; zeros beyond D
    AT_ONCE: tl.constexpr,  # loads that wait for nothing but memory, while attending; divides TILE
    TILE: tl.constexpr,  # slots at a time, 32 or a multiple that divides `slots`
    HEADS: tl.constexpr,  # KV heads of a program: one, or all that retain the same tokens
    HOLES: tl.constexpr,  # whether several tokens may be evicted at once, so that empty slots lie between filled ones
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
    program = tl.program_id(0) * HEADS
    row = tl.load(members + program // K)
    first = row * K + program % K  # the program's first KV head, counted through all rows
    ranks += first // HEADS * slots
    terms += row * ages

    first_position = tl.load(seen + row)
    row_length, row_budget = tl.load(length + row), tl.load(budget + row)
    row_recent, row_sinks = tl.load(recent + row), tl.load(sinks + row)
    row_factor = tl.load(factor + row)

    g, lane = tl.arange(0, PADDED_G), tl.arange(0, TILE)
    # If Triton knew of the neighbours here, a thread would load several together, only to hand them to other threads.
    d, v = tl.arange(0, PADDED_D) * one, tl.arange(0, PADDED_V) * one
    real_d, real_v = d < D, v < V
    begun = tl.load(cached + first)
    count = begun  # of cached tokens
    used = begun  # slots from this one on are empty
    slot = begun  # where the next token goes

    for t in range(row_length):
        token = row * T + t
        now = first_position + t
        count += 1
        used = tl.maximum(used, slot + 1)
        # the least priority among the unprotected (ties: the oldest), and the first empty slot; per lane first
        least = tl.full([TILE], float("inf"), row_factor.dtype)
        oldest = tl.full([TILE], 2**62, tl.int64)
        victim = tl.zeros([TILE], tl.int64)
        hole = tl.zeros([TILE], tl.int64) + used

        for here in range(first, first + HEADS):
            head = here % K
            keys_, values_ = keys + here * slots * SIZES, values + here * slots * V
            scores_, positions_ = scores + here * slots, positions + here * slots
            weights_, biases_, powers_ = weights + here * slots, biases + here * slots, powers + here * slots * PADDED_G

            # insert, with score 0
            new_key = tl.load(key + (token * K + head) * D + d, mask=real_d)
            new_value = tl.load(value + (token * K + head) * V + v, mask=real_v)
            tl.store(keys_ + slot // 32 * 32 * SIZES + d * 32 + slot % 32, new_key, mask=real_d)
            tl.store(values_ + slot * V + v, new_value, mask=real_v)
            tl.store(scores_ + slot, 0.0)
            tl.store(positions_ + slot, now)
            if WEIGHTED:
                tl.store(weights_ + slot, tl.load(weight + here * T + t))
            if BIASED:
                tl.store(biases_ + slot, tl.load(bias + here * T + t))
            tl.debug_barrier()  # the slot is written before it is read

            # logits of the cached tokens, a slot a thread; each thread's softmax by itself, together at the end
            q_ = query + (token * K + head) * SIZES * PADDED_G + g
            peaks = tl.full([PADDED_G, TILE], float("-inf"), row_factor.dtype)
            totals = tl.zeros([PADDED_G, TILE], row_factor.dtype)
            for begin in range(0, used, TILE):
                n = begin + lane
                k_ = keys_ + n // 32 * 32 * SIZES + n % 32
                logit = tl.zeros([PADDED_G, TILE], row_factor.dtype)
                for part in range(0, SIZES, AT_ONCE):
                    for i in tl.static_range(AT_ONCE):
                        q = tl.load(q_ + (part + i) * PADDED_G)
                        logit += q[:, None] * tl.load(k_ + (part + i) * 32)[None, :]
                filled = n < used
                if HOLES:
                    filled = tl.load(positions_ + n) >= 0
                logit = tl.where(filled[None, :], logit, float("-inf"))
                tl.store(powers_ + n[None, :] * PADDED_G + g[:, None], logit)
                higher = tl.maximum(peaks, logit)
                base = tl.where(higher > float("-inf"), higher, 0.0)
                totals = totals * tl.exp(peaks - base) + tl.exp(logit - base)
                peaks = higher
            peak = tl.max(peaks, axis=1)  # finite: a token was just inserted
            total = tl.sum(totals * tl.exp(peaks - peak[:, None]), axis=1)
            tl.debug_barrier()  # the logits are written before they are read

            # score, rank, and look for what is evicted; what the last head finds holds for all that share it
            least = tl.full([TILE], float("inf"), row_factor.dtype)
            oldest = tl.full([TILE], 2**62, tl.int64)
            for begin in range(0, used, TILE):
                n = begin + lane
                place = powers_ + n[None, :] * PADDED_G + g[:, None]
                p = tl.exp(tl.load(place) - peak[:, None]) / total[:, None]
                position = tl.load(positions_ + n)
                filled = position >= 0
                if HOLES:
                    hole = tl.minimum(hole, tl.where(filled, used, n))
                score = tl.load(scores_ + n)
                if SCORED:
                    counted = p
                    if COUNTED:
                        counted = (p * count.to(p.dtype) >= SHARE).to(p.dtype)
                    if G < PADDED_G:
                        counted = tl.where(g[:, None] < G, counted, 0.0)
                    score = tl.where(filled, row_factor * score + tl.sum(counted, axis=0), 0.0)
                priority = score
                if BY_AGE:
                    priority = priority / tl.load(terms + (now - position), mask=filled, other=1.0)
                if WEIGHTED:
                    priority = priority * tl.load(weights_ + n)
                if BIASED:
                    priority = priority + tl.load(biases_ + n)
                if HEADS > 1:  # noqa: SIM102 (settled when compiled, the next is not)
                    if here > first:  # the sum over heads ranks as their mean does
                        priority += tl.load(ranks + n)
                # Several threads may hold a copy of the same element. All of them read what was there before one writes
                # anew; a copy that read it later would count this token twice and choose another victim.
                tl.debug_barrier()
                tl.store(place, p)
                if SCORED:
                    tl.store(scores_ + n, score)
                if RANKED:
                    tl.store(ranks + n, priority)
                free = filled & (position >= row_sinks) & (position <= now - row_recent)
                least, oldest, victim = _better(priority, position, free, n, least, oldest, victim)
            tl.debug_barrier()  # the shares of attention are written before they are read

            # attend
            attended = tl.zeros([PADDED_G, PADDED_V], row_factor.dtype)
            for begin in range(0, used, AT_ONCE):
                for i in tl.static_range(AT_ONCE):
                    n = begin + i
                    real = real_v
                    if HOLES:
                        real = real_v & (tl.load(positions_ + n + tl.zeros([PADDED_V], tl.int64)) >= 0)
                    p = tl.load(powers_ + n * PADDED_G + g)
                    attended += p[:, None] * tl.load(values_ + n * V + v, mask=real, other=0.0)[None, :]
            place = output + (token * K * G + head * G + g[:, None]) * V + v[None, :]
            tl.store(place, attended, mask=(g[:, None] < G) & real_v[None, :])

        # evict; the next token goes to the slot that was vacated last, another empty one, or a new one
        slot = used
        if HOLES:
            slot = tl.min(hole, axis=0)
        excess = tl.where(count > row_budget + spare, count - row_budget, 0)
        # Triton 3.5 to 3.7 take a variable that bounds a loop and does no more for unchanging; this keeps `count` alive
        event = begun + t + 1 - count  # evictions so far
        for e in range(excess):
            if HOLES:
                tl.debug_barrier()  # positions are read before one is taken away, priorities written before they are read
                if e > 0:
                    least = tl.full([TILE], float("inf"), least.dtype)
                    oldest = tl.full([TILE], 2**62, tl.int64)
                    for begin in range(0, used, TILE):
                        n = begin + tl.arange(0, TILE)
                        position = tl.load(positions + first * slots + n, mask=n < used, other=-1)
                        free = (position >= row_sinks) & (position <= now - row_recent)  # an empty slot's is -1
                        priority = tl.load(ranks + n, mask=free, other=0.0)
                        least, oldest, victim = _better(priority, position, free, n, least, oldest, victim)
                    tl.debug_barrier()
            oldest = tl.where(least == tl.min(least, axis=0), oldest, 2**62)
            leaves = tl.min(oldest, axis=0)
            slot = tl.max(tl.where(oldest == leaves, victim, 0), axis=0)
            for here in range(first, first + HEADS):
                tl.store(evicted + (here * events + event + e) * 2, t)
                tl.store(evicted + (here * events + event + e) * 2 + 1, leaves.to(tl.int32))
                if HOLES:
                    tl.store(positions + here * slots + slot, -1)
        count -= excess
        tl.debug_barrier()  # scores are written and read before the next token takes the vacated slot

    if slot < used:
        for here in range(first, first + HEADS):
            tl.store(positions + here * slots + slot, -1)
