"""SnapKV: one eviction after the prompt, by the attention of the last queries of the prompt.

Paper: Li et al., 2024 (arXiv 2404.14469): the attention of the last `window` queries to each earlier token is summed, and
averaged over `kernel` neighbouring tokens so that connected pieces of text are retained. The tokens with the highest
scores and the window are retained. The paper and its code take the mean of the neighbours, the code of PyramidKV and
AdaKV their maximum (`pooling`). Deviations: the query heads of a group retain the same tokens (in the published code
each has its own); a window larger than the budget is cut to the budget. If the schedule continues step by step after the
prompt, tokens after it have no score, so that the window slides and the tokens chosen at the cut remain.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from a2sf.errors import ConfigError
from a2sf.policies.base import Policy, Retention, check_tokens
from a2sf.policies.rule import POOLINGS, Cut, Rule


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Attention of the last queries of the prompt, averaged over neighbouring tokens.

    Attributes:
        window: number of queries at the end of the prompt whose attention counts; their tokens are retained.
        kernel: number of neighbouring tokens that are taken together, odd.
        pooling: `mean` or `max` of the neighbours.
    """

    name: ClassVar[str] = "snapkv"
    label: ClassVar[str] = "SnapKV"
    schedules: ClassVar[tuple[str, ...]] = ("prompt",)

    window: int = 32
    kernel: int = 5
    pooling: str = "mean"

    def __post_init__(self) -> None:
        check_tokens("policy.window", self.window, least=1)
        if not isinstance(self.kernel, int) or isinstance(self.kernel, bool) or self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError("policy.kernel", self.kernel, "give an odd number of neighbours, at least 1")
        if self.pooling not in POOLINGS:
            raise ConfigError("policy.pooling", self.pooling, f"give one of {', '.join(POOLINGS)}")

    def retention(self, budget: int, layer: int) -> Retention:
        rule = Rule(cut=Cut(kernel_size=self.kernel, pooling=self.pooling))
        return Retention(budget=budget, recent=min(self.window, budget), rule=rule)

    def stored_settings(self) -> dict[str, Any]:
        # results of before this setting existed do not have it
        return {key: x for key, x in asdict(self).items() if (key, x) != ("pooling", "mean")}
