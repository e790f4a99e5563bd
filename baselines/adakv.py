"""AdaKV: SnapKV with the slots of a layer given to the heads that make most of them.

Paper: Feng et al., 2024 (arXiv 2407.11550): how many of the layer's best tokens beside the windows are a head's own is mixed
with an equal share, and each head keeps as many of its own best. Deviations: as SnapKV; heads are key/value heads; scores
are compared as they are, a mean over the group; shares are rounded by largest remainder, so that the layer's sum is exact
(the authors' code rounds each head by itself).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a2sf.policies.base import Retention, check_share
from a2sf.policies.rule import Cut, Rule
from baselines.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """SnapKV's scores, budgets per head.

    Attributes:
        window, kernel: as for SnapKV.
        floor: weight of the equal share, from 0 to 1; 1 is SnapKV.
    """

    name: ClassVar[str] = "adakv"
    label: ClassVar[str] = "AdaKV"
    version: ClassVar[int] = 2

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("policy.floor", self.floor)

    def retention(self, budget: int, layer: int) -> Retention:
        rule = Rule(cut=Cut(kernel_size=self.kernel, floor=self.floor))
        return Retention(budget=budget, recent=min(self.window, budget), rule=rule)
