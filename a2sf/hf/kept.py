"""What a layer of a bounded cache keeps of each row and when, as the engine and the compiled cache take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from a2sf.engine.state import EvictionState, Segments
from a2sf.errors import UserError
from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.rule import ACCUMULATED, Rule
from a2sf.policies.schedule import STEP, Schedule
from a2sf.policies.slots import head_slots


class Kept:
    """What is kept of each row.

    Args:
        rows: of each row; all of one rule.
        schedule: when tokens are evicted.
        prompt: tokens of each row's prompt, for the prompt schedule.

    Raises:
        UserError: if the rows have several rules.
    """

    def __init__(self, rows: list[Retention], schedule: Schedule = STEP, prompt: Sequence[int] | None = None) -> None:
        self.rows, self.schedule = rows, schedule
        self.prompt = torch.tensor(prompt, dtype=torch.int64) if schedule.prompt and prompt is not None else None
        self.budget, self.recent, self.sinks = (
            torch.tensor([getattr(r, name) for r in rows], dtype=torch.int64) for name in ("budget", "recent", "sinks")
        )
        rules = {r.rule for r in rows}
        if len(rules) > 1:
            raise UserError("the policy has other rules at other budgets; give each row of a batch the same budget")
        self.ranked = rules.pop() if rules else ACCUMULATED
        self.factor = torch.tensor([r.forgetting_factor for r in rows], dtype=torch.float64)
        self.most = max((r.budget for r in rows), default=0) + schedule.spare
        """The most tokens that a head holds between two steps, outside of a prompt."""
        # as the compiled cache takes them, made once instead of at every token
        numbers = (x.numpy() for x in (self.budget, self.recent, self.sinks, self.factor))
        self.numbers = dict(zip(("budget", "recent", "sinks", "forgetting_factor"), numbers, strict=True))

    def segments(self, start: Tensor, length: Tensor) -> Segments:
        """One segment per row, `[start, start + length)`, int64 [B] each."""
        return Segments(
            row=torch.arange(len(start)),
            start=start,
            length=length,
            parent=torch.full_like(start, -1),
            budget=self.budget,
            recent=self.recent,
            sinks=self.sinks,
            forgetting_factor=self.factor,
            rule=self.ranked,
            schedule=self.schedule,
            prompt=self.prompt,
        )

    def select(self, rows: list[int]) -> Kept:
        """What is kept of `rows`, in that order."""
        prompt = None if self.prompt is None else self.prompt[rows].tolist()
        return Kept([self.rows[i] for i in rows], self.schedule, prompt)

    @property
    def across_heads(self) -> bool:
        """Whether the prompt's cut shifts slots between the heads of a layer."""
        return self.ranked.cut is not None and self.ranked.cut.floor is not None

    @property
    def whole(self) -> tuple[int, ...]:
        """Heads that keep everything and can be kept apart; a policy's own function may look at all of them."""
        return () if self.ranked.priority_fn is not None else self.ranked.full_heads

    @cached_property
    def everything(self) -> Kept:
        """What the heads keep that keep everything."""
        return Kept([Retention(budget=UNLIMITED, forgetting_factor=r.forgetting_factor) for r in self.rows])

    @cached_property
    def others(self) -> Kept:
        """What the other heads keep."""
        return self._ranked_by(replace(self.ranked, full_heads=()), self.schedule)

    @cached_property
    def after(self) -> Kept:
        """What is kept from when every row's prompt has been read and cut: step by step, or everything.

        Itself where the schedule has no prompt, or goes on in a way that only the prompt schedule says.
        """
        if self.prompt is None or (self.across_heads and self.schedule.then == "step"):
            return self
        rule = self.ranked
        scored = rule.scored and rule.cut is None  # what looks at the end of the prompt looks at nothing later
        if self.schedule.then == "step":
            return self._ranked_by(replace(rule, cut=None, scored=scored), STEP)
        if not rule.memory:
            rule = Rule(scored=scored, count_above_uniform=rule.count_above_uniform)  # nothing is evicted
        return Kept([Retention(budget=UNLIMITED, forgetting_factor=r.forgetting_factor, rule=rule) for r in self.rows])

    def read(self, seen: Tensor) -> bool:
        """Whether no row is in its prompt any more when `seen` int64 [B] tokens of each were read."""
        return self.prompt is None or bool((seen.cpu() >= self.prompt).all())

    def check(self, state: EvictionState) -> None:
        """Refuse a state that this could not have led to.

        Raises:
            UserError: if it holds more than it may, or was made by another policy.
        """
        memory = None if state.memory is None else state.memory.shape[-1]
        apart = self.ranked.shared and not bool((state.positions == state.positions[:, :1]).all())
        if apart or memory != (self.ranked.memory if self.ranked.priority_fn is not None else None):
            raise UserError(
                "a state was made by another policy than this cache's; make a cache with the state's policy"
            )
        held = (state.positions >= 0).sum(-1).cpu()
        held[:, list(self.ranked.full_heads)] = 0
        most, seen = self._largest() + self.schedule.spare, state.seen.cpu()
        if self.prompt is not None:
            later = (seen - self.prompt).clamp(min=0) if self.schedule.then == "keep" else 0
            most = torch.where(seen < self.prompt, held.amax(-1), most + later)
        fits = held.sum(-1) <= most * held.shape[1] if self.across_heads else held.amax(-1) <= most
        if not bool(fits.all()):
            raise UserError("a state holds more tokens than this cache's budget; make a cache with the state's budget")

    def _largest(self) -> Tensor:
        """The budget of each row, int64 [B]; of its largest head, where heads have numbers of their own."""
        if not self.ranked.heads:
            return self.budget
        return torch.tensor([max(C for C, _, _ in head_slots(self.ranked.heads, n)) for n in self.budget.tolist()])

    def _ranked_by(self, rule: Rule, schedule: Schedule) -> Kept:
        prompt = None if self.prompt is None else self.prompt.tolist()
        return Kept([replace(r, rule=rule) for r in self.rows], schedule, prompt)
