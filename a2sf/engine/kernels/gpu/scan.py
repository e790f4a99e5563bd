"""The scan: which cached token goes at which step. Exact eviction, token by token, in Triton.

A logit does not depend on what is evicted. Only which tokens a softmax runs over does. So a chunk of a row's tokens is four
launches, of which one walks from token to token. Its columns are the tokens that are cached when the chunk begins (slots),
then the chunk's own tokens, both in order of position.

1. `shares` (products.py), a matrix product: `E[t, c] = 2 ** (logit[t, c] - the largest logit of token t + 100)`.
2. `scan` (here), for each row and KV head. At step t the attention is `p[c] = E[t, c] / sum of E[t] over what is alive`, the
   scores are `A = a A + p` summed over the query heads, and the column of the smallest priority `b + m A / N` goes:
   `died[c] = t`. All of it stays in registers: `E` is read once, and nothing of its size is written.
3. `attend` (products.py), attention as usual with one more mask: token t sees the columns that have come and have not died.
4. `keep` (products.py): the keys and values of what is left, in order of position, are the slots of the next chunk.

How many tokens are cached after a step follows from the numbers (budget, recent, ...) alone, so that the CPU never waits for
the GPU. Sums underflow where all that is alive is 2**-180 of what is dead; then the chunk is walked once more, carefully.
"""

from __future__ import annotations

from a2sf.engine.kernels.gpu.jit import NEVER as _NEVER
from a2sf.engine.kernels.gpu.jit import constant, jit, tl
from a2sf.engine.kernels.gpu.products import shares_again
from a2sf.engine.priorities import SHARE as _SHARE

NEVER = constant(_NEVER)
SHARE = constant(_SHARE)
TINY = constant(2.0**-80)  # a sum below it may have lost what is alive


@jit()
def _smallest(rank, column, N: tl.constexpr):
    """The column of the smallest rank, of equal ranks the first."""
    if N <= 256:  # in one warp: two instructions
        return tl.min(tl.where(rank == tl.min(rank, axis=0), column, N), axis=0)
    return tl.min((rank.to(tl.int64) << 32) | column, axis=0).to(tl.int32)  # warps talk to each other once


