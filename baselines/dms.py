"""DMS: a token is evicted once it is no longer recent, if its score is below a threshold; there is no budget.

Paper: Łańcucki et al., 2025 (arXiv 2506.05345): whether a token is evicted is decided when it is read, and takes effect once
`window` further tokens were read. KVzap thresholds a score in the same way (policy `kvzap`). Both learn the score from the
model's hidden states; such weights are the model's own and are not part of this package. Deviations: the score is that of
another policy whose priorities are fixed when a token is cached (`by`): a function of its key, value and position, such as
`key_norm`, or the linear gates on keys of `qfilter`, loaded from a file. It is in that policy's units, so a useful
threshold depends on the model: results say which share of the tokens was cached. The paper trains with a window of 256
tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from a2sf.errors import ConfigError
from a2sf.policies.base import Retention, check_tokens
from a2sf.policies.rule import Rule
from baselines.by import Built


@dataclass(frozen=True, kw_only=True)
class DMS(Built):
    """Tokens below a threshold leave when they leave the window; there is no budget.

    Attributes:
        by: the policy whose priority is the score.
        threshold: the smallest score that stays, in the units of `by`; the default suits random numbers only.
        window: how many of the newest tokens stay whatever their scores are.
    """

    name: ClassVar[str] = "dms"
    label: ClassVar[str] = "DMS"
    uses_budget: ClassVar[bool] = False

    by: Any = "key_norm"
    threshold: float | None = -2.8
    window: int = 16

    def __post_init__(self) -> None:
        given = self.threshold
        if not isinstance(given, int | float) or isinstance(given, bool) or not math.isfinite(given):
            raise ConfigError("policy.threshold", given, "give a number, in the units of the scores of policy.by")
        check_tokens("policy.window", self.window, least=1)
        super().__post_init__()
        if self.inner.at_entry(0) is None:
            why = "its priorities are not fixed when a token is cached; give key_norm, random, or qfilter with a file"
            raise ConfigError("policy.by", self.inner.name, why)

    def retention(self, budget: int, layer: int) -> Retention:
        assert self.threshold is not None
        rule = Rule(scored=False, bias=self.inner.at_entry(layer), threshold=float(self.threshold))
        return Retention(budget=self.window, recent=self.window, rule=rule)
