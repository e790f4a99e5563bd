"""Calls in parts that a compiled kernel knows: a prompt, its cut and what follows; heads that keep everything and others.

`run` is a kernel that evicts token by token; what it never does itself is small and done here, in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from a2sf.engine.levels import empty_state, traced
from a2sf.engine.priorities import Numbers, mass, of_rule, pooled, smallest, smallest_of_all_heads, unprotected
from a2sf.engine.state import Attended, EvictionState, Options, Segments
from a2sf.errors import ConfigError
from a2sf.policies.base import UNLIMITED
from a2sf.policies.rule import ACCUMULATED, Rule, Step
from a2sf.policies.schedule import STEP
from a2sf.policies.slots import head_slots

Run = Callable[[Tensor, Tensor, Tensor, Segments, Options, EvictionState | None], Attended]


def by_heads(
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    options: Options,
    state: EvictionState | None,
) -> Attended:
    """The heads that keep everything, and the others by the rest of their rule."""
    whole = torch.zeros(key.shape[1], dtype=torch.bool)
    whole[list(segments.rule.full_heads)] = True
    everything = replace(
        segments, budget=torch.full_like(segments.budget, UNLIMITED), rule=ACCUMULATED, schedule=STEP, prompt=None
    )
    others = replace(segments, rule=replace(segments.rule, full_heads=()))
    parts = [(heads.nonzero()[:, 0], part) for heads, part in ((whole, everything), (~whole, others)) if heads.any()]
    return _together(run, parts, query, key, value, options, state)


def by_numbers(
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    options: Options,
    state: EvictionState | None,
) -> Attended:
    """Heads with numbers of their own (`Rule.heads`), those that have the same ones together.

    Raises:
        ConfigError: if the rule is for another number of key/value heads.
    """
    rule, K = segments.rule, key.shape[1]
    if len(rule.heads) != K:
        raise ConfigError("policy", f"{len(rule.heads)} heads", f"the layer has {K} key/value heads")
    known = segments.__dict__.get("_by_numbers")
    if known is None:
        slots = torch.tensor([head_slots(rule.heads, C) for C in segments.budget.tolist()]).view(-1, K, 3)
        alike: dict[object, list[int]] = {}
        for h, head in enumerate(rule.heads):
            alike.setdefault((head.forgetting_factor, head.mean_over_age, slots[:, h].numpy().tobytes()), []).append(h)
        known = []
        for at in alike.values():
            budget, recent, sinks = slots[:, at[0]].clone().unbind(1)
            factor = torch.full_like(segments.forgetting_factor, rule.heads[at[0]].forgetting_factor)
            plain = replace(rule, heads=(), mean_over_age=rule.heads[at[0]].mean_over_age)
            own = replace(segments, budget=budget, recent=recent, sinks=sinks, forgetting_factor=factor, rule=plain)
            known.append((torch.tensor(at), own))
        object.__setattr__(segments, "_by_numbers", known)  # the same for all layers that retain alike
    return _together(run, known, query, key, value, options, state)


def _together(
    run: Run,
    parts: list[tuple[Tensor, Segments]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    state: EvictionState | None,
) -> Attended:
    """Key/value heads int64 [n], each with segments of their own, as one layer; every head is in one part."""
    group = query.shape[1] // key.shape[1]
    done = []
    for kv, segments in parts:
        q = (kv[:, None] * group + torch.arange(group)).flatten()
        before = None if state is None else state.heads(kv)
        done.append((kv, q, run(query[:, q], key[:, kv], value[:, kv], segments, options, before)))
    kv_back, q_back = torch.cat([kv for kv, _, _ in done]).argsort(), torch.cat([q for _, q, _ in done]).argsort()
    ran = [attended for _, _, attended in done]
    output = torch.cat([a.output for a in ran], 1)[:, q_back]
    final = None
    if options.return_state:
        states = [a.state for a in ran if a.state is not None]
        slots = max(s.positions.shape[-1] for s in states)
        padded = [s.pad(slots) for s in states]
        tensors = {n: torch.cat([getattr(s, n) for s in padded], 1) for n in ("positions", "scores", "keys", "values")}
        final = replace(padded[0], **tensors).heads(kv_back)
    if not options.trace:
        return Attended(output, final)
    evicted = torch.cat([a.evicted for a in ran if a.evicted is not None], 1)[:, kv_back]
    cuts = [
        torch.stack([c[:, 0], kv.to(c.device)[c[:, 1]], *c[:, 2:].T], 1)
        for kv, _, a in done
        if (c := a.cuts) is not None
    ]
    return Attended(output, final, evicted, torch.cat(cuts))


def by_prompt(
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    options: Options,
    state: EvictionState | None,
) -> Attended:
    """Prompts with full attention, their cuts, and what follows on."""
    return _Prompts(run, (query, key, value), segments, options, state).attended()


@dataclass(frozen=True)
class _Node:
    """A segment, split where its sequence's prompt ends.

    Attributes:
        up: the nearest segment above that has tokens, -1 for none.
        root: which of the parentless segments it is below, in their order.
        first: position of its first token.
        before: how many of its tokens belong to the prompt.
        after: how many do not.
        ends: whether the prompt's last token is one of them.
    """

    up: int
    root: int
    first: int
    before: int
    after: int
    ends: bool


class _Split(NamedTuple):
    """Segments split where prompts end: what belongs to prompts, and what follows.

    Attributes:
        nodes: of all segments.
        reading, later: which segments the parts are of.
        first, second: the parts, each with parents of its own; None where there is nothing to read.
    """

    nodes: list[_Node]
    reading: list[int]
    first: Segments | None
    later: list[int]
    second: Segments | None

    @staticmethod
    def of(segments: Segments, state: EvictionState | None) -> _Split:
        """`segments` split; those that start empty are split once for all layers of a model."""
        known = segments.__dict__.get("_split") if state is None else None
        if known is not None:
            return known
        rule, nodes = segments.rule, _nodes(segments, state)
        # where the rule looks at the end of a prompt alone, its scores are made when the prompt has been read
        scored = rule.scored and rule.cut is None
        reading = [i for i, n in enumerate(nodes) if n.before]
        later = [i for i, n in enumerate(nodes) if n.after]
        read, rest, skipped = (
            torch.tensor(x, dtype=torch.int64)
            for x in (
                [nodes[i].before for i in reading],
                [nodes[i].after for i in later],
                [nodes[i].before for i in later],
            )
        )
        first, second = (replace(_pick(segments, nodes, ids), schedule=STEP, prompt=None) for ids in (reading, later))
        first = _unlimited(
            replace(first, length=read, rule=Rule(scored=scored, count_above_uniform=rule.count_above_uniform))
        )
        second = replace(second, start=second.start + skipped, length=rest, rule=replace(rule, cut=None, scored=scored))
        second = second if segments.schedule.then == "step" else _unlimited(second)
        split = _Split(nodes, reading, first if reading else None, later, second if later else None)
        if state is None:
            object.__setattr__(segments, "_split", split)
        return split


class _Prompts:
    """One call under the prompt schedule; `ends` are the states after each segment, as far as it has been read."""

    def __init__(
        self,
        run: Run,
        qkv: tuple[Tensor, Tensor, Tensor],
        segments: Segments,
        options: Options,
        state: EvictionState | None,
    ) -> None:
        self.run, self.qkv, self.segments, self.options, self.state = run, qkv, segments, options, state
        self.split = _Split.of(segments, state)
        self.ends: dict[int, EvictionState] = {}
        self.ran: list[Attended] = []
        self.gone: list[Tensor] = []

    def attended(self) -> Attended:
        nodes, reading, first, later, second = self.split
        if first is not None:
            self._read(reading, first, keep=True)
            if self.segments.rule.cut is not None and self.segments.rule.scored:
                for i in reading:
                    self._observe(i)
            self._cut([i for i in reading if nodes[i].ends])
        if second is not None:
            self._read(later, second, keep=self.options.return_state)

        query, key, value = self.qkv
        output = self.ran[0].output if self.ran else query.new_zeros(*query.shape[:3], value.shape[-1])
        for more in self.ran[1:]:
            output.add_(more.output)  # each is 0 where the other is not
        final = None
        if self.options.return_state:
            final = EvictionState.stack([self.ends[i] if i in self.ends else self._start(i) for i in range(len(nodes))])
        if not self.options.trace:
            return Attended(output, final)
        none = torch.empty(0, 4, dtype=torch.int64, device=key.device)
        evicted, cuts = traced(torch.cat([none, *self.gone]), (key.shape[0], key.shape[1], key.shape[2]))
        for a in self.ran:
            assert a.evicted is not None
            assert a.cuts is not None
            evicted, cuts = torch.maximum(evicted, a.evicted), torch.cat([cuts, a.cuts])
        return Attended(output, final, evicted, cuts)

    def _start(self, i: int) -> EvictionState:
        """The state that segment `i` starts from."""
        node = self.split.nodes[i]
        if node.up >= 0:
            return self.ends[node.up]
        if self.state is None:
            key, value = (x[:1].float() for x in self.qkv[1:])
            return empty_state(key, value, self.segments.rule)
        return self.state.select(torch.tensor([node.root]))

    def _read(self, ids: list[int], part: Segments, keep: bool) -> None:
        """Read the segments `ids`, which are `part`; keep the states they end with."""
        roots = [i for i, up in zip(ids, part.parent.tolist(), strict=True) if up < 0]
        begin = None
        if self.state is not None or any(self.split.nodes[i].up >= 0 or i in self.ends for i in roots):
            begin = EvictionState.stack([self.ends[i] if i in self.ends else self._start(i) for i in roots])
        ran = self.run(*self.qkv, part, replace(self.options, return_state=keep), begin)
        self.ran.append(ran)
        if ran.state is not None:
            for at, i in enumerate(ids):
                self.ends[i] = _trimmed(ran.state.select(torch.tensor([at])))

    def _observe(self, i: int) -> None:
        """Let the last queries of its prompt that segment `i` holds add their attention to the scores."""
        assert self.segments.prompt is not None
        node, end, row = self.split.nodes[i], self.ends[i], int(self.segments.row[i])
        K, N = end.scores.shape[1:]
        scores = end.scores.new_zeros(1, K, N)
        past = self._start(i).scores
        scores[..., : past.shape[-1]] = past
        factor = self.segments.forgetting_factor[i].to(scores)
        window = int(self.segments.prompt[i] - self.segments.recent[i])
        skip = max(0, window - node.first)
        if skip < node.before:
            begin = int(self.segments.start[i])
            asked = self.qkv[0][row, :, begin + skip : begin + node.before].to(scores.dtype).unflatten(0, (K, -1))
            now = torch.arange(node.first + skip, node.first + node.before, device=scores.device)
            logits = asked @ end.keys[0, :, None].transpose(-1, -2) * self.options.scale  # [K, G, W, N]
            logits = logits.masked_fill(end.positions[0, :, None, None] > now[:, None], -torch.inf)
            forgotten = factor ** torch.arange(len(now) - 1, -1, -1, device=scores.device)
            asked_for = mass(self.segments.rule, logits.softmax(-1).permute(2, 0, 1, 3), now[:, None, None] + 1)
            scores = scores * factor ** len(now) + (asked_for * forgotten[:, None, None]).sum(0)
        self.ends[i] = replace(end, scores=scores)

    def _cut(self, ids: list[int]) -> None:
        """Cut the prompts that end in the segments `ids`."""
        if not ids:
            return
        states, out = _cut(
            _pick(self.segments, self.split.nodes, ids), EvictionState.stack([self.ends[i] for i in ids])
        )
        for at, i in enumerate(ids):
            self.ends[i] = _trimmed(states.select(torch.tensor([at])))
            head, position = out[at]
            column = int(self.segments.start[i]) + self.split.nodes[i].before - 1
            row = torch.full_like(head, int(self.segments.row[i]))
            self.gone.append(torch.stack([row, head, torch.full_like(head, column), position], 1))


def _nodes(segments: Segments, state: EvictionState | None) -> list[_Node]:
    assert segments.prompt is not None
    seen = iter(() if state is None else state.seen.tolist())
    nodes: list[_Node] = []
    roots = 0
    columns = (segments.length, segments.parent, segments.prompt)
    for n, p, prompt in zip(*(x.tolist() for x in columns), strict=True):
        if p >= 0:
            above = nodes[p]
            tokens = above.before + above.after
            up, root, first = p if tokens else above.up, above.root, above.first + tokens
        else:
            up, root, first = -1, roots, next(seen, 0)
            roots += 1
        before = min(max(prompt - first, 0), n)
        nodes.append(_Node(up, root, first, before, n - before, before > 0 and first + before == prompt))
    return nodes


def _pick(segments: Segments, nodes: list[_Node], ids: list[int]) -> Segments:
    """Some of the segments, each below the nearest one above that is among them."""
    place = {i: at for at, i in enumerate(ids)}
    up = torch.tensor([place.get(nodes[i].up, -1) for i in ids], dtype=torch.int64)
    tensors = {f.name: x[ids] for f in fields(segments) if isinstance(x := getattr(segments, f.name), Tensor)}
    return Segments(**(tensors | {"parent": up}), rule=segments.rule, schedule=segments.schedule)


def _unlimited(segments: Segments) -> Segments:
    """The same, with nothing evicted."""
    none = torch.zeros_like(segments.recent)
    return replace(segments, budget=torch.full_like(segments.budget, UNLIMITED), recent=none, sinks=none)


def _trimmed(state: EvictionState) -> EvictionState:
    """One row's state with no more slots than it needs, so that nothing depends on the other rows."""
    n = max(1, int((state.positions >= 0).sum(-1).max()))
    parts = {name: getattr(state, name)[:, :, :n] for name in ("positions", "scores", "keys", "values")}
    return replace(state, **parts)