@jit("n", "T", "K", "S", "spare")
def _walk(
    shares, table, limits, factor, fixed, positions, numbers, query, key, slot_keys, scale, n, T, K, S, spare,
    G: tl.constexpr, D: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, SEVERAL: tl.constexpr, SCORED: tl.constexpr,
    COUNT_ABOVE_UNIFORM: tl.constexpr, MEAN_OVER_AGE: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr,
    PADDED_K: tl.constexpr, PADDED_G: tl.constexpr, COMPILED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """All tokens of a chunk: A, N, m, b, positions, what is alive, when each column died, how many are alive, soundness."""
    first = tl.program_id(0) * HEADS  # this program's first KV head, counted through the rows
    of_row = table + first // K * 4
    row, done, held, tokens = tl.load(of_row), tl.load(of_row + 1), tl.load(of_row + 2), tl.load(of_row + 3)
    seen = tl.load(limits + row * 4) + done  # position of the chunk's first token
    budget, recent, sinks = tl.load(limits + row * 4 + 1), tl.load(limits + row * 4 + 2), tl.load(limits + row * 4 + 3)
    a = tl.load(factor + row)

    column, k, g = tl.arange(0, N), tl.arange(0, PADDED_K), tl.arange(0, PADDED_G)
    is_slot, born = column < held, column - held  # the step at which a column comes; below 0 for a slot
    real_k, head = (k < HEADS)[:, None], (k < HEADS)[:, None] & (g < G)[None, :]  # [K, 1], [K, G]
    position = tl.load(positions + first * N + column, mask=is_slot, other=-1)
    position = tl.where(is_slot | (born >= tokens), position, seen + born)
    count = tl.sum((is_slot & (position >= 0)).to(tl.int32), axis=0)
    alive = (position >= 0).to(tl.float32)  # what is to come as well: until then its share is 0
    died = tl.where(position >= 0, NEVER, -1)
    # the first step at which a column may go
    free = tl.where((position >= 0) & (position >= sinks), tl.maximum(born, position + recent - seen), NEVER)

    slot = numbers + (first + k[:, None]) * 4 * N + column[None, :]  # [K, N]
    ours = real_k & (is_slot & (position >= 0))[None, :]
    A = tl.load(slot, mask=ours, other=0.0)
    age, m, b = A, A, A
    if MEAN_OVER_AGE:
        age = tl.load(slot + N, mask=ours, other=0.0)
    new = fixed + ((row * K + first % K + k[:, None]) * 2).to(tl.int64) * T + (done + born)[None, :]
    comes = real_k & ((born >= 0) & (born < tokens))[None, :]
    if WEIGHTED:
        m = tl.load(slot + 2 * N, mask=ours, other=0.0) + tl.load(new, mask=comes, other=0.0)
    if BIASED:
        b = tl.load(slot + 3 * N, mask=ours, other=0.0) + tl.load(new + T, mask=comes, other=0.0)
    trouble = tl.where(head, 0.0, 0.0)
    lost = tl.sum((A != A).to(tl.int32), axis=1)  # scores that are NaN, for the careful walk as well

    # a token's shares are loaded two steps ahead; what is to come is not read (but in fours, as memory is read)
    group = ((first + k[:, None]) * G + g[None, :]).to(tl.int64) * n  # [K, G]
    line = shares + (group[:, :, None] * N + column[None, None, :])
    read_at = (column // 4 * 4 - held)[None, None, :]
    e = tl.zeros(line.shape, tl.float32)
    coming, later = e, e
    if SCORED:
        e = tl.load(line, mask=head[:, :, None] & (read_at <= 0), other=0.0)
        line += tl.where(tokens > 1, N, 0)
        coming = tl.load(line, mask=head[:, :, None] & (read_at <= 1), other=0.0)
    t = 0  # a variable of its own: LLVM would widen the loop's to 64 bits, and all that it meets
    for _ in range(tokens):
        count += 1
        if SCORED:
            line += tl.where(t + 2 < tokens, N, 0)
            later = tl.load(line, mask=head[:, :, None] & (read_at <= t + 2), other=0.0)
            total = tl.sum(e * alive[None, None, :], axis=2)  # [K, G]
            if CAREFUL:  # noqa: SIM102 (known when compiled, the next is not)
                if tl.min(tl.min(((total >= TINY) | (head == 0)).to(tl.int32), axis=1), axis=0) == 0:
                    start, here = (row * T + done).to(tl.int64), (alive > 0) & (born <= t)
                    e = shares_again(
                        query, key, slot_keys, start + t, start, first, k, g, head, born, here, held, scale, K, S, G, D
                    )
                    total = tl.sum(e, axis=2)
            if COMPILED:
                r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [total], tl.float32, True, 1)
            else:
                r = 1.0 / tl.where(head, total, 1.0)
            r = tl.where(head, r, 0.0)
            trouble += r  # huge once a sum is tiny, NaN once one is NaN
            p = e * r[:, :, None]
            if COUNT_ABOVE_UNIFORM:
                p = (p * count.to(tl.float32) >= SHARE).to(tl.float32)
            if CAREFUL:
                A = tl.where(born == t, 0.0, A)  # NaN that it met before it came
            A = a * A + tl.sum(p, axis=1)  # what is dead is added to in vain
        priority = A
        if MEAN_OVER_AGE:
            age = a * age + tl.where(born <= t, 1.0, 0.0)[None, :]
            priority = priority / tl.where(born <= t, age, 1.0)
        if WEIGHTED:
            priority *= m
        if BIASED:
            priority += b
        priority = tl.sum(priority, axis=0)  # over KV heads that share their tokens; the sum ranks as the mean does
        if CAREFUL or WEIGHTED or BIASED:
            priority = tl.where(priority == priority, priority, float("inf")) + 0.0  # NaN goes last; no -0
        rank = priority.to(tl.int32, bitcast=True)  # integers in the order of the numbers, if these are not negative
        if WEIGHTED or BIASED:
            rank = tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank)
        rank = tl.where(free <= t, rank, NEVER)
        excess = tl.where(count > budget + spare, count - budget, 0)
        if SEVERAL:
            goes = column < 0
            for _e in range(excess):
                goes = goes | (column == _smallest(tl.where(goes, NEVER, rank), column, N))
        else:
            goes = column == tl.where(excess > 0, _smallest(rank, column, N), N)
        alive = tl.where(goes, 0.0, alive)
        free = tl.where(goes, NEVER, free)
        died = tl.where(goes, t, died)
        count -= excess
        t += 1  # noqa: SIM113
        e, coming = coming, later
    sound = (tl.sum(tl.sum(trouble, axis=1), axis=0) < 1 / TINY) & (tl.sum(lost, axis=0) == 0)
    return A, age, m, b, position, alive, died, count, sound


