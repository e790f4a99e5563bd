"""From a tree of segments to batches of rows: what a backend that knows rows is run on, one depth of the tree at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from a2sf.engine.state import Attended, EvictionState, Options, Segments, accumulation_dtype
from a2sf.policies.rule import Rule
from a2sf.policies.schedule import Schedule


@dataclass(frozen=True)
class Rows:
    """Right-padded rows for one batched run of the recursion: what `by_levels` hands to a backend.

    Attributes:
        query: [B, H, T, D], key: [B, K, T, D], value: [B, K, T, V], in the accumulation dtype.
        length, budget, recent, sinks, prompt: int64 [B]; forgetting_factor: float [B], all on the query's device. The
            prompt is 0 where the schedule does not ask for one.
        lengths, budgets: once more, for whoever would wait for a GPU to tell them.
        rule, schedule: as in `Segments`.
        state: where to start from.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    length: Tensor
    budget: Tensor
    recent: Tensor
    sinks: Tensor
    prompt: Tensor
    forgetting_factor: Tensor
    lengths: list[int]
    budgets: list[int]
    rule: Rule
    schedule: Schedule
    state: EvictionState


@dataclass(frozen=True)
class Ran:
    """What a backend gives for `Rows`.

    Attributes:
        output: [B, H, T, V].
        state: the end states; None where the options ask for none and a backend spares itself the work.
        gone: int64 [n, 4], every eviction: row, head, column of the step, position; None unless asked for.
    """

    output: Tensor
    state: EvictionState | None
    gone: Tensor | None = None

    @property
    def end(self) -> EvictionState:
        """The end states, which were asked for."""
        assert self.state is not None
        return self.state


RunRows = Callable[[Rows, Options], Ran]


def by_levels(
    run_rows: RunRows,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    options: Options,
    state: EvictionState | None,
) -> Attended:
    """Run a backend that knows batches of rows on a tree of segments: all segments of one depth at once."""
    B, H, T, _ = query.shape
    V = value.shape[-1]
    device, dtype = query.device, accumulation_dtype(query.dtype)
    output = query.new_zeros(B, T, H, V).transpose(1, 2)
    gone: list[Tensor] = []
    ends: list[EvictionState] = []  # of each depth
    order: list[int] = []  # the segments in them
    place: dict[int, int] = {}  # of a segment at its depth
    prompt = torch.zeros_like(segments.length) if segments.prompt is None else segments.prompt

    levels = _levels(segments.parent)
    for depth, ids in enumerate(levels):
        pick = torch.tensor(ids)
        length = segments.length[pick]
        offset = torch.arange(max(1, int(length.max())))
        real = offset < length[:, None]  # [S', T']
        row = segments.row[pick][:, None].expand_as(real)
        column = (segments.start[pick][:, None] + offset).clamp(max=T - 1)
        # few tensors go to a GPU, where each costs as much as a launch, and none is waited for
        row_at, column_at = torch.stack([row, column]).to(device, non_blocking=True)
        of_real = torch.stack([row[real], column[real], *real.nonzero().unbind(1)])
        of_row, of_column, at, step = of_real.to(device, non_blocking=True)
        of_rows = (segments.length, segments.budget, segments.recent, segments.sinks, prompt)
        numbers = torch.stack([x[pick] for x in of_rows]).to(device, non_blocking=True)

        parents = segments.parent[pick].tolist()
        packed = [x[row_at, :, column_at].transpose(1, 2).to(dtype) for x in (query, key, value)]
        if parents[0] >= 0:
            start = ends[-1].select(torch.tensor([place[p] for p in parents]))
        else:
            start = state if state is not None else empty_state(packed[1], packed[2], segments.rule)
        rows = Rows(
            query=packed[0],
            key=packed[1],
            value=packed[2],
            length=numbers[0],
            budget=numbers[1],
            recent=numbers[2],
            sinks=numbers[3],
            prompt=numbers[4],
            forgetting_factor=segments.forgetting_factor[pick].to(device, non_blocking=True),
            lengths=length.tolist(),
            budgets=segments.budget[pick].tolist(),
            rule=segments.rule,
            schedule=segments.schedule,
            state=start,
        )
        wanted = options.return_state or depth + 1 < len(levels)
        ran = run_rows(rows, replace(options, return_state=wanted))
        output[of_row, :, of_column] = ran.output.transpose(1, 2)[at, step].to(query.dtype)
        if ran.gone is not None:
            segment, head, t, position = ran.gone.unbind(1)
            gone.append(torch.stack([row_at[segment, t], head, column_at[segment, t], position], 1))
        if wanted:
            place = {number: i for i, number in enumerate(ids)}
            order += ids
            ends = [*ends, ran.end] if options.return_state else [ran.end]
    final = None
    if options.return_state:
        final = ends[0] if len(ends) == 1 else EvictionState.stack(ends).select(torch.tensor(order).argsort())
    if not options.trace:
        return Attended(output, final)
    none = torch.empty(0, 4, dtype=torch.int64, device=device)
    return Attended(output, final, *traced(torch.cat([none, *gone]), (B, key.shape[1], T)))


def traced(gone: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Every eviction, [n, 4], as `Attended` has it: those of steps with one eviction, [B, K, T], and the others, [m, 4]."""
    evicted = torch.full(shape, -1, dtype=torch.int32, device=gone.device)
    step = (gone[:, 0] * shape[1] + gone[:, 1]) * shape[2] + gone[:, 2]
    _, of_step, times = step.unique(return_inverse=True, return_counts=True)
    single = times[of_step] == 1
    evicted.view(-1)[step[single]] = gone[single, 3].int()
    return evicted, gone[~single]


def empty_state(key: Tensor, value: Tensor, rule: Rule) -> EvictionState:
    """Caches without a token, for rows of `key` [B, K, T, D] and `value` [B, K, T, V]."""
    B, K, _, D = key.shape
    return EvictionState(
        positions=torch.empty(B, K, 0, dtype=torch.int64, device=key.device),
        scores=key.new_empty(B, K, 0),
        keys=key.new_empty(B, K, 0, D),
        values=key.new_empty(B, K, 0, value.shape[-1]),
        seen=torch.zeros(B, dtype=torch.int64, device=key.device),
        memory=None if rule.priority_fn is None or rule.precompute is not None else key.new_empty(B, K, 0, rule.memory),
    )


def _levels(parent: Tensor) -> list[list[int]]:
    depth: list[int] = []
    for p in parent.tolist():
        depth.append(0 if p < 0 else depth[p] + 1)
    return [[i for i, d in enumerate(depth) if d == level] for level in range(max(depth, default=-1) + 1)]
