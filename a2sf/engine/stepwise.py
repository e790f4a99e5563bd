"""The recursion in plain torch, for any rule on any device: a step per token, over all rows and heads at once.

What is cached lies in slots: an evicted token's slot is taken by the next one, so that a step costs O(C * D) per head,
whatever came before. Rows that need about as many slots run together, because how torch adds up depends on the number of
slots: it must follow from a row's own numbers, so that the other rows never change its last bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from a2sf.engine.levels import Ran, Rows, by_levels
from a2sf.engine.priorities import (
    LATE,
    Numbers,
    mass,
    of_own,
    of_rule,
    pooled,
    smallest,
    smallest_of_all_heads,
    unprotected,
)
from a2sf.engine.state import Attended, EvictionState, Options, Segments
from a2sf.policies.base import UNLIMITED
from a2sf.policies.rule import Sequence, Step


def attend_torch(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: Options, state: EvictionState | None = None
) -> Attended:
    """The recursion; arguments and result as in `a2sf.engine.eviction.reference`."""
    return by_levels(torch_rows, query, key, value, segments, options, state)


@torch.inference_mode(False)  # tensors made here count their changes, which tells whether a rule only looks
@torch.no_grad()
def torch_rows(rows: Rows, options: Options) -> Ran:
    """Groups of rows that need as many slots, longest first within each."""
    slots = _slots(rows)
    output = rows.query.new_zeros(*rows.query.shape[:3], rows.value.shape[-1])
    order, states, gone = [], [], []
    for n in slots.unique().tolist():
        pick = (slots == n).nonzero()[:, 0]
        pick = pick[rows.length[pick].argsort(descending=True, stable=True)]
        ran = _Slots(_take(rows, pick), n, options).run()
        output[pick, :, : ran.output.shape[2]] = ran.output
        order.append(pick)
        states.append(ran.end)
        if ran.gone is not None:
            gone.append(torch.cat([pick[ran.gone[:, :1]], ran.gone[:, 1:]], 1))
    back = torch.cat(order).argsort()
    return Ran(output, EvictionState.stack(states).select(back), torch.cat(gone) if gone else None)


def _slots(rows: Rows) -> Tensor:
    """int64 [B]: how many slots each row needs, rounded up to few different numbers."""
    held = (rows.state.positions >= 0).sum(-1).amax(-1)
    most = torch.maximum(rows.budget + 1 + rows.schedule.spare, held + 1)
    if rows.rule.full_heads:
        most = torch.full_like(most, UNLIMITED)
    if rows.schedule.prompt:
        unbounded = (rows.state.seen < rows.prompt) | (rows.schedule.then == "keep")
        most = most.masked_fill(unbounded, UNLIMITED)
    need = torch.minimum(held + rows.length, most).clamp(min=1)
    unit = 2 ** (need.double().log2().floor().long() - 3).clamp(min=4)
    return (need + unit - 1) // unit * unit


def _take(rows: Rows, pick: Tensor) -> Rows:
    """The rows `pick`, without the padding that they do not need."""
    T = max(1, int(rows.length[pick].max()))
    taken: dict[str, Any] = {n: getattr(rows, n)[pick, :, :T] for n in ("query", "key", "value")}
    for name in ("length", "budget", "recent", "sinks", "forgetting_factor", "prompt"):
        taken[name] = getattr(rows, name)[pick]
    taken["lengths"], taken["budgets"] = taken["length"].tolist(), taken["budget"].tolist()
    return replace(rows, **taken, state=rows.state.select(pick))


class _Slots:
    """A group of rows, longest first, with `n` slots for each of their heads."""

    def __init__(self, rows: Rows, n: int, options: Options) -> None:
        self.rows, self.rule, self.options = rows, rows.rule, options
        B, H, T, D = rows.query.shape
        K, old = rows.key.shape[1], rows.state
        past = old.positions.shape[-1]
        self.numbers = Numbers.of(rows)
        self.query = (rows.query * options.scale).reshape(B, K, H // K, T, D)

        def slots(x: Tensor, fill: float = 0) -> Tensor:
            """A buffer of `n` slots that begins with the state's `x` [B, K, past, ...]."""
            held = x[:, :, :n]
            made = torch.full((B, K, n, *x.shape[3:]), fill, dtype=x.dtype, device=x.device)
            made[:, :, : held.shape[2]] = held
            return made

        # new tokens' entries, and slots of the same, by name
        self.entering = {"keys": rows.key, "values": rows.value}
        self.held = {"keys": slots(old.keys), "values": slots(old.values), "scores": slots(old.scores)}
        for name, fixed in (("weight", self.rule.weight), ("bias", self.rule.bias)):
            if fixed is not None:
                new = (old.seen[:, None] + torch.arange(T, device=rows.key.device))[:, None].expand(B, K, T)
                self.entering[name] = fixed(rows.key, rows.value, new)
                self.held[name] = slots(fixed(old.keys, old.values, old.positions))
        memory = rows.query.new_zeros(B, K, past, self.rule.memory) if old.memory is None else old.memory
        if self.rule.precompute is not None:
            whole = Sequence(rows.query.reshape(B, K, H // K, T, D), rows.key, rows.value, rows.length, options.scale)
            self.entering["memory"] = self.rule.precompute(whole)
            memory = self.entering["memory"][:, :, :0]
        self.held["memory"] = slots(memory)
        self.positions = slots(old.positions, fill=-1)
        self.gone: list[Tensor] = []

    def run(self) -> Ran:
        """All tokens of all rows."""
        rows, (B, H, T, _) = self.rows, self.rows.query.shape
        output = rows.query.new_zeros(B, H, T, rows.value.shape[-1])
        length = rows.length.tolist()
        going = B
        for t in range(max(length)):
            while length[going - 1] <= t:
                going -= 1
            output[:going, :, t] = self._step(t, going)
        none = torch.empty(0, 4, dtype=torch.int64, device=rows.query.device)
        return Ran(output, self._state(), torch.cat([none, *self.gone]) if self.options.trace else None)

    def _step(self, t: int, going: int) -> Tensor:
        """Token `t` of the first `going` rows: insert, attend, score, evict; its output [going, H, V]."""
        numbers = self._numbers(going)
        now = (self.rows.state.seen[:going] + t)[:, None, None]
        positions = self.positions[:going]
        held = {name: x[:going] for name, x in self.held.items()}
        # insert into the first free slot
        slot = (positions < 0).int().argmax(-1, keepdim=True)
        positions.scatter_(2, slot, now.expand_as(slot))
        for name, x in held.items():
            at = slot if x.ndim == 3 else slot[..., None].expand(-1, -1, -1, x.shape[-1])
            if name in self.entering:
                x.scatter_(2, at, self.entering[name][:going, :, t : t + 1])
            else:
                x.scatter_(2, at, 0)
        # attend
        cached = positions >= 0
        logits = _product(self.query[:going, :, :, t], held["keys"].transpose(2, 3))
        p = logits.masked_fill_(~cached[:, :, None], -torch.inf).softmax(-1)
        out = _product(p, held["values"]).flatten(1, 2)
        # score
        count = cached.sum(-1, keepdim=True)
        scores = held["scores"]
        if self.rule.scored:
            fresh = scores * numbers.factor + mass(self.rule, p, count)
            scores.copy_(fresh if self.rule.cut is None else torch.where(numbers.scored(now), fresh, scores))
        self._evict(t, numbers, held, positions, p, cached, now, numbers.excess(count, now))
        return out

    def _evict(
        self,
        t: int,
        numbers: Numbers,
        held: dict[str, Tensor],
        positions: Tensor,
        p: Tensor,
        cached: Tensor,
        now: Tensor,
        excess: Tensor,
    ) -> None:
        most = int(excess.max())
        looks = self.rule.memory > 0 or (self.rule.cut is not None and bool(numbers.at_cut(now).any()))
        if most == 0 and not looks:
            return
        free = unprotected(numbers, positions, cached, now)
        step = Step(p, held["keys"], held["values"], positions, cached, now, held["scores"], held["memory"])
        if self.rule.cut is not None:
            held["scores"].copy_(torch.where(numbers.at_cut(now), pooled(numbers, step, free), step.scores))
        if self.rule.priority_fn is not None:
            priority, memory = of_own(self.rule, step, free)
            held["memory"].copy_(memory)
        else:
            priority = of_rule(numbers, step, held.get("weight"), held.get("bias"))
        if most == 0:
            return
        if most == 1:
            # the same as below, without sorting
            order = torch.where(free, priority, torch.inf).nan_to_num_(torch.inf, torch.inf, -torch.inf)
            least = free & (order == order.amin(-1, keepdim=True))
            position, slot = torch.where(least, positions, LATE).min(-1, keepdim=True)
            out = torch.zeros_like(free).scatter_(2, slot, (excess > 0) & (position < LATE))
        else:
            out = smallest(priority, positions, free, excess)
        if numbers.across_heads:
            out = torch.where(numbers.at_cut(now), smallest_of_all_heads(numbers, priority, step, free), out)
        self._note(t, out, positions)
        where = out.nonzero(as_tuple=True)
        positions[where] = -1
        for x in held.values():
            x[where] = 0  # free slots are 0

    def _numbers(self, going: int) -> Numbers:
        if going < self.numbers.factor.shape[0]:
            tensors = ("budget", "recent", "sinks", "factor", "prompt")
            self.numbers = replace(self.numbers, **{n: getattr(self.numbers, n)[:going] for n in tensors})
        return self.numbers

    def _note(self, t: int, out: Tensor, positions: Tensor) -> None:
        if self.options.trace:
            row, head, column = out.nonzero(as_tuple=True)
            self.gone.append(torch.stack([row, head, torch.full_like(row, t), positions[row, head, column]], 1))

    def _state(self) -> EvictionState:
        """The slots in canonical form."""
        order = self.positions.where(self.positions >= 0, LATE).argsort(dim=-1)
        order = order[:, :, : max(1, int((self.positions >= 0).sum(-1).max()))]
        positions = self.positions.gather(2, order)

        def of(name: str) -> Tensor:
            x = self.held[name]
            x = x[..., None] if x.ndim == 3 else x
            kept = x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))
            return kept.where(positions[..., None] >= 0, 0)

        keeps = self.rule.priority_fn is not None and self.rule.precompute is None
        return EvictionState(
            positions=positions,
            scores=of("scores")[..., 0],
            keys=of("keys"),
            values=of("values"),
            seen=self.rows.state.seen + self.rows.length,
            memory=of("memory") if keeps else None,
        )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [B, K, G, X] @ b [B, K, X, Y]; at least two products at a time, because torch computes a single one otherwise."""
    B, K = a.shape[:2]
    left, right = a.flatten(0, 1), b.flatten(0, 1)
    if B * K == 1:
        left, right = left.expand(2, -1, -1), right.expand(2, -1, -1)
    return torch.bmm(left, right)[: B * K].unflatten(0, (B, K))
