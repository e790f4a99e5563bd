"""Splits a call that a kernel does not support into simpler calls: a prompt and what follows its cut; heads that differ.

`run` attends a simpler call. The cut itself is a small computation, done here in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from a2sf.engine.priorities import about, leaving, mass, merged, of_function, of_rule, pooled, smallest_of_all_heads
from a2sf.engine.state import Attended, Call, EvictionState, Options, Segments, last_queries
from a2sf.engine.tree import traced
from a2sf.errors import ConfigError
from a2sf.policies.rule import ACCUMULATED, Rule, Step
from a2sf.policies.slots import head_slots

Run = Callable[[Call], Attended]


def splits(segments: Segments) -> Callable[[Run, Call], Attended] | None:
    """How a call is split into simpler ones; None where it cannot be."""
    rule, schedule = segments.rule, segments.schedule
    if rule.heads:
        return by_numbers
    if rule.recording is not None:
        return None
    if rule.full_heads and not rule.calls:
        return by_heads
    if rule.precompute is not None or (rule.priority_fn is not None and rule.memory):
        return None  # its function is called at every step
    # where the cut gave every head a share of its own, each later step depends on the prompt
    return by_prompt if schedule.prompt and not (segments.across_heads and schedule.then != "keep") else None


def by_heads(run: Run, call: Call) -> Attended:
    """The heads that retain everything, and the others by the rest of their rule."""
    segments, K = call.segments, call.key.shape[1]
    return _together(run, segments.once(("full heads", K), lambda: _full_and_others(segments, K)), call)


def _full_and_others(segments: Segments, K: int) -> list[tuple[Tensor, Segments]]:
    """Of `K` heads those that retain everything, and the others, with their segments."""
    full = torch.zeros(K, dtype=torch.bool)
    full[list(segments.rule.full_heads)] = True
    everything = segments.unlimited(ACCUMULATED)
    others = replace(segments, rule=replace(segments.rule, full_heads=()))
    return [(heads.nonzero()[:, 0], part) for heads, part in ((full, everything), (~full, others)) if heads.any()]


def by_numbers(run: Run, call: Call) -> Attended:
    """Heads with numbers of their own (`Rule.heads`), those that have the same ones together.

    Raises:
        ConfigError: if the rule is for another number of key/value heads.
    """
    segments, rule, K = call.segments, call.segments.rule, call.key.shape[1]
    if len(rule.heads) != K:
        raise ConfigError("policy", f"{len(rule.heads)} heads", f"the layer has {K} key/value heads")
    return _together(run, segments.once("heads of equal numbers", lambda: _of_equal_numbers(segments, K)), call)


def _of_equal_numbers(segments: Segments, K: int) -> list[tuple[Tensor, Segments]]:
    """Heads that have the same numbers, with segments that have these."""
    rule = segments.rule
    slots = torch.tensor([head_slots(rule.heads, C) for C in segments.budget.tolist()]).view(-1, K, 3)
    same: dict[object, list[int]] = {}
    for h, head in enumerate(rule.heads):
        same.setdefault((head.forgetting_factor, head.mean_over_age, slots[:, h].numpy().tobytes()), []).append(h)
    groups = []
    for at in same.values():
        budget, recent, sinks = slots[:, at[0]].clone().unbind(1)
        factor = torch.full_like(segments.forgetting_factor, rule.heads[at[0]].forgetting_factor)
        plain = replace(rule, heads=(), mean_over_age=rule.heads[at[0]].mean_over_age)
        of_heads = replace(segments, budget=budget, recent=recent, sinks=sinks, forgetting_factor=factor, rule=plain)
        groups.append((torch.tensor(at), of_heads))
    return groups


def _together(run: Run, groups: list[tuple[Tensor, Segments]], call: Call) -> Attended:
    """Groups of key/value heads, int64 [n] each with its segments, as one layer; every head is in one group."""
    query, key, value, _, options, state = call
    size = query.shape[1] // key.shape[1]
    done = []
    for kv, segments in groups:
        q = (kv[:, None] * size + torch.arange(size)).flatten()
        before = None if state is None else state.heads(kv)
        done.append((kv, q, run(Call(query[:, q], key[:, kv], value[:, kv], segments, options, before))))
    kv_back, q_back = torch.cat([kv for kv, _, _ in done]).argsort(), torch.cat([q for _, q, _ in done]).argsort()
    ran = [attended for _, _, attended in done]
    output = torch.cat([a.output for a in ran], 1)[:, q_back]
    final = None
    if options.return_state:
        final = EvictionState.join_heads([a.state for a in ran if a.state is not None], kv_back)
    if not options.trace:
        return Attended(output, final)
    evicted = torch.cat([a.evicted for a in ran if a.evicted is not None], 1)[:, kv_back]
    cuts = [
        torch.stack([c[:, 0], kv.to(c.device)[c[:, 1]], *c[:, 2:].T], 1)
        for kv, _, a in done
        if (c := a.cuts) is not None
    ]
    return Attended(output, final, evicted, torch.cat(cuts))


def by_prompt(run: Run, call: Call) -> Attended:
    """Prompts with full attention, their cuts, and the tokens after them."""
    return _Prompts(run, call).attended()


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
    """Segments split where prompts end: their prompt tokens, and those after.

    Attributes:
        nodes: one for each segment.
        reading, later: which segments have tokens in the first part, and in the second.
        first, second: the parts as segments with parents among themselves; None where there is nothing to read.
    """

    nodes: list[_Node]
    reading: list[int]
    first: Segments | None
    later: list[int]
    second: Segments | None

    @staticmethod
    def of(segments: Segments, state: EvictionState | None) -> _Split:
        """`segments` split; those that start empty are split once for all layers of a pass."""
        if state is None:
            return segments.once("split at prompts", lambda: _Split._of(segments, None))
        return _Split._of(segments, state)

    @staticmethod
    def _of(segments: Segments, state: EvictionState | None) -> _Split:
        rule, nodes = segments.rule, _nodes(segments, state)
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
        first, second = (_pick(segments, nodes, ids) for ids in (reading, later))
        # a rule that only looks at the end of a prompt is scored when the prompt has been read (`_observe`)
        first = first.unlimited(
            Rule(scored=rule.scored and rule.cut is None, count_above_uniform=rule.count_above_uniform)
        )
        first = replace(first, length=read)
        second = replace(second.after_prompt(), start=second.start + skipped, length=rest)
        return _Split(nodes, reading, first if reading else None, later, second if later else None)


class _Prompts:
    """One call under the prompt schedule; `ends` are the states at the end of what was read of each segment."""

    def __init__(self, run: Run, call: Call) -> None:
        self.run, self.call = run, call
        self.segments, self.options, self.state = call.segments, call.options, call.state
        self.split = _Split.of(call.segments, call.state)
        self.group = call.query.shape[1] // call.key.shape[1]
        self.ends: dict[int, EvictionState] = {}
        self.ran: list[Attended] = []
        self.evictions: list[Tensor] = []

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

        query, key, value = self.call[:3]
        output = self.ran[0].output if self.ran else query.new_zeros(*query.shape[:3], value.shape[-1])
        for more in self.ran[1:]:
            output.add_(more.output)  # each is 0 where the other has tokens
        final = None
        if self.options.return_state:
            final = EvictionState.stack([self.ends[i] if i in self.ends else self._start(i) for i in range(len(nodes))])
        if not self.options.trace:
            return Attended(output, final)
        evicted, cuts = traced(self.evictions, (key.shape[0], key.shape[1], key.shape[2]), key.device)
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
            key, value = (x[:1].float() for x in (self.call.key, self.call.value))
            return EvictionState.empty(key, value, self.segments.rule, self.group)
        return self.state.select(torch.tensor([node.root]))

    def _read(self, ids: list[int], part: Segments, keep: bool) -> None:
        """Read the segments `ids`, which are `part`; keep the states they end with."""
        roots = [i for i, up in zip(ids, part.parent.tolist(), strict=True) if up < 0]
        begin = None
        if self.state is not None or any(self.split.nodes[i].up >= 0 or i in self.ends for i in roots):
            states = [self.ends[i] if i in self.ends else self._start(i) for i in roots]
            begin = EvictionState.stack([s.plain() for s in states] if not part.rule.calls else states)
        options = replace(self.options, return_state=keep)
        ran = self.run(self.call._replace(segments=part, options=options, state=begin))
        self.ran.append(ran)
        if ran.state is not None:
            for at, i in enumerate(ids):
                queries = self._last_queries(i) if part is self.split.first else None
                end = ran.state.select(torch.tensor([at])).trim()
                self.ends[i] = replace(end, queries=end.queries if queries is None else queries).for_rule(
                    self.segments.rule, self.group
                )

    def _last_queries(self, i: int) -> Tensor | None:
        """Those that the rule sees after the prompt's tokens in segment `i`."""
        rule, node = self.segments.rule, self.split.nodes[i]
        if not rule.queries:
            return None
        read = min(node.before, rule.queries)
        end = int(self.segments.start[i]) + node.before
        query = self.call.query[int(self.segments.row[i]), :, end - read : end].to(self._start(i).keys.dtype)
        return last_queries(
            rule, self._start(i).queries, query.unflatten(0, (-1, self.group))[None], torch.tensor([read])
        )

    def _probabilities(self, i: int) -> Tensor:
        """The attention of the prompt's last token, which segment `i` ends with, [1, K, G, N]."""
        end, at = self.ends[i], int(self.segments.start[i]) + self.split.nodes[i].before - 1
        query = self.call.query[int(self.segments.row[i]), :, at].to(end.keys.dtype).unflatten(0, (-1, self.group))
        logits = query @ end.keys[0].transpose(-1, -2) * self.options.scale
        return logits.masked_fill(end.positions[0, :, None] < 0, -torch.inf).softmax(-1)[None]

    def _observe(self, i: int) -> None:
        """Add the attention of the prompt's last queries, as far as they are in segment `i`, to the scores."""
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
            queries = self.call.query[row, :, begin + skip : begin + node.before].to(scores.dtype).unflatten(0, (K, -1))
            now = torch.arange(node.first + skip, node.first + node.before, device=scores.device)
            logits = queries @ end.keys[0, :, None].transpose(-1, -2) * self.options.scale  # [K, G, W, N]
            logits = logits.masked_fill(end.positions[0, :, None, None] > now[:, None], -torch.inf)
            forgotten = factor ** torch.arange(len(now) - 1, -1, -1, device=scores.device)
            added = mass(self.segments.rule, logits.softmax(-1).permute(2, 0, 1, 3), now[:, None, None] + 1)
            scores = scores * factor ** len(now) + (added * forgotten[:, None, None]).sum(0)
        self.ends[i] = replace(end, scores=scores)

    @torch.inference_mode(False)  # tensors made here count their changes, which shows whether a rule changes them
    @torch.no_grad()
    def _cut(self, ids: list[int]) -> None:
        """Cut the prompts that end in the segments `ids`."""
        if not ids:
            return
        state = EvictionState.stack([self.ends[i] for i in ids])
        probabilities = state.scores.new_zeros(0)
        if self.segments.rule.calls:
            slots = state.positions.shape[-1]
            each = (self._probabilities(i) for i in ids)
            probabilities = torch.cat([torch.nn.functional.pad(p, (0, slots - p.shape[-1])) for p in each])
        states, out = _after_cut(_pick(self.segments, self.split.nodes, ids), state, probabilities, self.options)
        for at, i in enumerate(ids):
            self.ends[i] = states.select(torch.tensor([at])).trim()
            head, position = out[at]
            column = int(self.segments.start[i]) + self.split.nodes[i].before - 1
            row = torch.full_like(head, int(self.segments.row[i]))
            self.evictions.append(torch.stack([row, head, torch.full_like(head, column), position], 1))


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
    parent = torch.tensor([place.get(nodes[i].up, -1) for i in ids], dtype=torch.int64)
    return replace(segments.select(torch.tensor(ids, dtype=torch.int64)), parent=parent)


