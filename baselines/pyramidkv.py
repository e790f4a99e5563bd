"""PyramidKV: SnapKV with larger caches in early layers than in late ones.

Paper: Cai et al., 2024 (arXiv 2406.02069): early layers spread their attention, late ones gather it in few tokens. What each
layer holds beside its window falls linearly, from `2 * m - m / beta` in the first layer to `m / beta` in the last, `m` the
mean; where the prompt has fewer tokens than the first layer would hold, that layer holds all of them and the last one the
rest, so that the whole budget is spent. Deviations: as SnapKV; rounded so that the layers' sum is exactly that of equal
budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a2sf.errors import ConfigError
from baselines.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV's rule, a pyramid of budgets.

    Attributes:
        window, kernel: as for SnapKV.
        beta: the mean over what the last layer holds beside its window, at least 1; 1 is SnapKV. A prompt that the first
            layer holds as a whole makes the last layer's part larger.
    """

    name: ClassVar[str] = "pyramidkv"
    label: ClassVar[str] = "PyramidKV"
    version: ClassVar[int] = 2

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.beta, int) or isinstance(self.beta, bool) or self.beta < 1:
            raise ConfigError("policy.beta", self.beta, "give a whole number, at least 1")

    def layer_budget(self, budget: int, layer: int, layers: int, prompt: int | None = None) -> int:
        if layers == 1 or (prompt is not None and budget >= prompt):  # then no layer is cut
            return budget
        window = min(self.window, budget)
        mean, steps = budget - window, layers - 1
        # twice the mean, and what the first layer holds of it: in units of 1 / beta
        both, first = 2 * mean * self.beta, (2 * self.beta - 1) * mean
        if prompt is not None:
            first = min(first, (prompt - window) * self.beta)
        exact = [first * (steps - i) + (both - first) * i for i in range(layers)]  # times beta * steps
        floors = [x // (self.beta * steps) for x in exact]
        # the first layers that do not come out whole are rounded up, as many as it takes
        broken = [i for i, x in enumerate(exact) if x % (self.beta * steps)]
        return window + floors[layer] + (layer in broken[: mean * layers - sum(floors)])
