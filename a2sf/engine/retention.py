"""`BatchRetention`: what policies retain of several sequences, as tensors; and which tokens a step may evict.

Shapes: n sequences (segments or rows), B rows, K key/value heads, N columns (cached tokens in any order).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from a2sf.errors import ConfigError, UserError
from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.budget import Growth
from a2sf.policies.prepared import Numbers
from a2sf.policies.rule import ACCUMULATED, Rule
from a2sf.policies.schedule import STEP, Schedule

Batch = TypeVar("Batch", bound="BatchRetention")


@dataclass(frozen=True, kw_only=True)
class BatchRetention:
    """The `Retention` of each of n sequences, which follow one rule and one schedule.

    Attributes:
        budget, recent, sinks: int64 [n], `C`, `r` and `s` of docs/semantics.md.
        forgetting_factor: float64 [n], `a`.
        rule: how tokens are ranked.
        schedule: when they are evicted.
        prompt: int64 [n], tokens of each sequence's prompt; for the prompt schedule alone.
        prepared: [n, K, P], numbers that the policy prepared for the prompts' tokens; None: it has none.
        growth: of each sequence whose budget grows with the text; the numbers above are then those of the first step at
            which it may evict. None: none grows.
        given_back: int64 [n], only in numbers of one step (`at`): how many tokens each KV head of a growing sequence evicts
            after a cut that gave each a share of its own; -1 for the others.
    """

    budget: Tensor
    recent: Tensor
    sinks: Tensor
    forgetting_factor: Tensor
    rule: Rule = ACCUMULATED
    schedule: Schedule = STEP
    prompt: Tensor | None = None
    prepared: Tensor | None = None
    growth: tuple[Growth | None, ...] | None = None
    given_back: Tensor | None = None

    @staticmethod
    def of(
        retentions: Sequence[Retention], schedule: Schedule = STEP, prompt: Sequence[int] | Tensor | None = None
    ) -> BatchRetention:
        """One sequence per retention; `prompt` is used by the prompt schedule alone.

        Raises:
            UserError: if their rules differ, or a threshold's steps depend on a budget that grows.
        """
        rules = {r.rule for r in retentions}
        if len(rules) > 1:
            raise UserError(
                "the policy has other rules at other budgets, or its `retention` makes a new function at each call; give "
                "each row of a batch the same budget, or define the function outside of `retention`"
            )
        growth = _if_any_grows([r.growth for r in retentions])
        if growth is not None and schedule.spare and any(r.threshold is not None for r in rules):
            raise UserError(
                "a policy with a threshold evicts every so many tokens from a full budget on, so its budget cannot grow; "
                "give budget.base=total or context, or schedule=step"
            )
        budget, recent, sinks = _integers(retentions)
        return BatchRetention(
            budget=budget,
            recent=recent,
            sinks=sinks,
            forgetting_factor=torch.tensor([r.forgetting_factor for r in retentions], dtype=torch.float64),
            rule=rules.pop() if rules else ACCUMULATED,
            schedule=schedule,
            prompt=torch.as_tensor(prompt, dtype=torch.int64) if schedule.prompt and prompt is not None else None,
            prepared=_padded([r.prepared for r in retentions]),
            growth=growth,
        )

    def retention(self) -> dict[str, Any]:
        """The fields of `BatchRetention` alone by name, as arguments for its constructor or a subclass's."""
        return {f.name: getattr(self, f.name) for f in fields(BatchRetention)}

    def select(self: Batch, rows: Tensor | slice) -> Batch:
        """The sequences `rows`, in that order."""
        chosen = self._map(lambda x: x[rows])
        if self.growth is None:
            return chosen
        # a mask, a slice or indices
        places = torch.arange(len(self.growth))[rows.cpu() if isinstance(rows, Tensor) else rows].tolist()
        return replace(chosen, growth=_if_any_grows([self.growth[i] for i in places]))

    def to(self: Batch, device: torch.device) -> Batch:
        """The same on `device`."""
        return self._map(lambda x: x.to(device))

    def _map(self: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = ((f.name, x) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor))
        changed: dict[str, Any] = {name: change(x) for name, x in tensors}
        return replace(self, **changed)

    def unlimited(self: Batch, rule: Rule) -> Batch:
        """The same sequences with nothing evicted; `rule` says which scores are computed."""
        none = torch.zeros_like(self.recent)
        numbers = {"budget": torch.full_like(self.budget, UNLIMITED), "recent": none, "sinks": none}
        return replace(self, **numbers, rule=rule, schedule=STEP, prompt=None, prepared=None, growth=None)

    def at(self: Batch, positions: Tensor) -> Batch:
        """The numbers of one step, that of the token at `positions` int64 [n] of each sequence."""
        if self.growth is None:
            return self
        each = [None if g is None else g.at(p) for g, p in zip(self.growth, positions.tolist(), strict=True)]
        rows = torch.tensor([i for i, k in enumerate(each) if k is not None], dtype=torch.int64)
        now = _integers([k for k in each if k is not None])
        changed: dict[str, Any] = {
            name: getattr(self, name).index_put((rows.to(self.budget.device),), x.to(self.budget.device))
            for name, x in zip(("budget", "recent", "sinks"), now, strict=True)
        }
        if self.across_heads:
            grown = zip(self.growth, positions.tolist(), strict=True)
            spare = self.schedule.spare
            given = [-1 if g is None else g.given_back(p, spare) for g, p in grown]
            changed["given_back"] = torch.tensor(given, device=self.budget.device)
        return replace(self, growth=None, **changed)

    def after(self: Batch, seen: Tensor) -> Batch:
        """The numbers of the step at which `seen` int64 [n] tokens of each sequence are read."""
        return self if self.growth is None else self.at((seen - 1).clamp(min=0))

    def after_prompt(self: Batch) -> Batch:
        """What is retained once every prompt has been read and cut: step by step, or everything."""
        # a rule that looks at the end of the prompt looks at nothing later
        rule, scored = self.rule, self.rule.scored and self.rule.cut is None
        if self.schedule.then != "keep":
            # a function may see how long the prompt was, and steps of a threshold are counted from it
            seen = self.prompt if rule.calls or rule.threshold is not None else None
            return replace(self, rule=replace(rule, cut=None, scored=scored), schedule=self.schedule.after, prompt=seen)
        # nothing is evicted, so that no priority is needed
        return self.unlimited(Rule(scored=scored, count_above_uniform=rule.count_above_uniform))

    @cached_property
    def most(self) -> int:
        """The most tokens that a KV head holds between two steps, outside of a prompt; no bound if a budget grows."""
        return int(self.budget.max()) + self.schedule.spare if self.growth is None else UNLIMITED

    def prompts_read(self, seen: Tensor) -> bool:
        """Whether no row is in its prompt any more when `seen` int64 [n] tokens of each were read."""
        return not self.schedule.prompt or self.prompt is None or bool((seen.cpu() >= self.prompt).all())

    def rule_finished(self, seen: Tensor) -> Tensor:
        """bool [n]: of which sequences nothing is evicted after `seen` [n] tokens, so that no function is called."""
        if not self.schedule.prompt or self.schedule.then != "keep" or self.prompt is None:
            return torch.zeros_like(seen, dtype=torch.bool)
        return seen >= self.prompt

    @property
    def across_heads(self) -> bool:
        """Whether the prompt's cut shifts slots between the heads of a layer."""
        return self.rule.cut is not None and self.rule.cut.floor is not None

    def per_head(self, heads: int, dtype: torch.dtype) -> BatchRetention:
        """The same numbers to compute with columns: [n, 1, 1], the budget [n, K, 1] and the factor in `dtype`."""
        prepared = None if self.prepared is None else self.prepared.to(dtype)
        plain = BatchRetention(**self.retention() | {"growth": None, "prepared": None})
        columns = plain._map(lambda x: x[:, None, None])
        budget = columns.budget.repeat(1, heads, 1)
        budget[:, full_heads_of(self.rule, heads)] = UNLIMITED
        factor = columns.forgetting_factor.to(dtype)
        return replace(columns, budget=budget, forgetting_factor=factor, prepared=prepared)

    # what follows is for numbers `per_head`; `now` is int64 [B, 1, 1], the position of each row's newest token

    def scores_now(self, now: Tensor) -> Tensor:
        """bool [B, 1, 1]: whether the attention at time `now` adds to the scores."""
        if self.rule.cut is None or not self.rule.scored or self.prompt is None:
            return torch.full_like(now, self.rule.scored and self.rule.cut is None, dtype=torch.bool)
        return (now >= self.prompt - self.recent) & (now < self.prompt)

    def at_cut(self, now: Tensor) -> Tensor:
        """bool [B, 1, 1]: whether `now` is the prompt's last token, after which it is cut."""
        if self.prompt is None or not self.schedule.prompt:
            return torch.zeros_like(now, dtype=torch.bool)
        return now == self.prompt - 1

    def updates_memory(self, now: Tensor) -> Tensor:
        """bool [B, 1, 1]: whether the rule's function is called for its memory at time `now`, even without an eviction."""
        if not self.rule.memory:
            return torch.zeros_like(now, dtype=torch.bool)
        return ~self.rule_finished(now)

    def evicts_many(self, excess: Tensor, now: Tensor) -> Tensor:
        """bool [B, 1, 1]: whether a row's step is one at which the schedule evicts many tokens at once."""
        if self.schedule.spare:
            return (excess > 0).any(1, keepdim=True) | self.at_cut(now)
        return self.at_cut(now)

    def excess(self, count: Tensor, now: Tensor) -> Tensor:
        """int64 [B, K, 1]: how many of `count` [B, K, 1] cached tokens are evicted at time `now`."""
        over = (count - self.budget).clamp(min=0)
        if self.rule.threshold is not None:  # as many as may leave, which those of a high priority do not
            return over.where(self.due(now), 0)
        if not self.schedule.prompt:
            return over.where(over > self.schedule.spare, 0)
        assert self.prompt is not None
        later = torch.zeros_like(over)
        if self.schedule.then != "keep":
            later = over.where(over > self.schedule.spare, 0)
            if self.across_heads:
                # the cut gave every head a share of its own, and each head gives back what came since
                every = self.schedule.spare + 1
                since = torch.where((now + 1 - self.prompt) % every == 0, every, 0).expand_as(over)
                later = since.where(self.prompt > self.budget, later)
                if self.given_back is not None:
                    later = torch.where(self.given_back < 0, later, self.given_back)
        return torch.where(now < self.prompt - 1, 0, torch.where(self.at_cut(now), over, later))

    def due(self, now: Tensor) -> Tensor:
        """bool [B, K, 1]: whether tokens below a threshold leave at time `now`.

        How many are cached does not say it, since any number may stay: under `every` it is each such number of tokens, the
        first time once the budget and as many are read, as without a threshold.
        """
        if self.schedule.prompt and self.schedule.then == "keep":
            return self.at_cut(now).expand_as(self.budget)
        begin = self.budget if self.prompt is None else torch.maximum(self.budget, self.prompt)
        since = now + 1 - begin
        return (since >= 0) & (since % (self.schedule.spare + 1) == 0)

    def unprotected(self, positions: Tensor, cached: Tensor, now: Tensor) -> Tensor:
        """bool [B, K, N]: the `cached` tokens that may be evicted at time `now`."""
        return cached & (positions >= self.sinks) & (positions <= now - self.recent)