def _after_cut(
    segments: Segments, state: EvictionState, probabilities: Tensor, options: Options
) -> tuple[EvictionState, list[tuple[Tensor, Tensor]]]:
    """States after their prompts' cuts, and for each the heads and positions of what is evicted.

    Args:
        probabilities: [B, K, G, N], the attention of each prompt's last token, for a rule that is a function.
    """
    assert segments.prompt is not None
    rule, device = segments.rule, state.positions.device
    retention = segments.per_head(state.positions.shape[1], state.scores.dtype).to(device)
    cached, now = state.positions >= 0, segments.prompt[:, None, None].to(device) - 1
    free = retention.unprotected(state.positions, cached, now)
    excess = retention.excess(cached.sum(-1, keepdim=True), now)
    memory = state.keys[..., :0]
    shown = state.positions, cached, now, state.scores, memory, state.queries
    step = Step(probabilities, state.keys, state.values, *shown, **about(retention, options, state.positions))
    if rule.cut is not None:
        step = replace(step, scores=pooled(retention, step, free))
    if rule.priority_fn is not None:
        priority, _ = of_function(retention, step, free, excess)
    else:
        fixed = (None if f is None else f(state.keys, state.values, state.positions) for f in (rule.weight, rule.bias))
        priority = of_rule(retention, step, *fixed)
    if retention.across_heads:
        out = smallest_of_all_heads(retention, priority, step, free)
    else:
        out = leaving(rule, priority, state.positions, free, excess)
    evicted = []
    for positions, row in zip(state.positions, out, strict=True):
        head, column = row.nonzero(as_tuple=True)
        evicted.append((head, positions[head, column]))
    kept = state.queries
    if kept is not None and segments.schedule.then == "keep":
        kept = torch.zeros_like(kept)
    keys, values = (state.keys, state.values) if rule.merge_fn is None else merged(retention, step, out)
    return replace(state, scores=step.scores, queries=kept, keys=keys, values=values).evict(out), evicted
