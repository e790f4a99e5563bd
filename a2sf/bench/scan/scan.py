"""The scan on a CPU, written to be read: which cached token goes at which step, in plain loops that numba compiles.

A logit does not depend on what is evicted. Only which tokens a softmax runs over does. So some tokens of a sequence are
read together. The columns are the tokens that are cached before them, then the tokens themselves, in order of position.

1. A matrix product gives each token's logits to all columns, and `E = 2 ** (logit - the largest one of the token)`.
2. `scan` walks from token to token. At token t the attention is `p = E[t] / sum of E[t] over what is cached`, the scores are
   `A = a A + p`, and the column of the smallest priority `b + m A / N` goes: `died = t`. It writes `p` over `E[t]`.
3. A matrix product of `p` and the values is the output.
4. `keep` moves the columns that are left to the front, in their order.

The products are torch's (`columns.py`). `a2sf bench --only scan` measures all of it against the kernel of the CPU, which is
faster and therefore runs instead (docs/speed-details.md). This does less than the kernel: numbers that are not finite spoil
other tokens, and the last bits of a row depend on the other rows of its batch.

Shapes: B rows, K KV heads, G query heads of each, n tokens that are read together, W columns.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from a2sf.engine.priorities import SHARE

NEVER = 2**31 - 1
"""The step at which a token went that is cached."""
TINY = 1e-18
"""A sum of `E` that is smaller has lost digits, because nearly all attention went to tokens that are evicted."""
compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "nnan"})


@compiled
def whole(n):
    """`n` columns rounded up to vectors of 16: loops of the compiler's vectors are slow where some numbers are left."""
    return (n + 15) // 16 * 16


@compiled
def subtract_largest(thread, threads, logits, first):
    """Subtract the largest of each token's logits from them; logits to columns after the token become -inf.

    Of B * K * G heads it takes every one of `threads`, from `thread`; `first` is the column of the first token.
    """
    B, K, G, n, _ = logits.shape
    for i in range(thread, B * K * G, threads):
        for t in range(n):
            x, top = logits[i // (K * G), i // G % K, i % G, t], logits.dtype.type(-np.inf)
            for c in range(first + t + 1):
                top = max(top, x[c])
            for c in range(first + t + 1):
                x[c] -= top
            x[first + t + 1 :] = -np.inf


@compiled
def scan(thread, threads, shares, query, keys, positions, died, numbers, first, tokens, steps, limits, factor, spare, heads,
         scored, counted, by_age):  # fmt: skip
    """Walk from token to token: evict, and write attention over `E`.

    Args:
        thread, threads: of all items (a row and `heads` KV heads) it takes every one of `threads`, from `thread`.
        shares: [B, K, G, n, W], `E`.
        query: [B, K, G, n, D], scaled.
        keys, positions, died, numbers: see `Columns`.
        first: the column of the first of the n tokens.
        tokens: [B], how many of the n tokens each row reads.
        steps: [B], how many it has read before.
        limits: [B, 3], budget, recent, sinks.
        factor: [B], `a`.
        spare: tokens that may be cached beyond the budget between two steps.
        heads: KV heads that retain the same tokens.
        scored, counted, by_age: the parts of the rule (`Rule`).
    """
    (B, K, G, _, W), number = shares.shape, shares.dtype.type
    cached, protected, rank = np.empty(W, shares.dtype), np.empty(W, shares.dtype), np.empty(W, shares.dtype)
    for item in range(thread, B * K // heads, threads):
        row, k0, count, old = item * heads // K, item * heads % K, 0, 0
        (budget, recent, sinks), a = limits[row], factor[row]
        for c in range(W):  # a column to come is as if cached: its `E` is 0
            cached[c] = c >= first or died[row, k0, c] == NEVER
            count += c < first and died[row, k0, c] == NEVER
            protected[c] = np.inf
        for t in range(tokens[row]):
            end, count, now = whole(first + t + 1), count + 1, positions[row, k0, first + t]
            while old <= first + t and positions[row, k0, old] <= now - recent:
                protected[old] = 0 if cached[old] and positions[row, k0, old] >= sinks else np.inf
                old += 1
            for k in range(k0, k0 + heads):
                A, N, m, b = numbers[row, k]
                for g in range(G):
                    p, total = shares[row, k, g, t], number(0)
                    for c in range(end):
                        total += p[c] * cached[c]
                    if total < TINY:
                        total = shares_again(p, query[row, k, g, t], keys[row, k], cached, first + t + 1)
                    part, forget = number(1) / total, a if g == 0 else number(1)
                    for c in range(end):
                        p[c] *= cached[c] * part
                    if scored and counted:
                        for c in range(end):
                            A[c] = forget * A[c] + number(p[c] * count >= SHARE)
                    elif scored:
                        for c in range(end):
                            A[c] = forget * A[c] + p[c]
                if by_age:
                    N[first + t] = 0
                    for c in range(end):
                        N[c] = a * N[c] + number(1)
                if count > budget + spare:
                    for c in range(end):  # heads that retain the same tokens rank by their sum
                        rank[c] = (protected[c] if k == k0 else rank[c]) + (b[c] + m[c] * A[c] / N[c])
            for _ in range(count - budget if count > budget + spare else 0):
                least, goes = number(np.inf), 0
                for c in range(end):
                    least = min(least, rank[c])
                while goes < end - 1 and rank[goes] != least:  # of equal priorities, the oldest
                    goes += 1
                cached[goes], protected[goes], rank[goes] = 0, np.inf, np.inf
                died[row, k0 : k0 + heads, goes] = steps[row] + t
                count -= 1


@compiled
def shares_again(p, query, keys, cached, end):
    """`E` of one token among what is cached alone; returns its sum."""
    top, total = p.dtype.type(-np.inf), p.dtype.type(0)
    for c in range(end):
        p[c] = (query * keys[c]).sum()
        top = max(top, p[c]) if cached[c] else top
    for c in range(end):
        p[c] = 2 ** (p[c] - top) if cached[c] else 0
        total += p[c]
    return total


@compiled
def keep(used, keys, values, positions, died, numbers):
    """Move what is cached among the first `used` columns to the front; return the most columns of any head."""
    (B, K, _), most = positions.shape, 0
    for i in range(B * K):
        row, k, to = i // K, i % K, 0
        for c in range(used):
            if died[row, k, c] == NEVER:
                if to < c:
                    keys[row, k, to], values[row, k, to] = keys[row, k, c], values[row, k, c]
                    positions[row, k, to], numbers[row, k, :, to] = positions[row, k, c], numbers[row, k, :, c]
                to += 1
        died[row, k, :to], died[row, k, to:used], positions[row, k, to:used] = NEVER, -1, -1
        most = max(most, to)
    return most
