"""A pass over a packed row in parts, one forward call of the model each: fewer tokens are computed at a time.

A segment that is cut continues from its state at the end of the part before; only states that later parts need are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a2sf.engine.kernels import attend, backends_run
from a2sf.engine.state import EvictionState, Options, accumulation_dtype
from a2sf.hf.attention.errors import NonFiniteError
from a2sf.hf.attention.mixed import MixedPass
from a2sf.hf.attention.plan import Plan
from a2sf.hf.warned import caused_by
from a2sf.policies.rule import Rule

OF_PLAN = ("layers", "schedule", "policy_on_sliding", "backend", "rotary", "projections", "ran", "warned", "cached")
"""Fields that the parts of a plan have from it; what they note in `ran`, `warned` and `cached` is the plan's."""
States = dict[tuple[int, int, int], EvictionState]
"""Layer, call of the layer's attention, segment -> its state so far, one row."""


@dataclass
class PlanPart(Plan):
    """One part of a plan: some columns of its segments.

    Attributes:
        plan: the whole plan.
        plan_segments: for each segment of the part, its number in the plan.
        continued: for each segment of the part without a parent, the plan's segment whose state it continues; -1: none.
        needed_later: segments of the plan whose states later parts continue, or the caller wants.
        states: the newest states of the plan's segments; one dictionary for all parts.
        shapes: by layer and call of the layer's attention: KV heads, query heads of each, and sliding window.
    """

    plan: Plan | None = None
    plan_segments: Sequence[int] = ()
    continued: Sequence[int] = ()
    needed_later: Set[int] = frozenset()
    states: States = field(default_factory=dict)
    shapes: dict[tuple[int, int], tuple[int, int, int | None]] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options, window: int | None
    ) -> Tensor:
        try:
            return super().attend(layer, query, key, value, options, window)
        except NonFiniteError as error:
            raise NonFiniteError(error.where, error.dtype, [self.plan_segments[i] for i in error.rows]) from error

    def attend_finite(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options, window: int | None
    ) -> Tensor:
        segments = self.segments(layer, window)
        at = layer, self._calls[layer]
        self._calls[layer] += 1
        group = query.shape[1] // key.shape[1]
        self.shapes[at] = key.shape[1], group, window
        keep = [i for i, segment in enumerate(self.plan_segments) if segment in self.needed_later]
        with backends_run() as names, caused_by(self.warned):
            options = replace(
                self.options(layer, options), return_state=bool(keep) or segments.rule.threshold is not None
            )
            before = self._before(at, key, value, segments.rule, group)
            out = attend(query, key, value, segments, options, before, backend=self.backend)
        self.ran |= names
        self.reached.add(layer)
        self.note_cached(layer, at[1], segments, out.state)
        for segment in {*self.continued} - {*self.needed_later}:
            self.states.pop((*at, segment), None)
        for i in keep:
            assert out.state is not None
            self.states[(*at, self.plan_segments[i])] = out.state.row(i)
        return out.output

    def _before(self, at: tuple[int, int], key: Tensor, value: Tensor, rule: Rule, group: int) -> EvictionState | None:
        """The states that the part's first segments continue; None where all begin."""
        if all(i < 0 for i in self.continued):
            return None
        dtype = accumulation_dtype(key.dtype)
        empty = EvictionState.empty(key[:1].to(dtype), value[:1].to(dtype), rule, group)
        found = [empty if i < 0 else self.states[(*at, i)] for i in self.continued]
        return EvictionState.stack([s.for_rule(rule, group) for s in found])

    def _plan_segment(self, segment: int) -> int:
        return self.plan_segments[segment]

    def _tokens_through(self, segment: int) -> int:
        assert self.plan is not None
        return self.plan._tokens_through(self.plan_segments[segment])