@jit("n", "T", "K", "S", "spare")
def scan(
    shares,  # float32 [B, K, G, n, N]
    table,  # int32 [B, 4]: which of the batch's rows, tokens before the chunk, slots held, tokens of the chunk
    limits,  # int32 [rows, 4]: tokens seen before the first, budget, recent, sinks
    factor,  # float32 [rows]
    fixed,  # float32 [rows, K, 2, T]: `m` and `b` of the new tokens
    positions,  # int32 [B, K, N]: of the slots, ascending; -1 where one is empty
    numbers,  # float32 [B, K, 4, N]: of the slots, `A`, `N`, `m` and `b`
    positions_after,  # int32 [B, K, N], out: of the columns that are left
    numbers_after,  # float32 [B, K, 4, N], out
    kept,  # int32 [B, K, N], out: the columns that are left
    left,  # int32 [B, K], out: how many these are
    died,  # int32 [B, K, N], out: the step at which a column went; NEVER if it is left, -1 where there was none
    query, key, slot_keys, scale,  # [rows, T, K, G, D], [rows, T, K, D], [B, K, S, D]; read where sums are tiny
    n, T, K, S,
    spare,  # tokens beyond the budget that may be cached between two steps
    G: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    HEADS: tl.constexpr,  # KV heads of a program: 1, or K where they share their tokens
    SEVERAL: tl.constexpr,  # whether more than one may go in a step
    SCORED: tl.constexpr, COUNT_ABOVE_UNIFORM: tl.constexpr, MEAN_OVER_AGE: tl.constexpr,
    WEIGHTED: tl.constexpr, BIASED: tl.constexpr,
    PADDED_K: tl.constexpr, PADDED_G: tl.constexpr,  # powers of two
    COMPILED: tl.constexpr,  # not in Triton's interpreter
):  # fmt: skip
    A, age, m, b, position, alive, dead, count, sound = _walk(
        shares, table, limits, factor, fixed, positions, numbers, query, key, slot_keys, scale, n, T, K, S, spare, G, D, N,
        HEADS, SEVERAL, SCORED, COUNT_ABOVE_UNIFORM, MEAN_OVER_AGE, WEIGHTED, BIASED, PADDED_K, PADDED_G, COMPILED, False,
    )  # fmt: skip
    if not sound:
        A, age, m, b, position, alive, dead, count, sound = _walk(
            shares, table, limits, factor, fixed, positions, numbers, query, key, slot_keys, scale, n, T, K, S, spare, G, D,
            N, HEADS, SEVERAL, SCORED, COUNT_ABOVE_UNIFORM, MEAN_OVER_AGE, WEIGHTED, BIASED, PADDED_K, PADDED_G, COMPILED,
            True,
        )  # fmt: skip
    first, k, column = tl.program_id(0) * HEADS, tl.arange(0, PADDED_K)[:, None], tl.arange(0, N)
    real = (k < HEADS) & (column >= 0)[None, :]
    stays = real & (alive > 0)[None, :]
    at = (first + k) * N
    tl.store(died + at + column[None, :], dead[None, :], mask=real)
    tl.store(left + first + k, count, mask=k < HEADS)  # Triton 3.5 to 3.7 do not count what only bounds a loop
    place = tl.cumsum((alive > 0).to(tl.int32), axis=0) - 1
    tl.store(kept + at + place[None, :], column[None, :], mask=stays)
    tl.store(positions_after + at + place[None, :], position[None, :], mask=stays)
    tl.store(positions_after + at + column[None, :], -1, mask=real & (column >= count)[None, :])
    to = numbers_after + at * 4 + place[None, :]
    tl.store(to, A, mask=stays)
    if MEAN_OVER_AGE:
        tl.store(to + N, age, mask=stays)
    if WEIGHTED:
        tl.store(to + 2 * N, m, mask=stays)
    if BIASED:
        tl.store(to + 3 * N, b, mask=stays)
