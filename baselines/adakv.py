"""AdaKV: SnapKV, with the slots of a layer divided among its heads by how many of the layer's best tokens each head has.

Paper: Feng et al., 2024 (arXiv 2407.11550). The number of slots of a head beside its window is a weighted mean of two
numbers: how many of the layer's best tokens are in this head, and an equal share. Each head retains its own best tokens.
Deviations: as SnapKV; heads are key/value heads; scores of heads are compared without normalization, as means over the
group; slots are rounded by the largest remainders, so that the sum of the layer is exact (the authors' code rounds each
head alone).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a2sf.policies.base import Retention, check_share
from a2sf.policies.rule import Cut, Rule
from baselines.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """SnapKV's scores, with a budget for each head.

    Attributes:
        window: as for SnapKV.
        kernel: as for SnapKV.
        pooling: as for SnapKV.
        floor: weight of the equal share, from 0 to 1; with 1 it is SnapKV.
    """

    name: ClassVar[str] = "adakv"
    label: ClassVar[str] = "AdaKV"
    version: ClassVar[int] = 2

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("policy.floor", self.floor)

    def retention(self, budget: int, layer: int) -> Retention:
        rule = Rule(cut=Cut(kernel_size=self.kernel, floor=self.floor, pooling=self.pooling))
        return Retention(budget=budget, recent=min(self.window, budget), rule=rule)
