"""A call under the prompt schedule, in simpler calls: prompts with full attention, their cuts, and the tokens after them.

Numbers that follow from the segments alone are made on the CPU, once for all layers. States of many segments are one
`EvictionState`, so that a layer has as many operations for many segments as for one. The exception is a rule that looks at
the end of a prompt, or is a function: a library's product has other last bits in another shape or batch, so that each
segment's attention is a product of its own. A rule that stores numbers for each token gets them from the rows of attention,
some at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from a2sf.engine.kernels.prompt_parts import PromptSplit
from a2sf.engine.priorities import (
    added_scores,
    function_priorities,
    memory_after,
    merged,
    pooled_scores,
    rule_priorities,
    step_fields,
    to_evict,
    to_evict_across_heads,
    token_numbers,
)
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import LATE, Attended, AttentionCall, EvictionState, Options, Segments, accumulation_dtype
from a2sf.engine.tree import traced
from a2sf.policies.rule import AttentionRows, Step

Run = Callable[[AttentionCall], Attended]

ROWS = 64
"""Rows of a prompt's attention that are computed at a time for a rule's memory."""


def by_prompt(run: Run, call: AttentionCall) -> Attended:
    """Prompts with full attention, their cuts, and the tokens after them."""
    return _PromptCall(run, call).attended()


class _EndStates:
    """The newest state of each segment, by number; many are one batch."""

    def __init__(self) -> None:
        self.batches: list[EvictionState | None] = []
        self.place: dict[int, tuple[int, int]] = {}

    def put(self, ids: Sequence[int], state: EvictionState) -> None:
        """`state` has a row for each of `ids`."""
        self.place |= {i: (len(self.batches), row) for row, i in enumerate(ids)}
        used = {batch for batch, _ in self.place.values()}
        self.batches = [x if at in used else None for at, x in enumerate([*self.batches, state])]

    def of(self, ids: Sequence[int], form: Callable[[EvictionState], EvictionState]) -> EvictionState:
        """A row for each of `ids`; `form` gives states the tensors that all of them have in the result."""
        parts: list[EvictionState] = []
        order: list[int] = []
        for number, batch in enumerate(self.batches):
            rows = {at: self.place[i][1] for at, i in enumerate(ids) if self.place[i][0] == number}
            if rows and batch is not None:
                parts.append(_rows(form(batch), list(rows.values())))
                order += rows
        return _rows(EvictionState.stack(parts), torch.tensor(order).argsort().tolist())


def _rows(state: EvictionState, rows: list[int]) -> EvictionState:
    """The state of `rows`; the same object where these are all rows."""
    return state if rows == list(range(len(state.seen))) else state.select(torch.tensor(rows))


class _PromptCall:
    """One call under the prompt schedule; `ends` has the states at the end of what was read of each segment.

    There, a parentless segment that is number `n` of these starts from the state `-1 - n`.
    """

    def __init__(self, run: Run, call: AttentionCall) -> None:
        self.run, self.call = run, call
        self.segments, self.options, self.state = call.segments, call.options, call.state
        self.rule, self.heads = call.segments.rule, call.key.shape[1]
        self.group = call.query.shape[1] // self.heads
        self.split = PromptSplit.of(call.segments, call.state)
        self.ends = _EndStates()
        if call.state is not None:
            self.ends.put([-1 - n for n in range(len(call.state.seen))], call.state)
        self.ran: list[Attended] = []
        self.evictions: list[Tensor] = []

    def attended(self) -> Attended:
        split = self.split
        if split.prompts is not None:
            self._read_prompts(split.prompts)
        if split.rest is not None:
            form = self._for_rule if split.rest.rule.calls else EvictionState.plain
            begin = self._start_states(split.rest, split.later, form)
            end = self._read(split.rest, begin, keep=self.options.return_state)
            if end is not None:
                self.ends.put(split.later, end)

        query, key, value = self.call[:3]
        output = self.ran[0].output if self.ran else query.new_zeros(*query.shape[:3], value.shape[-1])
        for more in self.ran[1:]:
            output.add_(more.output)  # each is 0 where the other has tokens
        final = None
        if self.options.return_state:
            final = self.ends.of([self._state_number(i) for i in range(len(split.nodes))], self._for_rule).trim()
        if not self.options.trace:
            return Attended(output, final)
        evicted, cuts = traced(self.evictions, (key.shape[0], key.shape[1], key.shape[2]), key.device)
        for a in self.ran:
            assert a.evicted is not None
            assert a.cuts is not None
            evicted, cuts = torch.maximum(evicted, a.evicted), torch.cat([cuts, a.cuts])
        return Attended(output, final, evicted, cuts)

    def _state_number(self, i: int) -> int:
        """The number in `ends` of the newest state that segment `i` has: its own, or the one that it starts from."""
        if i in self.ends.place:
            return i
        node = self.split.nodes[i]
        start = node.up if node.up >= 0 else -1 - node.root
        if start < 0 and start not in self.ends.place:  # a sequence without a token
            key, value = (x[:1, :, :0].to(accumulation_dtype(x.dtype)) for x in (self.call.key, self.call.value))
            self.ends.put([start], EvictionState.empty(key, value, self.rule, self.group))
        return start

    def _start_states(
        self, part: Segments, ids: Sequence[int], form: Callable[[EvictionState], EvictionState]
    ) -> EvictionState | None:
        """The states that the segments `ids` start from, of which `part` is what is read next; None: empty ones."""
        roots = [i for i, up in zip(ids, part.parent.tolist(), strict=True) if up < 0]
        nodes = self.split.nodes
        if self.state is None and all(i not in self.ends.place and nodes[i].up < 0 for i in roots):
            return None
        return self.ends.of([self._state_number(i) for i in roots], form)

    def _read(self, part: Segments, begin: EvictionState | None, keep: bool) -> EvictionState | None:
        """Read `part` from the states `begin`; the states at its end, if they are to be kept."""
        options = replace(self.options, return_state=keep)
        begin = begin if begin is None or part.rule.calls else begin.plain()
        ran = self.run(self.call._replace(segments=part, options=options, state=begin))
        self.ran.append(replace(ran, state=None))
        return ran.state

    def _read_prompts(self, part: Segments) -> None:
        """Read the prompts' tokens, and cut the prompts that end."""
        split, rule = self.split, self.rule
        begin = self._start_states(part, split.reading, self._for_rule)
        end = self._read(part, begin, keep=True)
        assert end is not None
        if rule.queries:
            end = replace(end, queries=self._last_queries())
        end = end.for_rule(rule, self.group)
        if rule.memory:
            end = replace(end, memory=self._memory_at_end(end, None if begin is None else begin.memory))
        if rule.cut is not None and rule.scored:
            end = replace(end, scores=self._scores_at_end(end, None if begin is None else begin.scores))
        if len(split.ending) < len(split.reading):
            self.ends.put(split.reading, end)
        if split.ending:
            self.ends.put([split.reading[at] for at in split.ending], self._cut(end))

    def _for_rule(self, state: EvictionState) -> EvictionState:
        """The same state with as many queries as the rule has, of 0 before the first."""
        queries = state.queries
        if queries is not None and queries.shape[3] < self.rule.queries:
            missing = self.rule.queries - queries.shape[3]
            state = replace(state, queries=torch.nn.functional.pad(queries, (0, 0, missing, 0)))
        return state.for_rule(self.rule, self.group)

    def _last_queries(self) -> Tensor:
        """[S, K, G, W, D]: the queries that the rule sees after the prompt's tokens in each segment.

        W is that of the rule, or less where all prompts are shorter: most of a wide window would be zeros.
        """
        query, state = self.call.query, self.state
        dtype = accumulation_dtype(query.dtype)
        W = self.rule.queries if state is not None else min(self.rule.queries, max(1, *self._lengths))
        row, column, given, place = self.split.query_places(W, query.device)
        found = query[row, :, column].to(dtype).unflatten(2, (self.heads, -1)).permute(0, 2, 3, 1, 4)
        before = torch.zeros((), dtype=dtype, device=query.device)
        if state is not None and state.queries is not None:
            before = state.queries[given, :, :, place].permute(0, 2, 3, 1, 4).to(dtype)
            before = before.where((place >= 0)[:, None, None, :, None], 0)
        return found.where((column >= 0)[:, None, None, :, None], before).contiguous()

    @cached_property
    def _lengths(self) -> list[int]:
        """Of each segment of `reading`, how many tokens its fullest head has at the end of its prompt's tokens."""
        ends = [n.first + n.before for n in self.split.nodes]
        if self.state is not None:  # which may hold less than it has seen
            held = (self.state.counts.amax(-1) - self.state.seen).tolist()
            ends = [end + held[n.root] for end, n in zip(ends, self.split.nodes, strict=True)]
        return [ends[i] for i in self.split.reading]

    def _inherited(self, numbers: Tensor, before: Tensor | None) -> Tensor:
        """`numbers` [S, K, N, ...], in parentless segments those of `before` [S', K, N', ...]; None: these start empty."""
        assert self.split.prompts is not None
        if before is not None:
            roots = [at for at, up in enumerate(self.split.prompts.parent.tolist()) if up < 0]
            n = min(before.shape[2], numbers.shape[2])
            numbers[roots, :, :n] = before[:, :, :n].to(numbers.dtype)
        return numbers

    def _scores_at_end(self, end: EvictionState, before: Tensor | None) -> Tensor:
        """Scores [S, K, N] with the attention of the prompts' last queries, as far as they are in each segment.

        Args:
            end: the states at the end of the prompts' tokens.
            before: [S', K, N'], the scores that parentless segments start with; None: they start empty.
        """
        assert self.split.prompts is not None
        query, scores = self.call.query, self._inherited(torch.zeros_like(end.scores), before)
        parent = self.split.prompts.parent.tolist()
        positions = end.positions.where(end.positions >= 0, LATE)
        last_queries = self.split.last_queries(self.segments, scores.dtype, scores.device)
        for at, (look, up, n) in enumerate(zip(last_queries, parent, self._lengths, strict=True)):
            if up >= 0:
                scores[at] = scores[up]
            if look is None:
                continue
            queries = query[look.row, :, look.begin : look.end].to(scores.dtype).unflatten(0, (self.heads, -1))
            keys = end.keys[at, :, :n].contiguous()
            logits = queries @ keys[:, None].transpose(-1, -2) * self.options.scale  # [K, G, W, n]
            p = self.options.softmax(logits, positions[at, :, None, None, :n] > look.now)
            added = added_scores(self.rule, p.permute(2, 0, 1, 3), look.now[..., None] + 1)
            scores[at, :, :n] = scores[at, :, :n] * look.power + (added * look.forgotten).sum(0)
        return scores

    @torch.inference_mode(False)
    @torch.no_grad()
    def _memory_at_end(self, end: EvictionState, before: Tensor | None) -> Tensor:
        """The rule's memory [S, K, N, M] at the end of the prompts' tokens; arguments as in `_scores_at_end`."""
        assert self.split.prompts is not None
        memory = self._inherited(end.keys.new_zeros(*end.positions.shape, self.rule.memory), before)
        parent = self.split.prompts.parent.tolist()
        for at, (up, length) in enumerate(zip(parent, self._lengths, strict=True)):
            if up >= 0:
                memory[at] = memory[up]
            node = self.split.nodes[self.split.reading[at]]
            for first in range(0, node.before, ROWS):
                last = min(first + ROWS, node.before)
                n = length - node.before + last  # columns of the tokens that are read by then
                query = self.call.query[node.row, :, node.begin + first : node.begin + last]
                query = query.to(memory.dtype).reshape(self.heads, -1, query.shape[-1])
                positions = end.positions[at : at + 1, :, :n]
                now = torch.arange(node.first + first, node.first + last, device=positions.device)
                hidden = (positions < 0)[:, :, None, None] | (positions[:, :, None, None] > now[:, None])
                keys = end.keys[at, :, :n].contiguous()
                logits = (query @ keys.transpose(-1, -2)).unflatten(1, (self.group, -1)) * self.options.scale
                p = self.options.softmax(logits[None], hidden)  # [1, K, G, Q, n]
                rows = AttentionRows(p, positions, now[None, None], memory[at : at + 1, :, :n])
                memory[at, :, :n] = memory_after(self.rule, rows)[0]
        return memory

    def _probabilities(self, end: EvictionState, slots: int) -> Tensor:
        """[B, K, G, `slots`], the attention of the last token of each prompt that ends; `end` as in `_scores_at_end`."""
        each = []
        for at in self.split.ending:
            node, n = self.split.nodes[self.split.reading[at]], self._lengths[at]
            query = self.call.query[node.row, :, node.begin + node.before - 1]
            keys = end.keys[at, :, :n].contiguous()
            logits = query.to(keys.dtype).unflatten(0, (self.heads, -1)) @ keys.transpose(-1, -2) * self.options.scale
            p = self.options.softmax(logits[:, :, None], end.positions[at, :, None, None, :n] < 0)[:, :, 0]
            each.append(torch.nn.functional.pad(p, (0, slots - n)))
        return torch.stack(each)

    @torch.inference_mode(False)  # tensors made here count their changes, which shows whether a rule changes them
    @torch.no_grad()
    def _cut(self, end: EvictionState) -> EvictionState:
        """The states of prompts that end, after their cuts; `end` as in `_scores_at_end`."""
        split = self.split
        state = end.select(torch.tensor(split.ending)) if self.rule.calls else _rows(end, split.ending)
        state = state.trim(max(self._lengths[at] for at in split.ending))
        slots = state.positions.shape[-1]
        probabilities = self._probabilities(end, slots) if self.rule.calls else end.scores.new_zeros(0)
        retention = split.retention(self.heads, state.scores.dtype, state.positions.device)
        after, out = _after_cut(retention, state, probabilities, self.options)
        if self.options.trace:
            nodes = [split.nodes[split.reading[at]] for at in split.ending]
            places = torch.tensor([[n.row, n.begin + n.before - 1] for n in nodes], device=out.device)
            at, head, slot = out.nonzero(as_tuple=True)
            row, column = places[at].unbind(1)
            self.evictions.append(torch.stack([row, head, column, state.positions[at, head, slot]], 1))
        return after


