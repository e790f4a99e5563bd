"""PyramidKV: SnapKV, with larger budgets in early layers than in late layers.

Paper: Cai et al., 2024 (arXiv 2406.02069): early layers attend to many tokens, late layers to few. The number of tokens
that a layer holds beside its window decreases linearly from `2 * m - m / beta` in the first layer to `m / beta` in the
last layer, where `m` is the mean. If the prompt is shorter than the budget of the first layer, the first layer holds the
whole prompt and the last layer gets the rest, so that the total is always used. Deviations: as SnapKV; budgets are
rounded so that their sum is exactly that of equal budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a2sf.errors import ConfigError
from baselines.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV's scores, with budgets that decrease from layer to layer.

    Attributes:
        window: as for SnapKV.
        kernel: as for SnapKV.
        pooling: as for SnapKV.
        beta: the mean budget beside the window divided by that of the last layer, at least 1; with 1 it is SnapKV. The last
            layer gets more if the first layer holds the whole prompt.
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
        if layers == 1 or (prompt is not None and budget >= prompt):  # then no layer evicts
            return budget
        window = min(self.window, budget)
        mean, steps = budget - window, layers - 1
        # in units of 1 / beta: twice the mean, and the first layer's part of it
        both, first = 2 * mean * self.beta, (2 * self.beta - 1) * mean
        if prompt is not None:
            first = min(first, (prompt - window) * self.beta)
        exact = [first * (steps - i) + (both - first) * i for i in range(layers)]  # times beta * steps
        floors = [x // (self.beta * steps) for x in exact]
        # of the layers with a fraction, the first are rounded up, as many as the sum needs
        fractions = [i for i, x in enumerate(exact) if x % (self.beta * steps)]
        return window + floors[layer] + (layer in fractions[: mean * layers - sum(floors)])
