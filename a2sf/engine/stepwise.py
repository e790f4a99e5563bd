"""The recursion in plain torch, for any rule on any device: a step per token, over all rows and heads at once.

Cached tokens lie in slots. The next token takes the slot of an evicted one, so that a step costs O(C * D) per head, however
long the sequence is. Rows that need about the same number of slots run together: the order in which torch adds numbers
depends on the number of slots, which must follow from a row's own numbers, so that other rows never change its last bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from a2sf.engine.priorities import (
    added_scores,
    function_priorities,
    merged,
    pooled_scores,
    rule_priorities,
    step_fields,
    to_evict,
    to_evict_across_heads,
    token_numbers,
)
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import (
    LATE,
    Attended,
    AttentionCall,
    EvictionState,
    Options,
    Segments,
    joined_queries,
    last_queries,
    remembered,
    rounded_slots,
)
from a2sf.engine.tree import PaddedRows, RowResults, by_depth
from a2sf.engine.unevicted import evict_nothing, product, read_unevicted, rows_at_once
from a2sf.policies.base import UNLIMITED
from a2sf.policies.rule import Sequence, Step


def attend_torch(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: Options, state: EvictionState | None = None
) -> Attended:
    """The recursion; arguments and result as in `a2sf.engine.eviction.reference`."""
    return by_depth(torch_rows, AttentionCall(query, key, value, segments, options, state))


@torch.inference_mode(False)  # tensors made here count their changes, which shows whether a rule changes them
@torch.no_grad()
def torch_rows(rows: PaddedRows, options: Options) -> RowResults:
    """Run the recursion on right-padded rows: those that need as many slots together, the longest first."""
    output = rows.query.new_zeros(*rows.query.shape[:3], rows.value.shape[-1])
    order, states, evictions = [], [], []
    for pick, n, whole in _groups(rows, options):
        some = rows.pick(pick)
        ran = read_unevicted(some, n, options) if whole else _RowGroup(some, n, options).run()
        output[pick, :, : ran.output.shape[2]] = ran.output
        order.append(pick)
        states.append(ran.end)
        if ran.evictions is not None:
            evictions.append(torch.cat([pick[ran.evictions[:, :1]], ran.evictions[:, 1:]], 1))
    back = torch.cat(order).argsort()
    return RowResults(output, EvictionState.stack(states).select(back), torch.cat(evictions) if evictions else None)


def _groups(rows: PaddedRows, options: Options) -> Iterator[tuple[Tensor, int, bool]]:
    """Rows that run together, longest first; the slots that each needs; whether they are read by `read_unevicted`."""
    slots, whole = _slots_needed(rows), evict_nothing(rows, options)
    for n in slots.unique().tolist():
        for at_once in (False, True):
            pick = ((slots == n) & (whole == at_once)).nonzero()[:, 0]
            pick = pick[rows.length[pick].argsort(descending=True, stable=True)]
            for part in pick.split(rows_at_once(rows, n) if at_once else max(1, len(pick))):
                if len(part):
                    yield part, n, at_once


def _slots_needed(rows: PaddedRows) -> Tensor:
    """int64 [B]: how many slots each row needs, as `rounded_slots`."""
    held = rows.state.counts.amax(-1)
    # a head whose share of a layer's slots is above the budget gives back only what has come since the cut
    beyond = held + 1 + (rows.schedule.spare if rows.across_heads else 0)
    most = torch.maximum(rows.budget + 1 + rows.schedule.spare, beyond)
    if rows.rule.full_heads or rows.rule.threshold is not None:
        most = torch.full_like(most, UNLIMITED)
    if rows.schedule.prompt and rows.prompt is not None:
        unbounded = (rows.state.seen < rows.prompt) | (rows.schedule.then == "keep")
        most = most.masked_fill(unbounded, UNLIMITED)
    return rounded_slots(torch.minimum(held + rows.length, most).clamp(min=1))


class _RowGroup:
    """A group of rows, longest first, with `n` slots for each of their heads."""

    def __init__(self, rows: PaddedRows, n: int, options: Options) -> None:
        self.rows, self.rule, self.options = rows, rows.rule, options
        B, H, T, D = rows.query.shape
        K, old = rows.key.shape[1], rows.state
        past = old.positions.shape[-1]
        self.retention = rows.per_head(K, rows.query.dtype)
        self.query = (rows.query * options.scale).reshape(B, K, H // K, T, D)
        self.grouped = rows.query.reshape(B, K, H // K, T, D)
        self.queries = joined_queries(self.rule, old.queries, self.grouped) if self.rule.queries else None

        def buffer(x: Tensor, fill: float = 0) -> Tensor:
            """A buffer of `n` slots that begins with the state's `x` [B, K, past, ...]."""
            held = x[:, :, :n]
            made = torch.full((B, K, n, *x.shape[3:]), fill, dtype=x.dtype, device=x.device)
            made[:, :, : held.shape[2]] = held
            return made

        # new tokens' entries, and slots of the same, by name
        self.entering = {"keys": rows.key, "values": rows.value}
        self.held = {"keys": buffer(old.keys), "values": buffer(old.values), "scores": buffer(old.scores)}
        new = token_numbers(self.rule, rows.key, rows.value, rows.positions)
        held = token_numbers(self.rule, old.keys, old.values, old.positions)
        for name, entering, before in zip(("weight", "bias"), new, held, strict=True):
            if entering is not None and before is not None:
                self.entering[name], self.held[name] = entering, buffer(before)
        memory = rows.query.new_zeros(B, K, past, self.rule.memory) if old.memory is None else old.memory
        if self.rule.precompute is not None:
            sequence = Sequence(self.grouped, rows.key, rows.value, rows.length, options.scale, options.softmax)
            self.entering["memory"] = self.rule.precompute(sequence)
            memory = self.entering["memory"][:, :, :0]
        self.held["memory"] = buffer(memory)
        self.positions = buffer(old.positions, fill=-1)
        self.evictions: list[Tensor] = []

    def run(self) -> RowResults:
        """All tokens of all rows."""
        rows, (B, H, T, _) = self.rows, self.rows.query.shape
        output = rows.query.new_zeros(B, H, T, rows.value.shape[-1])
        length = rows.length.tolist()
        active = B
        for t in range(max(length)):
            while length[active - 1] <= t:
                active -= 1
            output[:active, :, t] = self._step(t, active)
        none = torch.empty(0, 4, dtype=torch.int64, device=rows.query.device)
        return RowResults(output, self._state(), torch.cat([none, *self.evictions]) if self.options.trace else None)

    def _step(self, t: int, active: int) -> Tensor:
        """Token `t` of the first `active` rows: insert, attend, score, evict; its output [active, H, V]."""
        retention = self._retention(active)
        now = (self.rows.state.seen[:active] + t)[:, None, None]
        positions = self.positions[:active]
        held = {name: x[:active] for name, x in self.held.items()}
        # insert into the first free slot
        slot = (positions < 0).int().argmax(-1, keepdim=True)
        positions.scatter_(2, slot, now.expand_as(slot))
        for name, x in held.items():
            at = slot if x.ndim == 3 else slot[..., None].expand(-1, -1, -1, x.shape[-1])
            if name in self.entering:
                x.scatter_(2, at, self.entering[name][:active, :, t : t + 1])
            else:
                x.scatter_(2, at, 0)
        # attend
        cached = positions >= 0
        logits = product(self.query[:active, :, :, t], held["keys"].transpose(2, 3))
        p = self.options.softmax(logits[:, :, :, None], ~cached[:, :, None, None])[:, :, :, 0]
        out = product(p, held["values"]).flatten(1, 2)
        # score
        count = cached.sum(-1, keepdim=True)
        scores = held["scores"]
        if self.rule.scored:
            fresh = scores * retention.forgetting_factor + added_scores(self.rule, p, count)
            scores.copy_(fresh if self.rule.cut is None else torch.where(retention.scores_now(now), fresh, scores))
        window = None if self.queries is None else self.queries[:active, :, :, t + 1 : t + 1 + self.rule.queries]
        shown = positions, cached, now, scores, held["memory"], window
        step = Step(p, held["keys"], held["values"], *shown, **step_fields(retention, self.options, positions))
        self._evict(t, retention, step, held, retention.excess(count, now))
        return out

    def _evict(self, t: int, retention: BatchRetention, step: Step, held: dict[str, Tensor], excess: Tensor) -> None:
        if self.rule.recording is not None:
            return self._remove(t, self.rule.recording.evicted(step), held)
        positions, now, most = step.positions, step.now, int(excess.max())
        looks = bool(retention.updates_memory(now).any()) or (
            self.rule.cut is not None and bool(retention.at_cut(now).any())
        )
        if most == 0 and not looks:
            return
        free = retention.unprotected(positions, step.cached, now)
        if self.rule.cut is not None:
            held["scores"].copy_(torch.where(retention.at_cut(now), pooled_scores(retention, step, free), step.scores))
        if self.rule.priority_fn is not None:
            priority, memory = function_priorities(retention, step, free, excess)
            held["memory"].copy_(memory)
        else:
            priority = rule_priorities(retention, step, held.get("weight"), held.get("bias"))
        if most == 0:
            return
        if most == 1 and self.rule.threshold is None:
            # the same as below, without sorting
            order = torch.where(free, priority, torch.inf).nan_to_num_(torch.inf, torch.inf, -torch.inf)
            least = free & (order == order.amin(-1, keepdim=True))
            position, slot = torch.where(least, positions, LATE).min(-1, keepdim=True)
            out = torch.zeros_like(free).scatter_(2, slot, (excess > 0) & (position < LATE))
        else:
            out = to_evict(self.rule, priority, positions, free, excess)
        if retention.across_heads:
            out = torch.where(retention.at_cut(now), to_evict_across_heads(retention, priority, step, free), out)
        if self.rule.merge_fn is not None and bool(out.any()):
            held["keys"][:], held["values"][:] = merged(retention, step, out)
            numbers = token_numbers(self.rule, held["keys"], held["values"], positions)
            for name, x in zip(("weight", "bias"), numbers, strict=True):
                if x is not None:
                    held[name].copy_(x)
        self._remove(t, out, held)

    def _remove(self, t: int, out: Tensor, held: dict[str, Tensor]) -> None:
        """Evict the slots `out` [active, K, N] at step `t`."""
        positions = self.positions[: len(out)]
        where = row, head, slot = out.nonzero(as_tuple=True)
        if self.options.trace:
            self.evictions.append(torch.stack([row, head, torch.full_like(row, t), positions[row, head, slot]], 1))
        positions[where] = -1
        for x in held.values():
            x[where] = 0  # free slots are 0

    def _retention(self, active: int) -> BatchRetention:
        """The retention of the first `active` rows."""
        if active < len(self.retention.forgetting_factor):
            self.retention = self.retention.select(slice(0, active))
        return self.retention

    def _state(self) -> EvictionState:
        """The slots as a state."""
        return EvictionState(
            positions=self.positions,
            scores=self.held["scores"],
            keys=self.held["keys"],
            values=self.held["values"],
            seen=self.rows.state.seen + self.rows.length,
            memory=None if remembered(self.rule) is None else self.rows.blank_if_finished(self.held["memory"]),
            queries=self.rows.blank_if_finished(
                last_queries(self.rule, self.rows.state.queries, self.grouped, self.rows.length)
            ),
        ).compact()