def full_heads_of(rule: Rule, heads: int) -> list[int]:
    """The key/value heads of a layer that evict nothing, of `heads` that it has.

    Raises:
        ConfigError: if the layer does not have one of them.
    """
    if (last := max(rule.full_heads, default=0)) >= heads:
        raise ConfigError("full_heads", last, f"the layer has {heads} key/value heads, which are counted from 0")
    return list(rule.full_heads)


def _integers(retentions: Sequence[Retention]) -> tuple[Tensor, ...]:
    """Budget, recent and sinks of each, int64 [n]."""
    numbers = [[r.budget, r.recent, r.sinks] for r in retentions]
    return torch.tensor(numbers, dtype=torch.int64).view(len(numbers), 3).T.contiguous().unbind(0)


def _if_any_grows(growth: Sequence[Growth | None]) -> tuple[Growth | None, ...] | None:
    """`growth`, or None if no sequence's budget grows."""
    return tuple(growth) if any(g is not None for g in growth) else None


def _padded(numbers: Sequence[Numbers | None]) -> Tensor | None:
    """The prepared numbers of each sequence, [n, K, P], padded with 0; None if no sequence has any."""
    known = [n.of for n in numbers if n is not None]
    if not known:
        return None
    made = known[0].new_zeros(len(numbers), known[0].shape[0], max(x.shape[1] for x in known))
    for row, one in zip(made, numbers, strict=True):
        if one is not None:
            row[:, : one.of.shape[1]] = one.of
    return made
