"""The eviction recursion: its state, its inputs, and the readable reference that every kernel is checked against.

For each token: insert, attend, score, evict (docs/semantics.md). Shapes, as suffixes or in brackets:
    B rows, H query heads, K key/value heads, T tokens, D key dimension, V value dimension, S segments, N cached slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Runs of tokens to attend, packed along the time axis; a run may continue the state another run ended with.

    A batch of rows is one segment per row without parents. Sequences that begin alike are a tree: the shared beginning
    is one segment, its continuations are children, and each child starts from a copy of its parent's state. A parent
    and a child may differ in budget, recent and sinks only if the parent has not evicted yet (invariant 6).

    Attributes (int64 tensors [S] on the CPU):
        row, start, length: the tokens `[row, start : start + length]` of the packed query, key and value.
        parent: index of the segment that this one continues, -1 for none. Parents come before their children.
        budget, recent, sinks: `C`, `r`, `s` of the recursion.
        forgetting_factor: float64 tensor [S].
    """

    row: Tensor
    start: Tensor
    length: Tensor
    parent: Tensor
    budget: Tensor
    recent: Tensor
    sinks: Tensor
    forgetting_factor: Tensor

    @property
    def count(self) -> int:
        return self.row.shape[0]


@dataclass(frozen=True)
class EvictionState:
    """What is cached after a step, for every row and KV head.

    Attributes:
        positions: int64 [B, K, N], kept positions in ascending order, -1 where a slot is empty (empty slots come last).
        scores: float32 [B, K, N], accumulated attention scores `A`, 0 where a slot is empty.
        keys: [B, K, N, D] and
        values: [B, K, N, V], in the engine's accumulation dtype (float32, or float64 for float64 inputs).
        seen: int64 [B], tokens read so far, which is the next token's position.
    """

    positions: Tensor
    scores: Tensor
    keys: Tensor
    values: Tensor
    seen: Tensor

    def select(self, rows: Tensor) -> EvictionState:
        """The state of `rows` [B'], in that order; a row may be taken several times (a fork) or left out."""
        return EvictionState(*(getattr(self, f.name)[rows.to(self.seen.device)] for f in fields(self)))

    def pad(self, slots: int) -> EvictionState:
        """The same state with at least `slots` slots per KV head."""
        more = slots - self.positions.shape[-1]
        if more <= 0:
            return self
        widen = torch.nn.functional.pad
        return replace(
            self,
            positions=widen(self.positions, (0, more), value=-1),
            scores=widen(self.scores, (0, more)),
            keys=widen(self.keys, (0, 0, 0, more)),
            values=widen(self.values, (0, 0, 0, more)),
        )

    @staticmethod
    def stack(states: list[EvictionState]) -> EvictionState:
        """Rows of several states as one batch."""
        slots = max(s.positions.shape[-1] for s in states)
        padded = [s.pad(slots) for s in states]
        return EvictionState(*(torch.cat([getattr(s, f.name) for s in padded]) for f in fields(EvictionState)))


@dataclass(frozen=True)
class Attended:
    """What attending a batch gives.

    Attributes:
        output: [B, H, T, V] in the query's dtype; 0 where no segment covers a token.
        state: final state, one row per segment; None unless asked for.
        evicted: int32 [B, K, T], the position evicted at each token's step, -1 where none was; None unless asked for.
    """

    output: Tensor
    state: EvictionState | None = None
    evicted: Tensor | None = None


@dataclass(frozen=True)
class Options:
    """What to return beside the output, and how to scale the logits."""

    scale: float
    return_state: bool = False
    trace: bool = False


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed in float32 (invariant 8)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: Options, state: EvictionState | None = None
) -> Attended:
    """The recursion, one token at a time over all rows and heads; slow, readable, the oracle of the kernels.

    Args:
        query: [B, H, T, D].
        key: [B, K, T, D] and
        value: [B, K, T, V], any floating dtype and strides.
        segments: what to attend (see `Segments`).
        state: the state the parentless segments start from, one row per segment; None: empty caches.
    """
    return by_levels(_reference_rows, query, key, value, segments, options, state)


