"""Mean attention: accumulated attention over the steps it was accumulated in, so that age is no advantage.

Source: the mean attention score of Ren and Zhu, 2024 (RoCo, arXiv 2402.06262), with A2SF's forgetting factor (2407.20485):
`A_j / N_j`, where `N_j` is the sum of `a^i` for `i` from 0 to the token's age. For `a = 1` that is the plain mean, for
`a < 1` a moving mean whose start is corrected. Deviations: RoCo also protects tokens whose attention varies most; this does
not, and keeps a recent window because a new token's mean says little yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from a2sf.policies.a2sf import A2SF
from a2sf.policies.base import Retention
from a2sf.policies.rule import Rule

MEAN = Rule(mean_over_age=True)


@dataclass(frozen=True, kw_only=True)
class MeanAttention(A2SF):
    """A2SF's numbers, ranked by the mean instead of the sum.

    Attributes:
        forgetting_factor, recent_share, recent, sinks: as for A2SF.
    """

    name: ClassVar[str] = "mean_attention"
    label: ClassVar[str] = "Mean attention"

    forgetting_factor: Any = 1.0
    recent_share: float = 0.25

    def retention(self, budget: int, layer: int) -> Retention:
        return replace(super().retention(budget, layer), rule=MEAN)
