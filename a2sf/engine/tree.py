"""From a tree of segments to batches of rows: how a backend that knows only rows is run, one depth of the tree at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Attended, AttentionCall, EvictionState, Made, Options, Segments, accumulation_dtype, once


@dataclass(frozen=True, kw_only=True)
class PaddedRows(BatchRetention):
    """Right-padded rows for one batched run of the recursion: what `by_depth` hands to a backend.

    Attributes (beside those of `BatchRetention`, here on the query's device):
        query: [B, H, T, D], key: [B, K, T, D], value: [B, K, T, V], in the dtype that `by_depth` packs in.
        length: int64 [B], on the query's device.
        lengths, budgets: the same numbers as lists, so that nobody waits for a GPU to read them.
        state: where to start from.
        counts: `state.counts` on the CPU, where it is known without waiting for a GPU.
        tables: what `once` has made for the same rows of other layers; None: nothing is shared.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    length: Tensor
    lengths: list[int]
    budgets: list[int]
    state: EvictionState
    counts: Tensor | None = None
    tables: dict[Hashable, Any] | None = None

    @property
    def positions(self) -> Tensor:
        """int64 [B, K, T], the position of each new token; -1 where a row is padded."""
        tokens = torch.arange(self.key.shape[2], device=self.key.device)
        at = (self.state.seen[:, None] + tokens).where(tokens < self.length[:, None], -1)
        return at[:, None].expand(self.key.shape[:3])

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, made once for all layers of a pass: it depends on no query, key, value or score."""
        return make() if self.tables is None else once(self.tables, key, make)

    def pick(self, rows: Tensor) -> PaddedRows:
        """The rows `rows` [B'] without the padding that they do not need."""
        T = max(1, int(self.length[rows].max()))
        changed: dict[str, Any] = {name: getattr(self, name)[rows, :, :T] for name in ("query", "key", "value")}
        changed |= BatchRetention.select(BatchRetention(**self.retention()), rows).retention()
        length = self.length[rows]
        changed |= {"length": length, "lengths": length.tolist(), "budgets": changed["budget"].tolist()}
        counts = None if self.counts is None else self.counts[rows.to(self.counts.device)]
        return replace(self, **changed, state=self.state.select(rows), counts=counts, tables=None)

    def blank_if_finished(self, x: Tensor | None) -> Tensor | None:
        """Queries [B, K, G, W, D] or memory [B, K, N, M] of the end states, 0 in rows whose rule is `rule_finished`."""
        if x is None:
            return None
        return x.masked_fill(self.rule_finished(self.state.seen + self.length).view(-1, *[1] * (x.ndim - 1)), 0)


@dataclass(frozen=True)
class RowResults:
    """What a backend gives for `PaddedRows`.

    Attributes:
        output: [B, H, T, V].
        state: the end states; None where the options ask for none and the backend saves that work.
        evictions: int64 [n, 4], every eviction: row, head, column of the step, position; None unless asked for.
        counts: `state.counts` on the CPU, where the backend knows it without waiting for a GPU.
    """

    output: Tensor
    state: EvictionState | None
    evictions: Tensor | None = None
    counts: Tensor | None = None

    @property
    def end(self) -> EvictionState:
        """The end states, which were asked for."""
        assert self.state is not None
        return self.state


RunRows = Callable[[PaddedRows, Options], RowResults]

PADDED = 0.1
"""Of the columns of one depth's rows, the share that may be padding without a second batch."""
WORTHWHILE = 4096
"""Columns of padding that a further batch must save: fewer cost less than its operations."""


def by_depth(run_rows: RunRows, call: AttentionCall, dtype: torch.dtype | None = None) -> Attended:
    """Run a backend that knows batches of rows on a tree of segments: all segments of one depth at once.

    Where short rows would be padded to the length of much longer ones, a depth is several batches of rows.

    Rows are packed in `dtype`; None: in the accumulation dtype. The end states' keys and values are in the same dtype.
    """
    query, key, value, segments, options, state = call
    B, H, T, _ = query.shape
    V = value.shape[-1]
    device, dtype = query.device, dtype or accumulation_dtype(query.dtype)
    output = query.new_zeros(B, T, H, V).transpose(1, 2)
    evictions: list[Tensor] = []
    above: tuple[EvictionState, Tensor | None] | None = None  # ends of the depth before, and their counts where known
    here: list[RowResults] = []  # of this depth
    returned: list[EvictionState] = []  # that are returned
    order: list[int] = []  # the segments in them

    # a given state may have read any number of tokens, which tables depend on
    levels = segments.once(("levels", T, device), lambda: _levels(segments, T, device))
    for number, level in enumerate(levels):
        if number and level.depth > levels[number - 1].depth:
            above, here = _stacked(here), []
        packed: dict[str, Any] = {
            name: x[level.row_at, :, level.column_at].transpose(1, 2).to(dtype)
            for name, x in (("query", query), ("key", key), ("value", value))
        }
        counts: Tensor | None = None
        if above is not None:
            assert level.parents is not None
            start = above[0].select(level.parents)
            counts = None if above[1] is None else above[1][level.parents]
        elif state is not None:
            start = state if level.parents is None else state.select(level.parents)
        else:
            start = EvictionState.empty(packed["key"], packed["value"], segments.rule, H // key.shape[1])
            counts = torch.zeros(len(level.ids), key.shape[1], dtype=torch.int64)
        tables = level.tables if state is None else None
        rows = PaddedRows(**level.numbers, **packed, state=start, counts=counts, tables=tables)
        wanted = options.return_state or level.depth < levels[-1].depth
        ran = run_rows(rows, replace(options, return_state=wanted))
        output[level.of_row, :, level.of_column] = ran.output.transpose(1, 2)[level.at, level.step].to(query.dtype)
        if ran.evictions is not None:
            segment, head, t, position = ran.evictions.unbind(1)
            evictions.append(torch.stack([level.row_at[segment, t], head, level.column_at[segment, t], position], 1))
        if wanted:
            here.append(replace(ran, output=ran.output[:0]))
        if options.return_state:
            at = [k for k, i in enumerate(level.ids) if segments.final is None or segments.final[i]]
            order += [level.ids[k] for k in at]
            returned += [ran.end if len(at) == len(level.ids) else ran.end.select(torch.tensor(at))] if at else []
    final = None
    if options.return_state:
        final = (
            returned[0] if len(returned) == 1 else EvictionState.stack(returned).select(torch.tensor(order).argsort())
        )
    if not options.trace:
        return Attended(output, final)
    return Attended(output, final, *traced(evictions, (B, key.shape[1], T), device))


def _stacked(ran: list[RowResults]) -> tuple[EvictionState, Tensor | None]:
    """End states of several batches as one, and their counts where they are known."""
    counts = [x.counts for x in ran if x.counts is not None]
    return EvictionState.stack([x.end for x in ran]), torch.cat(counts) if len(counts) == len(ran) else None


def traced(evictions: list[Tensor], shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Evictions [n, 4] as `Attended` has them: those of steps with one eviction, [B, K, T], and the others, [m, 4]."""
    returned = torch.cat([torch.empty(0, 4, dtype=torch.int64, device=device), *evictions])
    evicted = torch.full(shape, -1, dtype=torch.int32, device=device)
    step = (returned[:, 0] * shape[1] + returned[:, 1]) * shape[2] + returned[:, 2]
    _, of_step, times = step.unique(return_inverse=True, return_counts=True)
    single = times[of_step] == 1
    evicted.view(-1)[step[single]] = returned[single, 3].int()
    return evicted, returned[~single]


@dataclass(frozen=True)
class _Level:
    """Segments of one depth of a tree as rows, the same for every layer that reads them; tensors on its device.

    Attributes:
        depth: which depth; several levels may be of one.
        ids: which segments, and of each:
        parents: int64 [S'] on the CPU, the row of its parent among those of the depth before, or at the first depth its
            row in a given state; None: all of that state.
        row_at, column_at: int64 [S', T'], where its tokens are in the packed input; anything in the padding.
        of_row, of_column, at, step: int64 [n], the same for tokens that are no padding, and their places in the rows.
        numbers: what `PaddedRows` says of it in numbers: what it retains, and its tokens.
        tables: what backends make for these rows (`PaddedRows.once`).
    """

    depth: int
    ids: list[int]
    parents: Tensor | None
    row_at: Tensor
    column_at: Tensor
    of_row: Tensor
    of_column: Tensor
    at: Tensor
    step: Tensor
    numbers: dict[str, Any]
    tables: dict[Hashable, Any] = field(default_factory=dict)


def _levels(segments: Segments, T: int, device: torch.device) -> list[_Level]:
    """Each depth of the tree, in batches of rows of similar length.

    Few tensors go to a GPU, where each costs as much as a launch, and none is waited for.
    """
    place: dict[int, int] = {}  # of a segment at its depth
    levels: list[_Level] = []
    lengths = segments.length.tolist()
    roots = {i: at for at, i in enumerate(i for i, p in enumerate(segments.parent.tolist()) if p < 0)}
    batches = [
        (depth, ids) for depth, all_ids in enumerate(_depths(segments.parent)) for ids in _batches(all_ids, lengths)
    ]
    for depth, ids in batches:
        own = segments.select(torch.tensor(ids))
        offset = torch.arange(max(1, int(own.length.max())))
        real = offset < own.length[:, None]  # [S', T']
        row = own.row[:, None].expand_as(real)
        column = (own.start[:, None] + offset).clamp(max=T - 1)
        row_at, column_at = torch.stack([row, column]).to(device, non_blocking=True)
        of_real = torch.stack([row[real], column[real], *real.nonzero().unbind(1)])
        of_row, of_column, at, step = of_real.to(device, non_blocking=True)
        integers = {"budget": own.budget, "recent": own.recent, "sinks": own.sinks, "length": own.length}
        integers |= {} if own.prompt is None else {"prompt": own.prompt}
        numbers = own.retention() | {"lengths": own.length.tolist(), "budgets": own.budget.tolist()}
        numbers |= zip(integers, torch.stack(list(integers.values())).to(device, non_blocking=True), strict=True)
        numbers["forgetting_factor"] = own.forgetting_factor.to(device, non_blocking=True)
        if own.prepared is not None:
            numbers["prepared"] = own.prepared.to(device, non_blocking=True)
        rows = [roots[i] for i in ids] if not depth else [place[p] for p in own.parent.tolist()]
        levels.append(
            _Level(
                depth=depth,
                ids=ids,
                parents=torch.tensor(rows) if depth or len(ids) < len(roots) else None,
                row_at=row_at,
                column_at=column_at,
                of_row=of_row,
                of_column=of_column,
                at=at,
                step=step,
                numbers=numbers,
            )
        )
        before = sum(len(level.ids) for level in levels[:-1] if level.depth == depth)
        place |= {number: before + i for i, number in enumerate(ids)}
    return levels


def _batches(ids: list[int], lengths: list[int]) -> list[list[int]]:
    """Segments of one depth in batches of similar length, the longest first: as many as save much padding."""
    groups = [sorted(ids, key=lambda i: -lengths[i])]
    while True:
        padded = sum(len(group) * max(1, lengths[group[0]]) for group in groups)
        if padded - sum(lengths[i] for i in ids) <= PADDED * padded:
            break
        # of all places where a group can be divided, the one that saves the most
        saved, which, at = max(
            ((len(g) - at) * (lengths[g[0]] - lengths[g[at]]), n, at)
            for n, g in enumerate(groups)
            for at in range(len(g))
        )
        if saved < WORTHWHILE:
            break
        groups[which : which + 1] = [groups[which][:at], groups[which][at:]]
    return [sorted(group) for group in groups]


def _depths(parent: Tensor) -> list[list[int]]:
    """The segments of each depth."""
    depth: list[int] = []
    for p in parent.tolist():
        depth.append(0 if p < 0 else depth[p] + 1)
    return [[i for i, d in enumerate(depth) if d == level] for level in range(max(depth, default=-1) + 1)]
