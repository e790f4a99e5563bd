"""What the attention function does in one forward pass without a cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Self

import torch
from torch import Tensor

from a2sf.engine.kernels import attend, backends_run
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import EvictionState, Options, Segments
from a2sf.engine.trace import attention_mass, steps_of
from a2sf.hf.attention.errors import check_finite
from a2sf.hf.attention.windows import keeps_window, mixes_windows, within_window
from a2sf.hf.warned import Warned, caused_by
from a2sf.policies.base import Retention
from a2sf.policies.model.rotary import Projection, Rotary
from a2sf.policies.schedule import STEP, Schedule


@dataclass
class Plan:
    """What the attention function does with one forward pass without a cache.

    Attributes:
        row, start, length, parent: the segments of the packed input (see `a2sf.engine.eviction.Segments`).
        retention: `retention(segment, layer)`: what a layer retains of the sequence through a segment.
        schedule: when tokens are evicted; under a sliding window of the model's own always step by step.
        prompt: `prompt(segment)`: tokens of the prompt of the sequence through a segment; for the prompt schedule.
        layers: attention layers of the model.
        policy_on_sliding: whether the policy acts on layers that have a sliding window of their own; False for models
            that mix such layers with global ones; their sliding layers remain as the model defines them.
        backend: which implementation runs.
        rotary: each layer's rotary embedding, where a policy needs it; else None.
        projections: the projection after each layer's attention, where a policy needs it; else None.
        trace: whether to note by layer what is evicted, in `evicted` (see `Attended`); for a single sequence without
            padding also the step at which each position is evicted, in `evicted_at` int32 [B, K, T], and the attention
            behind it, in `received` and `lost` (`trace.attention_mass`).
        serves: the caller's numbers of the sequences that are read.
        ends: the segment that each of them ends with.
        ran: which implementations ran (`a2sf.engine.kernels.backends_run`).
        warned: what libraries warn of in the policy's own part of the pass; None: it is not kept apart.
        cached: by layer, call of the layer's attention and segment, tokens cached at its end, mean over KV heads; where a
            rule has a threshold, so that no number says it.
    """

    row: Sequence[int]
    start: Sequence[int]
    length: Sequence[int]
    parent: Sequence[int]
    retention: Callable[[int, int], Retention]
    layers: int
    schedule: Schedule = STEP
    prompt: Callable[[int], int] | None = None
    policy_on_sliding: bool = True
    backend: str = "auto"
    rotary: Sequence[Rotary | None] | None = None
    projections: Sequence[Projection] | None = None
    trace: bool = False
    serves: Sequence[int] = ()
    ends: Sequence[int] = ()
    ran: set[str] = field(default_factory=set)
    warned: Warned | None = None
    reached: set[int] = field(default_factory=set)
    evicted: dict[int, Tensor] = field(default_factory=dict)
    evicted_at: dict[int, Tensor] = field(default_factory=dict)
    received: dict[int, Tensor] = field(default_factory=dict)
    lost: dict[int, Tensor] = field(default_factory=dict)
    cached: dict[tuple[int, int, int], float] = field(default_factory=dict)
    _calls: Counter[int] = field(default_factory=Counter)
    _segments: dict[Any, Segments] = field(default_factory=dict)
    _by_layer: dict[tuple[int, int | None], Segments] = field(default_factory=dict)

    @classmethod
    def of_rows(cls, lengths: Sequence[int], starts: Sequence[int], retention, layers: int, **more: Any) -> Self:
        """A batch of padded rows: row `b` holds its tokens at `starts[b] : starts[b] + lengths[b]`."""
        return cls(
            row=range(len(lengths)),
            start=starts,
            length=lengths,
            parent=[-1] * len(lengths),
            retention=retention,
            layers=layers,
            **more,
        )

    @classmethod
    def of_one(cls, tokens: int, retention: Sequence[Retention], config: Any, **more: Any) -> Self:
        """One sequence of a model with this config; `retention`: of each layer."""
        more["policy_on_sliding"] = not mixes_windows(config)
        return cls.of_rows([tokens], [0], lambda row, layer: retention[layer], len(retention), **more)

    def segments(self, layer: int, sliding_window: int | None) -> Segments:
        """The segments of `layer`, with its retention; shared between layers that retain the same."""
        known = self._by_layer.get((layer, sliding_window))
        if known is not None:
            return known
        retained = [self._retained(i, layer, sliding_window) for i in range(len(self.row))]
        rules = {r.rule for r in retained}
        # without them a policy would see other numbers than it asks for
        assert self.rotary is not None or not any(r.unrotated for r in rules), "the policy needs rotary embeddings"
        assert self.projections is not None or not any(r.projected for r in rules), "the policy needs projections"
        stated = (self.retention(i, layer) for i in range(len(self.row)))
        by_window = sliding_window is not None and any(keeps_window(r, self.policy_on_sliding) for r in stated)
        schedule = STEP if by_window else self.schedule
        same = (schedule, *retained)
        if same not in self._segments:
            numbers = BatchRetention.of(retained, schedule, self._prompts() if schedule.prompt else None)
            row, start, length, parent = (
                torch.tensor(list(x), dtype=torch.int64) for x in (self.row, self.start, self.length, self.parent)
            )
            self._segments[same] = Segments(**numbers.retention(), row=row, start=start, length=length, parent=parent)
        self._by_layer[layer, sliding_window] = self._segments[same]
        return self._segments[same]

    def _prompts(self) -> list[int]:
        assert self.prompt is not None, "the prompt schedule needs each sequence's prompt"
        return [self.prompt(i) for i in range(len(self.row))]

    def _retained(self, segment: int, layer: int, window: int | None) -> Retention:
        stated = self.retention(segment, layer)
        if window is None:
            return stated
        return within_window(stated, window, layer, self._tokens_through(segment), self.policy_on_sliding)

    def _tokens_through(self, segment: int) -> int:
        """Tokens from the beginning of a sequence to the end of one of its segments."""
        tokens = 0
        while segment >= 0:
            tokens += self.length[segment]
            segment = self.parent[segment]
        return tokens

    def note_cached(self, layer: int, call: int, segments: Segments, state: EvictionState | None) -> None:
        """Note how many tokens are cached at the end of each segment, if a threshold decides it."""
        if segments.rule.threshold is None:
            return
        assert state is not None
        for i, n in enumerate(state.counts.double().mean(1).tolist()):
            self.cached[layer, call, self._plan_segment(i)] = n

    def _plan_segment(self, segment: int) -> int:
        """The number of a segment in the whole plan, of which this may be a part."""
        return segment

    def cached_by(self) -> dict[int, float]:
        """By the caller's number of a sequence, tokens cached at its end, mean over layers and heads, where noted."""
        by_segment: dict[int, list[float]] = {}
        for (_, _, segment), n in self.cached.items():
            by_segment.setdefault(segment, []).append(n)
        of = zip(self.serves, self.ends, strict=True)
        return {i: fmean(by_segment[end]) for i, end in of if end in by_segment}

    @property
    def plans(self) -> list[Plan]:
        """This plan, in the form of a pass of several plans."""
        return [self]

    def options(self, layer: int, options: Options) -> Options:
        """The engine's arguments for a layer; `options` as in `Pass.attend`."""
        rotary = None if self.rotary is None else self.rotary[layer]
        projection = None if self.projections is None else self.projections[layer]
        known: dict[str, Any] = {"layers": self.layers, "rotary": rotary, "projection": projection}
        return replace(options, trace=self.trace, layer=layer, **known)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options, window: int | None
    ) -> Tensor:
        """Attention of one layer, [B, H, T, V]."""
        check_finite(layer, (self.row, self.start, self.length), query=query, key=key, value=value)
        return self.attend_finite(layer, query, key, value, options, window)

    def attend_finite(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options, window: int | None
    ) -> Tensor:
        """`attend` without its check that the tensors are finite."""
        call = self._calls[layer]
        self._calls[layer] += 1
        with backends_run() as names, caused_by(self.warned):
            segments, options = self.segments(layer, window), self.options(layer, options)
            if segments.rule.threshold is not None:
                options = replace(options, return_state=True)
            out = attend(query, key, value, segments, options, backend=self.backend)
        self.ran |= names
        self.reached.add(layer)
        self.note_cached(layer, call, segments, out.state)
        if out.evicted is not None:
            noted = {"evicted": out.evicted}
            if list(self.length) == [query.shape[2]]:
                noted["evicted_at"] = at = steps_of(out)
                noted["received"], noted["lost"] = attention_mass(query, key, at, options)
            for name, found in noted.items():
                known = getattr(self, name)
                # a layer that calls its attention several times has the heads of all calls, in their order
                known[layer] = torch.cat([known[layer], found], 1) if layer in known else found
        return out.output
