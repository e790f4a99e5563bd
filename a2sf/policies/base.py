"""What every token-pruning method states.

A policy is data: for a budget of `C` cached tokens it says how many of them are the newest (`recent`), how many are the
first (`sinks`), and how fast an accumulated attention score is forgotten. One engine (`a2sf.engine`) runs them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

UNLIMITED = 2**31 - 1
"""A budget that no sequence reaches: nothing is evicted."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What one layer keeps of one sequence: the numbers of the recursion in docs/semantics.md.

    Attributes:
        budget: cached tokens a KV head may hold between two steps, `C >= 1`.
        recent: the newest tokens that are never evicted, `r`.
        sinks: the first tokens that are never evicted, `s`; `r + s <= C`.
        forgetting_factor: what an accumulated score is multiplied by at every step, `0 <= a <= 1`.

    Raises:
        ValueError: if a number is out of range.
    """

    budget: int
    recent: int = 0
    sinks: int = 0
    forgetting_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1 token, got {self.budget}")
        if self.recent < 0 or self.sinks < 0 or self.recent + self.sinks > self.budget:
            raise ValueError(
                f"recent ({self.recent}) + sinks ({self.sinks}) must lie between 0 and the budget ({self.budget})"
            )
        if not 0.0 <= self.forgetting_factor <= 1.0:
            raise ValueError(f"forgetting_factor must lie in [0, 1], got {self.forgetting_factor}")


@dataclass(kw_only=True)
class Policy(ABC):
    """A token-pruning method: its numbers as fields, and what they mean at a given budget.

    A new method is one subclass in a file of its own under `baselines/` and one YAML under `conf/policy/`.
    """

    name: ClassVar[str]
    """Identifies the policy in configs, results and tables."""
    label: ClassVar[str]
    """How tables and plots spell it."""
    uses_budget: ClassVar[bool] = True
    """False where the budget is ignored, so that all budgets are one cell."""

    @property
    def least_budget(self) -> int:
        """The smallest budget that holds what the policy protects; a smaller `budget.tokens` is refused."""
        return 1

    @abstractmethod
    def retention(self, budget: int, layer: int) -> Retention:
        """What layer `layer` (from 0) keeps when it may hold `budget` tokens."""

    def check(self, layers: int) -> None:  # noqa: B027 (most policies have nothing to check)
        """Raise `ConfigError` where a setting does not fit a model of `layers` layers."""
