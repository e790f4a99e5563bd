"""The launches around the scan (scan.py), and those that read a prompt: matrix products, tile by tile, in Triton.

Columns are the tokens that are cached already (`held` slots), then the chunk's own tokens; token `t` of the chunk comes at
step `t`. Tiles are fixed, so that a row's numbers do not depend on its batch: the last bits of a library's products do.
float16 and bfloat16 are multiplied as they are, and summed in float32; float32 is multiplied in float32, never in TF32.

Shapes: B rows of the launch, picked from the batch's `rows`; K KV heads, G query heads of each, T tokens, S slots.
`table` int32 [B, 4]: for each row of the launch, its number in the batch, its tokens before the chunk, its slots held, and
the chunk's tokens.
"""

from __future__ import annotations

from a2sf.engine.kernels.gpu.jit import NEVER as _NEVER
from a2sf.engine.kernels.gpu.jit import constant, jit, tl
from a2sf.engine.priorities import SHARE as _SHARE

NEVER = constant(_NEVER)
SHARE = constant(_SHARE)
OFFSET = constant(100.0)  # a token's largest share is 2 ** 100: room below it


@jit()
def _dot(a, b, sums, COMPILED: tl.constexpr):
    """`sums + a @ b`."""
    if COMPILED:
        return tl.dot(a, b, sums, input_precision="ieee")
    return tl.dot(
        a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee"
    )  # the interpreter's bfloat16 is wrong


