"""A2SF: accumulated attention with a forgetting factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from a2sf.errors import ConfigError
from a2sf.policies.base import Policy, Retention, check_share, check_tokens, share_of


@dataclass(frozen=True, kw_only=True)
class A2SF(Policy):
    """A2SF: accumulated attention with a forgetting factor; as in the paper, without recent window and sinks.

    Idea: old tokens have more accumulated attention only because more queries have attended to them. Multiplying it by
    `a < 1` at every step removes this advantage.

    Paper: Jo and Shin, 2024 (arXiv 2407.20485). Deviations: none. (The authors' evaluation code uses the padded length of
    the batch as the length of a sequence; here it is the sequence's own length.)

    Attributes:
        forgetting_factor: one number in [0, 1], or one per layer. 0: only the attention of the last query counts. 1: as H2O,
            without its recent window.
        recent_share: share of the budget for the newest tokens, from 0 to 1, rounded down.
        recent: how many of the newest tokens are never evicted, instead of a share.
        sinks: how many of the first tokens are never evicted. If a budget is too small for both, sinks come first;
            `budget.tokens` below `recent + sinks` is refused.
    """

    name: ClassVar[str] = "a2sf"
    label: ClassVar[str] = "A2SF"

    forgetting_factor: Any = 0.1  # float | list[float]; OmegaConf has no such union
    recent_share: float = 0.0
    recent: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "forgetting_factor", check_factors(self.forgetting_factor))
        check_share("policy.recent_share", self.recent_share)
        check_tokens("policy.sinks", self.sinks)
        if self.recent is not None:
            check_tokens("policy.recent", self.recent)
            if self.recent_share:
                raise ConfigError("policy.recent", self.recent, "give recent or recent_share, not both")

    @property
    def min_budget(self) -> int:
        return max(1, self.sinks + (self.recent or 0))

    def check(self, layers: int, kv_heads: int | None = None) -> None:
        if isinstance(self.forgetting_factor, tuple) and len(self.forgetting_factor) != layers:
            raise ConfigError(
                "forgetting_factor",
                list(self.forgetting_factor),
                f"a list needs one factor per layer, {layers} for this model, and this one has "
                f"{len(self.forgetting_factor)}",
            )

    def retention(self, budget: int, layer: int) -> Retention:
        factor = self.forgetting_factor
        sinks = min(self.sinks, budget)
        recent = share_of(budget, self.recent_share) if self.recent is None else self.recent
        return Retention(
            budget=budget,
            recent=min(recent, budget - sinks),
            sinks=sinks,
            forgetting_factor=factor[layer] if isinstance(factor, tuple) else factor,
        )


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