def parts_of(
    plan: Plan, columns: np.ndarray, ends: Sequence[int], keep: bool = False
) -> list[tuple[PlanPart, np.ndarray]]:
    """A plan in parts that end at given columns of its row, each with the plan's tokens that it reads, int64.

    Args:
        columns: int64, where in the row each of the plan's tokens is; along a sequence they ascend.
        keep: whether the states in which the plan's sequences end stay in the parts' `states`; not those of sequences with
            a negative number, which are only looked at.
    """
    found: list[tuple[PlanPart, np.ndarray]] = []
    done = [0] * len(plan.start)  # tokens of each segment that earlier parts read
    states: States = {}
    shapes: dict[tuple[int, int], tuple[int, int, int | None]] = {}
    for end in ends:
        plan_segments: list[int] = []
        start, length, parent, continued = [], [], [], []
        tokens = [np.empty(0, np.int64)]
        place: dict[int, int] = {}
        size = 0
        for i, (first, n, up) in enumerate(zip(plan.start, plan.length, plan.parent, strict=True)):
            upto = int(np.searchsorted(columns[first : first + n], end))
            if upto == done[i]:
                continue
            place[i] = len(plan_segments)
            continues = i if done[i] else up
            inside = -1 if done[i] else place.get(up, -1)
            plan_segments.append(i)
            start.append(size)
            length.append(upto - done[i])
            parent.append(inside)
            if inside < 0:
                continued.append(continues)
            tokens.append(np.arange(first + done[i], first + upto))
            size += upto - done[i]
            done[i] = upto
        part = PlanPart(
            row=[0] * len(plan_segments),
            start=start,
            length=length,
            parent=parent,
            retention=_renumbered(plan.retention, plan_segments),
            prompt=None if plan.prompt is None else _renumbered(plan.prompt, plan_segments),
            plan=plan,
            plan_segments=plan_segments,
            continued=continued,
            states=states,
            shapes=shapes,
            **{name: getattr(plan, name) for name in OF_PLAN},
        )
        found.append((part, np.concatenate(tokens)))
    needed_later = frozenset(end for i, end in zip(plan.serves, plan.ends, strict=True) if keep and i >= 0)
    for part, _ in reversed(found):
        part.needed_later = needed_later
        needed_later |= {i for i in part.continued if i >= 0}
    return found


def _renumbered(of_segment: Callable[..., Any], plan_segments: Sequence[int]) -> Callable[..., Any]:
    """A function of the plan's segments, as one of the part's."""
    return lambda segment, *layer: of_segment(plan_segments[segment], *layer)


def mixed_parts_of(mixed: MixedPass, ends: Sequence[int], keep: bool = False) -> list[MixedPass]:
    """A pass of several plans in parts that end at columns of its row; `keep` as for `parts_of`."""
    of_plans = [parts_of(p, c.cpu().numpy(), ends, keep) for p, c in zip(mixed.plans, mixed.columns, strict=True)]
    first = np.cumsum([0, *(len(c) for c in mixed.columns)])  # of each plan's tokens among all of them
    back, columns = mixed.back.cpu().numpy(), np.concatenate([c.cpu().numpy() for c in mixed.columns])
    found, begin = [], 0
    for n, end in enumerate(ends):
        used = [(parts[n][0], first[p] + parts[n][1]) for p, parts in enumerate(of_plans) if parts[n][0].plan_segments]
        tokens = np.concatenate([t for _, t in used])
        place = torch.empty(first[-1], dtype=torch.int64).numpy()
        place[tokens] = np.arange(len(tokens))
        pieces = [_piece(s, n, begin, end) for s, n in zip(mixed.segments[1], mixed.segments[2], strict=True)]
        device = mixed.back.device
        found.append(
            MixedPass(
                plans=[part for part, _ in used],
                columns=[torch.from_numpy(columns[t] - begin).to(device) for _, t in used],
                back=torch.from_numpy(place[back[begin:end]]).to(device),
                segments=(mixed.segments[0], [s for s, _ in pieces], [n for _, n in pieces]),
                layers=mixed.layers,
            )
        )
        begin = end
    return found


def _piece(start: int, length: int, begin: int, end: int) -> tuple[int, int]:
    """First column and number of a segment's tokens in the part of the columns `[begin, end)`."""
    first, last = max(start, begin), min(start + length, end)
    return (first - begin, last - first) if last > first else (0, 0)