def _cut(segments: Segments, state: EvictionState) -> tuple[EvictionState, list[tuple[Tensor, Tensor]]]:
    """States after their prompts' cuts, and for each the heads and positions of what goes."""
    assert segments.prompt is not None
    K, rule = state.positions.shape[1], segments.rule
    integers = (segments.budget, segments.recent, segments.sinks, segments.prompt)
    budget, recent, sinks, prompt = (x[:, None, None].to(state.positions.device) for x in integers)
    factor = segments.forgetting_factor.to(state.scores)[:, None, None]
    numbers = Numbers(budget.repeat(1, K, 1), recent, sinks, factor, prompt, rule, segments.schedule)
    cached, now = state.positions >= 0, prompt - 1
    free = unprotected(numbers, state.positions, cached, now)
    none = state.scores.new_zeros(0)
    step = Step(none, state.keys, state.values, state.positions, cached, now, state.scores, none)
    if rule.cut is not None:
        step = replace(step, scores=pooled(numbers, step, free))
    fixed = (None if f is None else f(state.keys, state.values, state.positions) for f in (rule.weight, rule.bias))
    priority = of_rule(numbers, step, *fixed)
    if numbers.across_heads:
        out = smallest_of_all_heads(numbers, priority, step, free)
    else:
        excess = numbers.excess(cached.sum(-1, keepdim=True), now)
        out = smallest(priority, state.positions, free, excess)
    kept = cached & ~out
    order = (~kept).int().argsort(dim=-1, stable=True)[:, :, : max(1, int(kept.sum(-1).max()))]
    there = kept.gather(2, order)

    def of(x: Tensor) -> Tensor:
        return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1])).where(there[..., None], 0)

    after = replace(
        state,
        positions=state.positions.gather(2, order).where(there, -1),
        scores=of(step.scores[..., None])[..., 0],
        keys=of(state.keys),
        values=of(state.values),
    )
    gone = []
    for positions, row in zip(state.positions, out, strict=True):
        head, column = row.nonzero(as_tuple=True)
        gone.append((head, positions[head, column]))
    return after, gone