def _after_cut(
    retention: BatchRetention, state: EvictionState, probabilities: Tensor, options: Options
) -> tuple[EvictionState, Tensor]:
    """States after their prompts' cuts, and which of the tokens before are evicted, bool [B, K, N].

    Args:
        retention: what they are cut to, `per_head` on the states' device.
        probabilities: [B, K, G, N], the attention of each prompt's last token, for a rule that is a function.
    """
    if retention.rule.memory_fn is not None:  # `state.memory` is what it returned for the last row
        retention = replace(retention, rule=replace(retention.rule, memory_fn=None))
    assert retention.prompt is not None
    rule, cached, now = retention.rule, state.positions >= 0, retention.prompt - 1
    free = retention.unprotected(state.positions, cached, now)
    excess = retention.excess(cached.sum(-1, keepdim=True), now)
    memory = state.keys[..., :0] if state.memory is None else state.memory
    shown = state.positions, cached, now, state.scores, memory, state.queries
    step = Step(probabilities, state.keys, state.values, *shown, **step_fields(retention, options, state.positions))
    if rule.cut is not None:
        step = replace(step, scores=pooled_scores(retention, step, free))
    if rule.priority_fn is not None:
        priority, _ = function_priorities(retention, step, free, excess)
    else:
        fixed = token_numbers(rule, state.keys, state.values, state.positions)
        priority = rule_priorities(retention, step, *fixed)
    if retention.across_heads:
        out = to_evict_across_heads(retention, priority, step, free)
    else:
        out = to_evict(rule, priority, state.positions, free, excess)
    keys, values = (state.keys, state.values) if rule.merge_fn is None else merged(retention, step, out)
    after = state.plain() if retention.schedule.then == "keep" else state
    return replace(after, scores=step.scores, keys=keys, values=values).evict(out), out
