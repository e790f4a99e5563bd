"""PyramidKV: SnapKV with larger caches in early layers than in late ones.

Paper: Cai et al., 2024 (arXiv 2406.02069): early layers spread their attention, late ones gather it in few tokens. What each
layer holds beside its window falls linearly, from `2 * m - m / beta` in the first layer to `m / beta` in the last, `m` the
mean. Deviations: as SnapKV; rounded so that the layers' sum is exactly that of equal budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a2sf.errors import ConfigError
from baselines.snapkv import SnapKV


@dataclass(kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV's rule, a pyramid of budgets.

    Attributes:
        window, kernel: as for SnapKV.
        beta: the mean over what the last layer holds beside its window, at least 1; 1 is SnapKV.
    """

    name: ClassVar[str] = "pyramidkv"
    label: ClassVar[str] = "PyramidKV"

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.beta, int) or isinstance(self.beta, bool) or self.beta < 1:
            raise ConfigError("policy.beta", self.beta, "give a whole number, at least 1")

    def of_layer(self, budget: int, layer: int, layers: int) -> int:
        window = min(self.window, budget)
        if layers == 1:
            return budget
        # in whole units of 1 / (beta * (layers - 1)); floors fall as the exact numbers do, and the first layers get the rest
        mean, steps = budget - window, layers - 1
        first, last = (2 * self.beta - 1) * mean * steps, mean * steps
        floors = [(first * (steps - i) + last * i) // (self.beta * steps * steps) for i in range(layers)]
        return window + floors[layer] + (layer < mean * layers - sum(floors))
