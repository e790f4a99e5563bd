"""From what is cached to who goes: when a schedule evicts, a rule's priorities, and the tokens of the smallest ones.

Columns are slots in any order. B rows, K key/value heads, N columns; numbers of a row are [B, 1, 1] or [B, K, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction

import torch
from torch import Tensor

from a2sf.engine.levels import Rows
from a2sf.errors import UserError
from a2sf.policies.base import UNLIMITED
from a2sf.policies.rule import Rule, Step
from a2sf.policies.schedule import Schedule

LATE = 2**62
"""Later than any position."""
SHARE = 1 - 1e-5
"""`p * n` from which a token has its share of attention: 1, but for the rounding of equal shares."""


@dataclass(frozen=True)
class Numbers:
    """What a row's evictions depend on: int64 [B, 1, 1] or [B, K, 1], the factor floating."""

    budget: Tensor
    recent: Tensor
    sinks: Tensor
    factor: Tensor
    prompt: Tensor
    rule: Rule
    schedule: Schedule

    @staticmethod
    def of(rows: Rows) -> Numbers:
        """The numbers of `rows`."""
        integers = (x[:, None, None] for x in (rows.budget, rows.recent, rows.sinks, rows.prompt))
        budget, recent, sinks, prompt = integers
        budget = budget.repeat(1, rows.key.shape[1], 1)
        budget[:, list(rows.rule.full_heads)] = UNLIMITED
        factor = rows.forgetting_factor.to(rows.query.dtype)[:, None, None]
        return Numbers(budget, recent, sinks, factor, prompt, rows.rule, rows.schedule)

    @property
    def across_heads(self) -> bool:
        """Whether the prompt's cut shifts slots between the heads of a layer."""
        return self.rule.cut is not None and self.rule.cut.floor is not None

    def scored(self, now: Tensor) -> Tensor:
        """bool [B, 1, 1]: whether the attention at time `now` adds to the scores."""
        if self.rule.cut is None or not self.rule.scored:
            return torch.full_like(now, self.rule.scored, dtype=torch.bool)
        return (now >= self.prompt - self.recent) & (now < self.prompt)

    def at_cut(self, now: Tensor) -> Tensor:
        """bool [B, 1, 1]: whether `now` is the prompt's last token, after which it is cut."""
        return (now == self.prompt - 1) & self.schedule.prompt

    def excess(self, count: Tensor, now: Tensor) -> Tensor:
        """int64 [B, K, 1]: how many of `count` [B, K, 1] cached tokens go at time `now`."""
        over = (count - self.budget).clamp(min=0)
        if not self.schedule.prompt:
            return over.where(over > self.schedule.spare, 0)
        later = torch.zeros_like(over)
        if self.schedule.then == "step":
            # where the cut gave every head a share of its own, each step takes one from each
            later = torch.ones_like(over).where(self.prompt > self.budget, over) if self.across_heads else over
        return torch.where(now < self.prompt - 1, 0, torch.where(self.at_cut(now), over, later))


def mass(rule: Rule, probabilities: Tensor, count: Tensor) -> Tensor:
    """What a step adds to `A`, [B, K, N]: the sum of `phi(p)` over the group [B, K, G, N], with `count` cached tokens."""
    if not rule.count_above_uniform:
        return probabilities.sum(2)
    # an uncached column has p = 0
    return (probabilities * count[..., None] >= SHARE).to(probabilities.dtype).sum(2)