@jit("K")
def _columns(new, slots, c, held, tokens, K, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Keys or values of the columns `c`, [c, PADDED]; `new` and `slots` point to the first of each kind."""
    d, at = tl.arange(0, PADDED)[None, :], c.to(tl.int64)[:, None]
    old, come, real = (c < held)[:, None], ((c >= held) & (c < held + tokens))[:, None], d < SIZE
    of_slots = tl.load(slots + at * SIZE + d, mask=old & real, other=0.0)
    return tl.where(old, of_slots, tl.load(new + (at - held) * K * SIZE + d, mask=come & real, other=0.0))


@jit("K")
def _queries(query, first, K, head, tokens, i, t, G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr):
    """Queries of tokens `t` and query heads `i` of a KV head, [t, PADDED_D], and which are there."""
    d, real = tl.arange(0, PADDED_D), (i < G) & (t < tokens)
    at = query + ((first + t).to(tl.int64) * K + head) * G * D + i * D
    return tl.load(at[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0), real


@jit("n", "T", "K", "S")
def shares(
    query,  # [rows, T, K, G, D]
    key,  # [rows, T, K, D]
    slot_keys,  # [B, K, S, D]
    table,
    out,  # float32 [B, K, G, n, N]: 2 ** (logit - the largest of the token + 100); 0 for tokens to come, in whole tiles
    scale,  # times log2(e)
    n, T, K, S,
    G: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PADDED_G: tl.constexpr, PADDED_D: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    b, head, block = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1) * TOKENS
    row, done = tl.load(table + b * 4), tl.load(table + b * 4 + 1)
    held, tokens = tl.load(table + b * 4 + 2), tl.load(table + b * 4 + 3)
    if block < tokens:
        i, t = tl.arange(0, PADDED_G * TOKENS) // TOKENS, block + tl.arange(0, PADDED_G * TOKENS) % TOKENS
        first = row * T + done
        q, real = _queries(query, first, K, head, tokens, i, t, G, D, PADDED_D)
        new = key + (first.to(tl.int64) * K + head) * D
        slots = slot_keys + (b * K + head).to(tl.int64) * S * D
        last = held + tl.minimum(block + TOKENS, tokens)  # columns that one of these tokens sees
        peak = tl.full([PADDED_G * TOKENS], -1e30, tl.float32)
        for begin in range(0, last, COLUMNS):
            c = begin + tl.arange(0, COLUMNS)
            k = _columns(new, slots, c, held, tokens, K, D, PADDED_D)
            logit = _dot(q, tl.trans(k), tl.zeros([PADDED_G * TOKENS, COLUMNS], tl.float32), COMPILED) * scale
            seen = (c - held)[None, :] <= t[:, None]
            peak = tl.maximum(peak, tl.max(tl.where(seen, logit, float("-inf")), axis=1))
        to = out + ((b * K + head).to(tl.int64) * G + i) * n * N + t * N
        for begin in range(0, last, COLUMNS):  # once more, which is cheaper than to store logits and read them again
            c = begin + tl.arange(0, COLUMNS)
            k = _columns(new, slots, c, held, tokens, K, D, PADDED_D)
            logit = _dot(q, tl.trans(k), tl.zeros([PADDED_G * TOKENS, COLUMNS], tl.float32), COMPILED) * scale
            seen = (c - held)[None, :] <= t[:, None]
            e = tl.where(seen, tl.exp2(logit - peak[:, None] + OFFSET), 0.0)
            tl.store(to[:, None] + c[None, :], e, mask=real[:, None] & (c < N)[None, :])


@jit("K", "S")
def shares_again(
    query, key, slot_keys, token, start, first, k, g, head, born, here, held, scale, K, S, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Shares of one token among the columns `here` alone, the largest 1, [k, g, columns]: for a scan that lost its sums.

    `token` and `start` number the token and the chunk's first one among all of the batch's; `first` is head 0 of `k`.
    """
    of_query = query + ((token * K + first % K + k[:, None]) * G + g[None, :]) * D
    of_slot = slot_keys + ((first + k[:, None]).to(tl.int64) * S + (born + held)[None, :]) * D
    of_key = tl.where((born < 0)[None, :], of_slot, key + ((start + born[None, :]) * K + first % K + k[:, None]) * D)
    real = here[None, :] & (tl.max(head.to(tl.int32), axis=1) > 0)[:, None]
    logit = tl.zeros([k.shape[0], g.shape[0], born.shape[0]], tl.float32)
    for d in range(D):
        q = tl.load(of_query + d, mask=head, other=0.0).to(tl.float32)
        logit += q[:, :, None] * tl.load(of_key + d, mask=real, other=0.0).to(tl.float32)[:, None, :]
    logit = tl.where(here[None, None, :], logit * scale, float("-inf"))
    return tl.exp2(logit - tl.max(logit, axis=2)[:, :, None])


@jit("W", "K")
def _attended(
    q, t, block, new_keys, new_values, slot_keys, slot_values, died, scale, held, tokens, W, K,
    D: tl.constexpr, V: tl.constexpr, PADDED_D: tl.constexpr, PADDED_V: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, COMPILED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The output of queries `q` and the logarithm of their sum, as FlashAttention has it."""
    ROWS: tl.constexpr = q.shape[0]
    peak, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    mean, poison = tl.zeros([ROWS, PADDED_V], tl.float32), tl.zeros([ROWS], tl.int32)
    for begin in range(0, held + tl.minimum(block + TOKENS, tokens), COLUMNS):
        c = begin + tl.arange(0, COLUMNS)
        end = tl.load(died + c, mask=c < W, other=NEVER)
        k = _columns(new_keys, slot_keys, c, held, tokens, K, D, PADDED_D)
        x = _columns(new_values, slot_values, c, held, tokens, K, V, PADDED_V)
        logit = _dot(q, tl.trans(k), tl.zeros([ROWS, COLUMNS], tl.float32), COMPILED) * scale
        seen = ((c - held)[None, :] <= t[:, None]) & (t[:, None] <= end[None, :]) & (c < held + tokens)[None, :]
        logit = tl.where(seen, logit, float("-inf"))
        higher = tl.maximum(peak, tl.max(logit, axis=1))
        p = tl.exp2(logit - higher[:, None])
        less = tl.exp2(peak - higher)
        total = total * less + tl.sum(p, axis=1)
        if CAREFUL:  # a value that is not finite reaches those that see it, and nobody else
            bad = x - x != 0
            poison = tl.maximum(
                poison, tl.max((seen & (tl.max(bad.to(tl.int32), axis=1) > 0)[None, :]).to(tl.int32), axis=1)
            )
            x = tl.where(bad, 0.0, x).to(x.dtype)
        mean *= less[:, None]
        if x.dtype == tl.float32:
            mean = _dot(p, x, mean, COMPILED)
        else:  # in two parts, so that no more than 2 ** -16 of a share is lost
            high = p.to(x.dtype)
            mean = _dot(high, x, mean, COMPILED)
            mean = _dot((p - high.to(tl.float32)).to(x.dtype), x, mean, COMPILED)
        peak = higher
    mean /= total[:, None]
    if CAREFUL:
        mean = tl.where((poison > 0)[:, None], float("nan"), mean)
    return mean, peak + tl.log2(total)


@jit("T", "K", "S", "W", "n")
def attend(
    query, key,
    value,  # [rows, T, K, V]
    slot_keys,
    slot_values,  # [B, K, S, V]
    table,
    died,  # int32 [B, K, W]: the last step that sees a column; later columns are seen to the end
    output,  # [rows, T, K, G, V], out
    sums,  # float32 [B, K, G, n], out: log2 of the sum of 2 ** logit
    scale, T, K, S, W, n,
    G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, PADDED_G: tl.constexpr, PADDED_D: tl.constexpr,
    PADDED_V: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, SUMS: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Attention of each token to the columns that have come and have not died: `born <= t <= died`."""
    b, head, block = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1) * TOKENS
    row, done = tl.load(table + b * 4), tl.load(table + b * 4 + 1)
    held, tokens = tl.load(table + b * 4 + 2), tl.load(table + b * 4 + 3)
    if block < tokens:
        i, t = tl.arange(0, PADDED_G * TOKENS) // TOKENS, block + tl.arange(0, PADDED_G * TOKENS) % TOKENS
        first = row * T + done
        q, real = _queries(query, first, K, head, tokens, i, t, G, D, PADDED_D)
        new_keys, new_values = key + (first.to(tl.int64) * K + head) * D, value + (first.to(tl.int64) * K + head) * V
        slots = (b * K + head).to(tl.int64) * S
        old_keys, old_values, ends = slot_keys + slots * D, slot_values + slots * V, died + (b * K + head) * W
        mean, sum_ = _attended(
            q, t, block, new_keys, new_values, old_keys, old_values, ends, scale, held, tokens, W, K, D, V, PADDED_D,
            PADDED_V, TOKENS, COLUMNS, COMPILED, False,
        )  # fmt: skip
        v = tl.arange(0, PADDED_V)
        mask = real[:, None] & (v < V)[None, :]
        if tl.max(tl.max(((mean - mean != 0) & mask).to(tl.int32), axis=1), axis=0) > 0:  # hardly ever
            mean, sum_ = _attended(
                q, t, block, new_keys, new_values, old_keys, old_values, ends, scale, held, tokens, W, K, D, V, PADDED_D,
                PADDED_V, TOKENS, COLUMNS, COMPILED, True,
            )  # fmt: skip
        at = output + ((first + t).to(tl.int64) * K + head) * G * V + i * V
        tl.store(at[:, None] + v[None, :], mean.to(output.dtype.element_ty), mask=mask)
        if SUMS:
            tl.store(sums + ((b * K + head).to(tl.int64) * G + i) * n + t, sum_, mask=real)


@jit("n", "T", "K", "S", "W")
def received(
    query, key, slot_keys, table,
    died,  # int32 [B, K, W], as in `attend`: -1 where a slot is empty
    sums,  # float32 [B, K, G, n], from `attend`
    powers,  # float32 [rows, >= n + 1], the forgetting factor to the power of 0, 1, ...
    scores,  # float32 [B, K, S + n], in and out: `A` of the slots, then of the new tokens
    scale, n, T, K, S, W,
    POWERS, G: tl.constexpr, D: tl.constexpr, PADDED_G: tl.constexpr, PADDED_D: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, COUNT_ABOVE_UNIFORM: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Scores where nothing is evicted: the attention that each column received, weighted by age; nothing is T x T."""
    b, head, begin = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1) * COLUMNS
    row, done = tl.load(table + b * 4), tl.load(table + b * 4 + 1)
    held, tokens = tl.load(table + b * 4 + 2), tl.load(table + b * 4 + 3)
    if begin < held + tokens:
        c = begin + tl.arange(0, COLUMNS)
        first = row * T + done
        new = key + (first.to(tl.int64) * K + head) * D
        k = _columns(new, slot_keys + (b * K + head).to(tl.int64) * S * D, c, held, tokens, K, D, PADDED_D)
        end = tl.load(died + (b * K + head) * W + c, mask=c < W, other=NEVER)
        empty = 0  # slots of this head
        if COUNT_ABOVE_UNIFORM:
            for s in range(0, held, COLUMNS):
                of_slot = s + tl.arange(0, COLUMNS)
                evicted = tl.load(died + (b * K + head) * W + of_slot, mask=of_slot < held, other=0) < 0
                empty += tl.sum(evicted.to(tl.int32), axis=0)
        added = tl.zeros([PADDED_G * TOKENS, COLUMNS], tl.float32)
        for block in range(tl.maximum(0, begin - held) // TOKENS * TOKENS, tokens, TOKENS):
            i, t = tl.arange(0, PADDED_G * TOKENS) // TOKENS, block + tl.arange(0, PADDED_G * TOKENS) % TOKENS
            q, real = _queries(query, first, K, head, tokens, i, t, G, D, PADDED_D)
            logit = _dot(q, tl.trans(k), tl.zeros([PADDED_G * TOKENS, COLUMNS], tl.float32), COMPILED) * scale
            sum_ = tl.load(sums + ((b * K + head).to(tl.int64) * G + i) * n + t, mask=real, other=0.0)
            seen = ((c - held)[None, :] <= t[:, None]) & (t[:, None] <= end[None, :]) & (c < held + tokens)[None, :]
            p = tl.where(seen & real[:, None], tl.exp2(logit - sum_[:, None]), 0.0)
            if COUNT_ABOVE_UNIFORM:
                p = (p * (held - empty + t + 1).to(tl.float32)[:, None] >= SHARE).to(tl.float32)
            later = tl.load(powers + row * POWERS + tokens - 1 - t, mask=t < tokens, other=0.0)
            added += p * later[:, None]
        at = scores + (b * K + head).to(tl.int64) * (S + n) + tl.where(c < held, c, S - held + c)
        before = tl.load(at, mask=c < held, other=0.0) * tl.load(powers + row * POWERS + tokens)
        tl.store(at, before + tl.sum(added, axis=0), mask=c < held + tokens)


@jit("T", "K", "S", "S_AFTER", "N")
def keep(
    key, value, slot_keys, slot_values, table,
    kept,  # int32 [B, K, N], from the scan
    left,  # int32 [B, K]
    keys_after,  # [B, K, S_AFTER, D], out
    values_after,  # [B, K, S_AFTER, V], out; 0 where a slot is empty
    T, K, S, S_AFTER, N,
    D: tl.constexpr, V: tl.constexpr, PADDED_D: tl.constexpr, PADDED_V: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Keys and values of the columns that are left."""
    b, head = tl.program_id(0) // K, tl.program_id(0) % K
    row, done = tl.load(table + b * 4), tl.load(table + b * 4 + 1)
    held, tokens = tl.load(table + b * 4 + 2), tl.load(table + b * 4 + 3)
    slot = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    filled = slot < tl.load(left + b * K + head)
    c = tl.load(kept + (b * K + head).to(tl.int64) * N + slot, mask=filled, other=NEVER - COLUMNS)
    first = ((row * T + done).to(tl.int64)) * K + head
    slots, after = (b * K + head).to(tl.int64) * S, ((b * K + head).to(tl.int64) * S_AFTER + slot)[:, None]
    d, v = tl.arange(0, PADDED_D)[None, :], tl.arange(0, PADDED_V)[None, :]
    k = _columns(key + first * D, slot_keys + slots * D, c, held, tokens, K, D, PADDED_D)
    tl.store(keys_after + after * D + d, k, mask=(slot < S_AFTER)[:, None] & (d < D))
    x = _columns(value + first * V, slot_values + slots * V, c, held, tokens, K, V, PADDED_V)
    tl.store(values_after + after * V + v, x, mask=(slot < S_AFTER)[:, None] & (v < V))
