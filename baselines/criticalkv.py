"""CriticalKV: first the best tokens of another policy, then those of its priority times the norm of the projected value.

Paper: Feng et al., 2025 (arXiv 2502.03805): the error that an eviction causes in the output of a layer is bounded by
attention times `||W_o v||_1`, where `W_o` is the projection after the attention. So `first` of the budget is for the
tokens of the highest attention, and the rest for those of the highest product. Deviations: priorities may be any
policy's that are not negative, SnapKV's by default; protected tokens take places of the first half, as in kvpress; the
norm is the mean over the query heads of the group, and each head retains its own tokens, also if `by` retains the same
in all heads. kvpress adds 1e-4 of mean attention before the product (`epsilon`, here 0; SnapKV's priorities are sums
over the window and the group). Without a model (a2sf.attend) no projection is known, and the value's own norm counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from a2sf.errors import ConfigError
from a2sf.policies.base import Retention, check_share
from a2sf.policies.ranking import Ranking
from a2sf.policies.rule import Step
from baselines.by import By


@dataclass(frozen=True)
class InTwoParts:
    """The best tokens of a ranking, and then those of its priorities times the norm of the projected value."""

    ranking: Ranking
    first: float
    epsilon: float
    by: str

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        priority, memory = self.ranking(step)
        assert step.budget is not None
        assert step.evictable is not None
        if bool(((priority < 0) & step.evictable).any()):
            raise ConfigError(
                "policy.by",
                self.by,
                "its priorities may be negative; give a policy that ranks by attention, such as snapkv or h2o",
            )
        share = Fraction(str(self.first))
        protected = (step.cached & ~step.evictable).sum(-1, keepdim=True)
        places = step.budget * share.numerator // share.denominator - protected
        newest = step.positions.argsort(dim=-1, descending=True)  # ties: the oldest is evicted first
        ranked = priority.masked_fill(~step.evictable, -torch.inf).gather(-1, newest)
        rank = newest.gather(-1, ranked.argsort(dim=-1, descending=True, stable=True)).argsort(dim=-1)
        norms = step.values.abs().sum(-1) if step.projection is None else step.projection.lengths(step.values)
        return ((priority + self.epsilon) * norms).masked_fill(rank < places, torch.inf), memory


@dataclass(frozen=True, kw_only=True)
class CriticalKV(By):
    """Another policy's priorities, and these times the norm of the projected value.

    Attributes:
        by: the other policy: its name, or a mapping of its `name` and settings.
        first: share of the budget, from 0 to 1, for the tokens that the other policy ranks first.
        epsilon: what is added to the other policy's priorities before the product.
    """

    name: ClassVar[str] = "criticalkv"
    label: ClassVar[str] = "CriticalKV"
    schedules: ClassVar[tuple[str, ...]] = ("prompt",)  # of the default `by`
    projected: ClassVar[bool] = True
    tried: ClassVar[bool] = True  # priorities may not be negative

    first: float = 0.5
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("policy.first", self.first)
        number = isinstance(self.epsilon, int | float) and not isinstance(self.epsilon, bool)
        if not number or not 0 <= self.epsilon < float("inf"):
            raise ConfigError("policy.epsilon", self.epsilon, "give a number, at least 0")

    def changed(self, ranking: Ranking) -> InTwoParts:
        return InTwoParts(ranking, self.first, self.epsilon, self.inner.name)

    def retention(self, budget: int, layer: int) -> Retention:
        stated = super().retention(budget, layer)
        return replace(stated, rule=replace(stated.rule, projected=True, shared=False))
