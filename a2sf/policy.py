"""What every token-pruning method states, and the A2SF policy.

A policy is data: for a budget of `C` cached tokens it says how many of them are the newest (`recent`), how many are the
first (`sinks`), and how fast an accumulated attention score is forgotten. One engine (`a2sf.eviction`) runs them all.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from a2sf.errors import ConfigError

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


@dataclass(kw_only=True)
class A2SF(Policy):
    """A2SF: accumulated attention with a forgetting factor; no recent window, no sinks.

    Idea: multiplying a token's accumulated attention by `a < 1` at every step takes away the head start that old
    tokens have merely by having been looked at more often.

    Paper: Jo and Shin, 2024 (arXiv 2407.20485), equation for `A_{n,k}`. Deviations: none; the authors' evaluation code
    takes the padded batch length as the sequence length, we take the sequence's own.

    Attributes:
        forgetting_factor: one number in [0, 1], or one per layer. 0 keeps only the last query's attention, 1 is H2O's
            score without its recent window.
    """

    name: ClassVar[str] = "a2sf"
    label: ClassVar[str] = "A2SF"

    forgetting_factor: Any = 0.1  # float | list[float]; OmegaConf has no such union

    def __post_init__(self) -> None:
        values = self.forgetting_factor
        self.forgetting_factor = check_factors(values)

    def check(self, layers: int) -> None:
        if isinstance(self.forgetting_factor, tuple) and len(self.forgetting_factor) != layers:
            raise ConfigError(
                "forgetting_factor",
                list(self.forgetting_factor),
                f"a list needs one factor per layer, {layers} for this model, and this one has "
                f"{len(self.forgetting_factor)}",
            )

    def retention(self, budget: int, layer: int) -> Retention:
        factor = self.forgetting_factor
        return Retention(budget=budget, forgetting_factor=factor[layer] if isinstance(factor, tuple) else factor)


def find_policies() -> dict[str, type[Policy]]:
    """Every known policy by name: those of this package and of the `baselines` package, found by looking."""
    baselines = importlib.import_module("baselines")
    for module in pkgutil.iter_modules(baselines.__path__, "baselines."):
        importlib.import_module(module.name)

    def below(cls: type[Policy]) -> list[type[Policy]]:
        return [c for sub in cls.__subclasses__() for c in (sub, *below(sub))]

    found = below(Policy)  # type: ignore[type-abstract]
    return {cls.name: cls for cls in found if "name" in vars(cls)}


def check_factors(value: Any) -> float | tuple[float, ...]:
    """`value` as one forgetting factor or a tuple of them.

    Raises:
        ConfigError: unless every factor is a number in [0, 1].
    """
    several = isinstance(value, Sequence) and not isinstance(value, str)
    factors = list(value) if several else [value]
    for factor in factors:
        number = isinstance(factor, int | float) and not isinstance(factor, bool) and math.isfinite(factor)
        if not number or not 0.0 <= factor <= 1.0:
            raise ConfigError("forgetting_factor", value, "give a number from 0 to 1, or a list of one per layer")
    if not factors:
        raise ConfigError("forgetting_factor", value, "the list is empty; give a number from 0 to 1, or one per layer")
    return tuple(float(f) for f in factors) if several else float(value)
