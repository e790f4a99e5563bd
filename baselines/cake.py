"""CAKE: slots are divided among layers by entropy and variance of attention, tokens are ranked by its mean and variance.

Paper: Qin et al., 2025 (arXiv 2503.12491). With the attention `A` of the last `window` queries to the tokens before
them, `H = - sum A log A` and `V = sum Var(A over the queries)`, a layer's slots are in proportion to `H^(1/tau1)
V^(1/tau2)`; each layer retains its window and the tokens with the largest `mean(A) + gamma Var(A)`, averaged over
`kernel` neighbours. Deviations: all layers are cut once the prompt was read, instead of in cascades (with the same result);
scores are means over the group; if the schedule continues step by step, tokens are ranked by the last queries then, without
their neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from a2sf.errors import ConfigError
from a2sf.policies.base import MOST_QUERIES, Policy, Retention, check_tokens
from a2sf.policies.prepared import LayerRead, Prepared
from a2sf.policies.rule import Rule, Step


@dataclass(frozen=True, kw_only=True)
class CAKE(Policy):
    """Budgets of layers from entropy and variance of attention.

    Attributes:
        window: number of queries at the end of the prompt whose attention counts; their tokens are retained.
        kernel: number of neighbouring tokens that are averaged, odd.
        gamma: weight of the variance in a token's score, at least 0.
        tau1: the larger, the less a layer's entropy counts for its slots.
        tau2: the larger, the less a layer's variance counts for its slots.
    """

    name: ClassVar[str] = "cake"
    label: ClassVar[str] = "CAKE"
    schedules: ClassVar[tuple[str, ...]] = ("prompt",)

    window: int = 32
    kernel: int = 5
    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0

    def __post_init__(self) -> None:
        check_tokens("policy.window", self.window, least=2, most=MOST_QUERIES)
        check_tokens("policy.kernel", self.kernel, least=1)
        if self.kernel % 2 == 0:
            raise ConfigError("policy.kernel", self.kernel, "give an odd number of neighbours, at least 1")
        for key, least in (("gamma", 0.0), ("tau1", 0.01), ("tau2", 0.01)):
            value = getattr(self, key)
            if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < float("inf"):
                raise ConfigError(f"policy.{key}", value, f"give a number, at least {least:g}")

    @property
    def queries(self) -> int:
        return self.window

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=min(self.window, budget), rule=Rule(scored=False))

    def look(self, read: LayerRead) -> float:
        first = max(0, read.key.shape[1] - self.window)
        if first == 0:
            return 0.0  # no token before the window: nothing to prefer a layer for
        attention = read.attention(first)[..., :first].double()  # what the window pays to the tokens before it
        entropy = -(attention * attention.clamp(min=1e-10).log()).sum()
        variance = attention.var(2).sum() if attention.shape[2] > 1 else attention.sum() * 0
        return float(entropy ** (1 / self.tau1) * variance ** (1 / self.tau2))

    def conclude(self, found: list[float]) -> Prepared:
        return Prepared(shares=tuple(found), least=self.window)

    def priorities(self, step: Step) -> Tensor:
        attention = step.attention
        spread = attention.var(3) if attention.shape[3] > 1 else torch.zeros_like(attention[..., 0, :])
        score = (attention.mean(3) + self.gamma * spread).mean(2)
        if step.prompt is None or bool((step.now != step.prompt - 1).any()):
            return score
        alone = score.masked_fill(step.ages < self.window, 0)  # the window's own tokens are not averaged in
        return torch.nn.functional.avg_pool1d(alone, self.kernel, stride=1, padding=self.kernel // 2)