@dataclass(frozen=True)
class Rows:
    """Right-padded rows for one batched run of the recursion: what `by_levels` hands to a backend.

    Attributes:
        query: [B, H, T, D], key: [B, K, T, D], value: [B, K, T, V], in the accumulation dtype.
        length, budget, recent, sinks: int64 [B]; forgetting_factor: float [B], all on the query's device.
        state: where to start from, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    length: Tensor
    budget: Tensor
    recent: Tensor
    sinks: Tensor
    forgetting_factor: Tensor
    state: EvictionState | None


def _reference_rows(rows: Rows, scale: float) -> tuple[Tensor, EvictionState, Tensor]:
    query, device = rows.query, rows.query.device
    B, H, T, D = query.shape
    K = rows.key.shape[1]
    grouped = query.reshape(B, K, H // K, T, D)
    factor = rows.forgetting_factor.to(query.dtype)[:, None, None]
    budget, recent, sinks = (x[:, None, None] for x in (rows.budget, rows.recent, rows.sinks))

    # one column per token that is or may come to be cached: the given state's, then the new ones
    old = rows.state or empty_state(rows)
    past = old.positions.shape[-1]
    keys = torch.cat([old.keys, rows.key], dim=2)
    values = torch.cat([old.values, rows.value], dim=2)
    new_positions = (old.seen[:, None] + torch.arange(T, device=device))[:, None].expand(B, K, T)
    position = torch.cat([old.positions, new_positions], dim=2)
    alive = torch.cat([old.positions >= 0, torch.zeros_like(new_positions, dtype=torch.bool)], dim=2)
    score = torch.cat([old.scores.to(query.dtype), query.new_zeros(B, K, T)], dim=2)

    output = query.new_zeros(B, H, T, rows.value.shape[-1])
    evicted = torch.full((B, K, T), -1, dtype=torch.int32, device=device)
    for t in range(T):
        n = past + t + 1  # columns that exist by now
        going = (t < rows.length)[:, None, None]  # rows that have a token here
        # insert, with score 0
        alive[:, :, n - 1 : n] = going
        cached = alive[:, :, :n]
        # attend to the cached tokens
        logits = torch.einsum("bkgd,bknd->bkgn", grouped[:, :, :, t], keys[:, :, :n]) * scale
        p = logits.masked_fill(~cached[:, :, None], -torch.inf).softmax(-1)
        attended = torch.einsum("bkgn,bknv->bkgv", p, values[:, :, :n]).reshape(B, H, -1)
        output[:, :, t] = torch.where(going, attended, 0)
        # score
        score[:, :, :n] = torch.where(going & cached, factor * score[:, :, :n] + p.sum(2), score[:, :, :n])
        # evict the least score among the unprotected, the oldest of equals
        now = position[:, :, n - 1 : n]
        free = cached & (position[:, :, :n] >= sinks) & (position[:, :, :n] <= now - recent)
        victim = score[:, :, :n].masked_fill(~free, torch.inf).argmin(-1, keepdim=True)
        crowded = going & (cached.sum(-1, keepdim=True) > budget)
        alive[:, :, :n].scatter_(2, victim, cached.gather(2, victim) & ~crowded)
        evicted[:, :, t : t + 1] = torch.where(crowded, position.gather(2, victim), -1).int()

    # columns are in order of position: move the cached ones to the front
    slots = max(1, int(alive.sum(-1).max()))
    column = (~alive).int().argsort(dim=-1, stable=True)[:, :, :slots]
    kept = alive.gather(2, column)

    def cached_of(x: Tensor) -> Tensor:
        return torch.where(kept[..., None], x.gather(2, column[..., None].expand(-1, -1, -1, x.shape[-1])), 0)

    return (
        output,
        EvictionState(
            positions=torch.where(kept, position.gather(2, column), -1),
            scores=torch.where(kept, score.gather(2, column), 0).float(),
            keys=cached_of(keys),
            values=cached_of(values),
            seen=old.seen + rows.length,
        ),
        evicted,
    )


def empty_state(rows: Rows) -> EvictionState:
    """Caches without a token, for `rows`."""
    B, K, _, D = rows.key.shape
    kv, device = rows.key, rows.key.device
    return EvictionState(
        positions=torch.empty(B, K, 0, dtype=torch.int64, device=device),
        scores=torch.empty(B, K, 0, dtype=torch.float32, device=device),
        keys=kv.new_empty(B, K, 0, D),
        values=kv.new_empty(B, K, 0, rows.value.shape[-1]),
        seen=torch.zeros(B, dtype=torch.int64, device=device),
    )


RunRows = Callable[[Rows, float], tuple[Tensor, EvictionState, Tensor]]
"""A backend that knows batches of rows: `(rows, scale) -> (output [B, H, T, V], end state, evicted int32 [B, K, T])`."""


def by_levels(
    run_rows,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    options: Options,
    state: EvictionState | None,
) -> Attended:
    """Run a backend that knows batches of rows on a tree of segments: all segments of one depth at once."""
    B, H, T, _ = query.shape
    K, V = key.shape[1], value.shape[-1]
    device, dtype = query.device, accumulation_dtype(query.dtype)
    output = query.new_zeros(B, T, H, V).transpose(1, 2)
    evicted = torch.full((B, K, T), -1, dtype=torch.int32, device=device) if options.trace else None
    ends: list[EvictionState | None] = [None] * segments.count

    for ids in _levels(segments.parent):
        pick = torch.tensor(ids)
        length = segments.length[pick].to(device)
        offset = torch.arange(max(1, int(length.max())), device=device)
        real = offset < length[:, None]  # [S', T']
        row = segments.row[pick].to(device)[:, None].expand_as(real)
        column = (segments.start[pick].to(device)[:, None] + offset).clamp(max=T - 1)

        parents = segments.parent[pick].tolist()
        start = [ends[p] for p in parents] if parents[0] >= 0 else []
        packed = [x[row, :, column].transpose(1, 2).to(dtype) for x in (query, key, value)]
        rows = Rows(
            query=packed[0],
            key=packed[1],
            value=packed[2],
            length=length,
            budget=segments.budget[pick].to(device),
            recent=segments.recent[pick].to(device),
            sinks=segments.sinks[pick].to(device),
            forgetting_factor=segments.forgetting_factor[pick].to(device),
            state=EvictionState.stack([s for s in start if s is not None]) if start else state,
        )
        out, end, gone = run_rows(rows, options.scale)
        output[row[real], :, column[real]] = out.transpose(1, 2)[real].to(query.dtype)
        if evicted is not None:
            evicted[row[real], :, column[real]] = gone.transpose(1, 2)[real]
        for i, segment in enumerate(ids):
            ends[segment] = end.select(torch.tensor([i]))
    final = EvictionState.stack([s for s in ends if s is not None]) if options.return_state else None
    return Attended(output, final, evicted)


def _levels(parent: Tensor) -> list[list[int]]:
    depth: list[int] = []
    for p in parent.tolist():
        depth.append(0 if p < 0 else depth[p] + 1)
    return [[i for i, d in enumerate(depth) if d == level] for level in range(max(depth, default=-1) + 1)]
