"""Mean attention: accumulated attention divided by the number of steps, so that old tokens have no advantage.

Source: the mean attention score of Ren and Zhu, 2024 (RoCo, arXiv 2402.06262). With A2SF's forgetting factor `a` (arXiv
2407.20485) the priority is `A_j / N_j`, where `N_j` is the sum of `a^i` for `i` from 0 to the token's age. With `a = 1`
this is the mean, with `a < 1` an exponential moving average with bias correction. Deviations: RoCo also protects the
tokens whose attention varies most. This policy does not; it has a recent window instead, because the mean of a new
token is not reliable.
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
    """A2SF, with tokens ranked by mean instead of accumulated attention.

    Attributes:
        forgetting_factor: as for A2SF.
        recent_share: as for A2SF.
        recent: as for A2SF.
        sinks: as for A2SF.
    """

    name: ClassVar[str] = "mean_attention"
    label: ClassVar[str] = "Mean attention"

    forgetting_factor: Any = 1.0
    recent_share: float = 0.25

    def retention(self, budget: int, layer: int) -> Retention:
        return replace(super().retention(budget, layer), rule=MEAN)
