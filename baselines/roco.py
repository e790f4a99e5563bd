"""RoCo: of the tokens whose attention varies least, the one with the smallest mean attention is evicted.

Paper: Ren and Zhu, 2024 (arXiv 2402.06262): a token's score is its mean attention since it was cached, `A / N`. Tokens with
a high standard deviation of attention are not evicted, because their mean is not reliable: as many as `varying` says, in
which the newest tokens are included, as in the authors' code (EasyKV: 0.3 of the budget, and 10 newest tokens).
Deviations: the query heads of a group share one score, their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from a2sf.policies.base import Policy, Retention, check_share, check_tokens, share_of
from a2sf.policies.rule import AttentionRows, Step


@dataclass(frozen=True, kw_only=True)
class RoCo(Policy):
    """Mean attention, among the tokens whose attention varies least.

    Attributes:
        varying: share of the budget, from 0 to 1, for the tokens whose attention varies most.
        recent: how many of the newest tokens are among these.
    """

    name: ClassVar[str] = "roco"
    label: ClassVar[str] = "RoCo"
    memory: ClassVar[int] = 1  # the sum of squares

    varying: float = 0.3
    recent: int = 10

    def __post_init__(self) -> None:
        check_share("policy.varying", self.varying)
        check_tokens("policy.recent", self.recent)

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=min(self.recent, share_of(budget, self.varying)))

    def remember(self, rows: AttentionRows) -> Tensor:
        return rows.memory + (rows.probabilities.mean(2) ** 2).sum(2)[..., None]

    def priorities(self, step: Step) -> Tensor:
        group, squares = step.probabilities.shape[2], step.memory[..., 0]
        times = (step.ages + 1).clamp(min=1)
        mean = step.scores / group / times
        # of the newest tokens none is evicted, so that they take their places among the varying ones
        assert step.budget is not None
        share = Fraction(str(self.varying))
        places = step.budget * share.numerator // share.denominator
        newest = step.ages < places.clamp(max=self.recent)
        variance = (squares / times - mean**2).masked_fill(~step.cached, -torch.inf).masked_fill(newest, torch.inf)
        rank = variance.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return mean.masked_fill(rank < places, torch.inf)