def of_rule(numbers: Numbers, step: Step, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`b + m * A / N` of every column, [B, K, N]; `weight` and `bias` are `m` and `b`."""
    priority = step.scores
    if numbers.rule.mean_over_age:
        priority = priority / terms(numbers.factor, step.ages)
    if weight is not None:
        priority = priority * weight
    if bias is not None:
        priority = priority + bias
    return shared(numbers.rule, priority)


def terms(factor: Tensor, ages: Tensor) -> Tensor:
    """`N`, the sum of `factor ** i` for `i` from 0 to each age; 1 for a negative age."""
    n = (ages + 1).clamp(min=1)
    geometric = -torch.expm1(n * factor.log()) / (1 - factor)
    return torch.where(factor < 1, geometric, n.to(factor.dtype))


def shared(rule: Rule, priority: Tensor) -> Tensor:
    """The same for all KV heads of a row, where the rule shares one kept set."""
    return priority.mean(1, keepdim=True).expand_as(priority) if rule.shared else priority


def pooled(numbers: Numbers, step: Step, free: Tensor) -> Tensor:
    """Scores at the prompt's cut, [B, K, N]: those of `free` tokens averaged over neighbours, the others unchanged."""
    assert numbers.rule.cut is not None
    width = numbers.rule.cut.kernel_size
    order = step.positions.where(step.cached, LATE).argsort(-1)
    alone = step.scores.where(free, 0).gather(2, order)
    mean = torch.nn.functional.avg_pool1d(alone, width, stride=1, padding=width // 2)
    return torch.empty_like(mean).scatter_(2, order, mean).where(free, step.scores)


def of_own(rule: Rule, step: Step, free: Tensor) -> tuple[Tensor, Tensor]:
    """Priorities [B, K, N] and memory [B, K, N, M] by a policy's own function.

    Raises:
        UserError: if it returns another shape or NaN, or changes what it was shown.
    """
    assert rule.priority_fn is not None
    name = getattr(rule.priority_fn, "__qualname__", repr(rule.priority_fn))
    shown = [getattr(step, f.name) for f in fields(step)]
    before = [x._version for x in shown]
    given = rule.priority_fn(step)
    if [x._version for x in shown] != before:
        changed = [f.name for f, x, v in zip(fields(step), shown, before, strict=True) if x._version != v]
        raise UserError(f"{name} changes the step's {', '.join(changed)} in place, and must only look; work on a copy")
    priority, memory = given if isinstance(given, tuple) else (given, step.memory)
    for what, x, shape in (("priorities", priority, step.scores.shape), ("memory", memory, step.memory.shape)):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        if got != tuple(shape):
            raise UserError(
                f"{name} returns {what} of shape {got}, and {tuple(shape)} is needed, as the step's tensors"
            )
    priority, memory = (x.to(step.scores.dtype) for x in (priority, memory))
    for what, x, where in (("priorities", priority, free), ("memory", memory, step.cached[..., None])):
        if bool((x.isnan() & where).any()):
            raise UserError(f"{name} returns NaN among its {what} of cached tokens; give each of them a number")
    return shared(rule, priority), memory.where(step.cached[..., None], 0)


def unprotected(numbers: Numbers, positions: Tensor, cached: Tensor, now: Tensor) -> Tensor:
    """bool [B, K, N]: the cached tokens that may be evicted at time `now`."""
    return cached & (positions >= numbers.sinks) & (positions <= now - numbers.recent)


def smallest(priority: Tensor, positions: Tensor, free: Tensor, n: Tensor) -> Tensor:
    """bool [..., N]: the `n` [..., 1] free columns of the smallest priority, of equals the oldest."""
    order = positions.argsort(dim=-1, stable=True)
    order = order.gather(-1, priority.gather(-1, order).argsort(dim=-1, stable=True))
    order = order.gather(-1, (~free).int().gather(-1, order).argsort(dim=-1, stable=True))
    chosen = torch.arange(priority.shape[-1], device=n.device) < n
    return torch.zeros_like(free).scatter_(-1, order, chosen.expand_as(order)) & free


def smallest_of_all_heads(numbers: Numbers, priority: Tensor, step: Step, free: Tensor) -> Tensor:
    """bool [B, K, N]: who goes at a cut that divides a layer's slots among its heads; all but `free` tokens stay.

    A head keeps as many of its best as a mix of two shares says: how many of the layer's best are its own, and as many as
    every head would keep.
    """
    assert numbers.rule.cut is not None
    assert numbers.rule.cut.floor is not None
    K, N = free.shape[1:]
    count, own = step.cached.sum(-1), free.sum(-1)  # [B, K]
    equal = (torch.minimum(count, numbers.budget[..., 0]) - (count - own)).clamp(min=0)
    # of equals the newest is the better one, then that of the lower head
    age = step.positions * K + torch.arange(K - 1, -1, -1, device=free.device)[:, None]
    over = (own.sum(1) - equal.sum(1))[:, None]
    ranks, ages, candidates = (x.flatten(1) for x in (priority, age, free))
    lost = smallest(ranks, ages, candidates, over).unflatten(1, (K, N)).sum(-1)
    # in units of 1 / `whole`: exact, as 0.7 is in decimal
    floor = Fraction(str(numbers.rule.cut.floor)).limit_denominator(10**9)
    part, whole = floor.numerator, floor.denominator
    mixed = (whole - part) * (own - lost) + part * equal
    share, rest = mixed // whole, mixed % whole
    best = rest.argsort(dim=-1, descending=True, stable=True)
    more = torch.arange(K, device=free.device) < (equal - share).sum(1, keepdim=True)
    share = share + torch.zeros_like(share).scatter_(1, best, more.long())
    return smallest(priority, step.positions, free, (own - share)[..., None])
