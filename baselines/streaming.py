"""StreamingLLM: the first tokens (attention sinks) are retained; the rest of the budget is a sliding window.

Paper: Xiao et al., 2023 (arXiv 2309.17453): the first tokens receive much attention whatever they are, because a
softmax must sum to 1, and a model writes nonsense once they are evicted. Deviations: keys keep the rotary position of
their token (the paper renumbers positions in the cache). If a ratio gives a short sequence fewer slots than there are
sinks, all slots are for sinks; `budget.tokens` below the number of sinks is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a2sf.policies.base import Policy, Retention, check_tokens


@dataclass(frozen=True, kw_only=True)
class Streaming(Policy):
    """Sinks and a window.

    Attributes:
        sinks: how many of the first tokens are never evicted (the paper uses 4).
    """

    name: ClassVar[str] = "streaming"
    label: ClassVar[str] = "StreamingLLM"

    sinks: int = 4

    def __post_init__(self) -> None:
        check_tokens("policy.sinks", self.sinks)

    @property
    def min_budget(self) -> int:
        return max(1, self.sinks)

    def retention(self, budget: int, layer: int) -> Retention:
        sinks = min(self.sinks, budget)
        return Retention(budget=budget, sinks=sinks, recent=budget - sinks)
