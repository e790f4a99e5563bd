"""SnapKV: the end of the prompt shows what of it will be needed; one cut after the prompt.

Paper: Li et al., 2024 (arXiv 2404.14469): the attention of the prompt's last `window` queries is summed for each token
before them, averaged over `kernel` neighbours so that what is kept hangs together, and the best stay beside the window.
Deviations: the group's heads share one kept set (the published code keeps one per query head); a window larger than the
budget is cut to it. Where the schedule goes on step by step after the cut, tokens after the prompt have no score of their
own, so the window slides and what the cut chose stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a2sf.errors import ConfigError
from a2sf.policies.base import Policy, Retention, check_tokens
from a2sf.policies.rule import Cut, Rule


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Pooled attention of the prompt's last queries.

    Attributes:
        window: how many queries at the prompt's end look, and stay themselves.
        kernel: how many neighbours are averaged, odd.
    """

    name: ClassVar[str] = "snapkv"
    label: ClassVar[str] = "SnapKV"
    schedules: ClassVar[tuple[str, ...]] = ("prompt",)

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        check_tokens("policy.window", self.window, least=1)
        if not isinstance(self.kernel, int) or isinstance(self.kernel, bool) or self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError("policy.kernel", self.kernel, "give an odd number of neighbours, at least 1")

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=min(self.window, budget), rule=Rule(cut=Cut(kernel_size=self.kernel)))
