"""H2O: retain the tokens with the most accumulated attention (heavy hitters) and the newest tokens.

Paper: Zhang et al., 2023 (arXiv 2306.14048): a few tokens, the heavy hitters, receive most of the attention. The
priority is accumulated attention; a share of the budget is for the newest tokens. Deviations: the budget is divided
after it is rounded, so that all policies have the same budget (the published code uses floor(ratio/2 * T) twice, which
may be one token less); heavy hitters are chosen causally (the published lm-eval code for LLaMA also uses the attention
of later queries).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a2sf.policies.base import Policy, Retention, check_share, share_of


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Heavy hitters and a recent window, without forgetting.

    Attributes:
        recent_share: share of the budget for the recent window, from 0 to 1.
    """

    name: ClassVar[str] = "h2o"
    label: ClassVar[str] = "H2O"

    recent_share: float = 0.5

    def __post_init__(self) -> None:
        check_share("policy.recent_share", self.recent_share)

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=share_of(budget, self.recent_share))
