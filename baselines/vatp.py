"""VATP: accumulated attention multiplied by the norm of the value.

Paper: Guo et al., 2024 (arXiv 2406.12335): H2O with the priority `A_j * ||v_j||_1`. The first tokens are retained,
because they receive much attention although their values are small. Deviations: the recent window and the sinks share the
budget; if both do not fit, sinks come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from a2sf.policies.base import Policy, Retention, check_share, check_tokens, share_of
from a2sf.policies.rule import Rule


def value_norm(keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """`||v||_1` of each token."""
    return values.abs().sum(-1)


BY_VALUE = Rule(weight=value_norm)


@dataclass(frozen=True, kw_only=True)
class VATP(Policy):
    """H2O's score multiplied by the norm of the value, with sinks.

    Attributes:
        recent_share: share of the budget for the recent window, from 0 to 1.
        sinks: how many of the first tokens are never evicted.
    """

    name: ClassVar[str] = "vatp"
    label: ClassVar[str] = "VATP"

    recent_share: float = 0.5
    sinks: int = 4

    def __post_init__(self) -> None:
        check_share("policy.recent_share", self.recent_share)
        check_tokens("policy.sinks", self.sinks)

    @property
    def min_budget(self) -> int:
        return max(1, self.sinks)

    def retention(self, budget: int, layer: int) -> Retention:
        sinks = min(self.sinks, budget)
        recent = min(share_of(budget, self.recent_share), budget - sinks)
        return Retention(budget=budget, recent=recent, sinks=sinks, rule=BY_VALUE)
