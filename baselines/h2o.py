"""H2O: keep the tokens with the most accumulated attention (heavy hitters), and the most recent ones.

Paper: Zhang et al., 2023 (arXiv 2306.14048). Deviations: the budget is split after it is resolved, so that all policies
get the same (the published code takes floor(ratio/2 * T) twice and can be one token short); heavy hitters are chosen
causally (the published lm-eval path for LLaMA looks at the attention of later queries too).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a2sf.policies.base import Policy, Retention, check_share, share_of


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Heavy hitters and a recent window, nothing forgotten.

    Attributes:
        recent_share: share of the budget that the recent window takes, from 0 to 1.
    """

    name: ClassVar[str] = "h2o"
    label: ClassVar[str] = "H2O"

    recent_share: float = 0.5

    def __post_init__(self) -> None:
        check_share("policy.recent_share", self.recent_share)

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=share_of(budget, self.recent_share))
