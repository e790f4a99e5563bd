"""Rows of which no token is evicted, in plain torch: many tokens at a time.

It reads prompts and full caches of models with a softcap or learned sinks, which the compiled kernels do not know. What
torch multiplies has a shape that follows from a row's own numbers, as in `a2sf.engine.stepwise`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from a2sf.engine.priorities import added_scores
from a2sf.engine.state import EvictionState, Options
from a2sf.engine.tree import PaddedRows, RowResults

QUERIES = 64
"""Tokens that attend at a time."""
FEW = 16
"""Fewer tokens are read one by one, since `QUERIES` are always computed."""
LOGITS = 2**25
"""About how many logits are made at a time."""


def evict_nothing(rows: PaddedRows, options: Options) -> Tensor:
    """bool [B]: the rows that are read by `read_unevicted`, where the layer's softmax is not plain."""
    rule = rows.rule
    data = (
        rows.growth is None
        and not rule.calls
        and rule.precompute is None
        and rule.recording is None
        and rule.cut is None
    )
    if options.softmax.plain or not data or rule.threshold is not None or rows.schedule.prompt:
        return torch.zeros_like(rows.length, dtype=torch.bool)
    return (rows.length >= FEW) & (rows.state.counts.amax(-1) + rows.length <= rows.budget)


def rows_at_once(rows: PaddedRows, n: int) -> int:
    """How many rows of `n` slots may be read at a time."""
    return max(1, LOGITS // (rows.query.shape[1] * QUERIES * n))


def read_unevicted(rows: PaddedRows, n: int, options: Options) -> RowResults:
    """Read rows that evict nothing, with `n` slots for each of their heads."""
    B, H, T, _ = rows.query.shape
    K = rows.key.shape[1]
    state = _with_new_tokens(rows, n)
    factor = rows.per_head(K, rows.query.dtype).forgetting_factor  # it broadcasts with [B, K, n]
    output = rows.query.new_zeros(B, H, T, rows.value.shape[-1])
    scores = state.scores
    for first in range(0, T, QUERIES):
        query = rows.query[:, :, first : first + QUERIES]
        tokens = query.shape[2]
        query = torch.nn.functional.pad(query, (0, 0, 0, QUERIES - tokens)).unflatten(1, (K, H // K))
        column = torch.arange(first, first + QUERIES, device=query.device)
        now = (rows.state.seen[:, None] + column)[:, None, None, :, None]
        hidden = (state.positions[:, :, None, None] < 0) | (state.positions[:, :, None, None] > now)
        logits = product(query.flatten(2, 3) * options.scale, state.keys.transpose(2, 3))
        p = options.softmax(logits.unflatten(2, (-1, QUERIES)), hidden)  # [B, K, G, QUERIES, n]
        attended = product(p.flatten(2, 3), state.values).unflatten(2, (-1, QUERIES)).flatten(1, 2)
        real = column < rows.length[:, None]  # [B, QUERIES]
        output[:, :, first : first + tokens] = attended.where(real[:, None, :, None], 0)[:, :, :tokens]
        if rows.rule.scored:
            # what each query adds is forgotten at every later one of the row
            later = (real.sum(-1, keepdim=True) - 1 - torch.arange(QUERIES, device=real.device)).clamp(min=0)
            forgotten = (factor[..., None] ** later[:, None, :, None]).where(real[:, None, :, None], 0)
            seen = (~hidden).sum(-1)[:, :, 0, :, None]  # [B, K, QUERIES, 1]
            added = _added(rows, p, seen)
            scores = scores * factor ** real.sum(-1)[:, None, None] + (added * forgotten).sum(2)
    end = EvictionState(state.positions, scores, state.keys, state.values, rows.state.seen + rows.length).compact()
    none = torch.empty(0, 4, dtype=torch.int64, device=rows.query.device)
    return RowResults(output, end, none if options.trace else None)


def _added(rows: PaddedRows, p: Tensor, seen: Tensor) -> Tensor:
    """What each query adds to the scores, [B, K, QUERIES, n]; `seen` [B, K, QUERIES, 1]: tokens that it attends to."""
    B = p.shape[0]
    of_queries = p.permute(0, 3, 1, 2, 4).flatten(0, 1)  # [B * QUERIES, K, G, n]
    count = seen.transpose(1, 2).flatten(0, 1)
    return added_scores(rows.rule, of_queries, count).unflatten(0, (B, -1)).transpose(1, 2)


def _with_new_tokens(rows: PaddedRows, n: int) -> EvictionState:
    """The rows' states with the new tokens in the first free of `n` slots, with score 0."""
    (B, K, T, _), old = rows.key.shape, rows.state
    real = torch.arange(T, device=rows.key.device) < rows.length[:, None, None]
    slot = (old.counts[..., None] + torch.arange(T, device=rows.key.device)).where(real, n)  # `n`: none

    def placed(held: Tensor, entering: Tensor, fill: int = 0) -> Tensor:
        made = held.new_full((B, K, n + 1, *held.shape[3:]), fill)
        made[:, :, : min(n, held.shape[2])] = held[:, :, :n]
        at = slot if held.ndim == 3 else slot[..., None].expand(-1, -1, -1, held.shape[3])
        return made.scatter_(2, at, entering)[:, :, :n].contiguous()

    positions = placed(old.positions, rows.positions, -1)
    scores = placed(old.scores, old.scores.new_zeros(B, K, T))
    return EvictionState(positions, scores, placed(old.keys, rows.key), placed(old.values, rows.value), old.seen)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [B, K, X, Y] @ b [B, K, Y, Z]; at least two products at a time, because torch computes a single one otherwise."""
    B, K = a.shape[:2]
    left, right = a.flatten(0, 1), b.flatten(0, 1)
    if B * K == 1:
        left, right = left.expand(2, -1, -1), right.expand(2, -1, -1)
    return torch.bmm(left, right)[: B * K].unflatten(0, (B, K))
