"""A2SF: accumulated attention that is forgotten a little at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from a2sf.errors import ConfigError
from a2sf.policies.base import Policy, Retention


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
