"""Keyformer: accumulated attention of logits with random noise, so that evicted tokens do not distort it.

Paper: Adnan et al., 2024 (arXiv 2403.09054): a token's score is the sum over steps and query heads of
`softmax((x + g) / tau)`, where `x` are the logits, `g` is Gumbel noise and `tau` a temperature. The highest scores and the
newest tokens are retained. Deviations: the noise is a function of the seed, the positions of query and key and the head, so
that no score depends on batch or chunk (the published code draws anew for every pass; it too draws for each query and
head); `tau` is constant (the paper raises it from 1 to 2 while it generates a known number of tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from a2sf.errors import ConfigError
from a2sf.policies.base import Policy, Retention, check_share, check_tokens, share_of
from a2sf.policies.rule import Rule, Step
from baselines.random import Draw

NO_SCORES = Rule(scored=False)


@dataclass(frozen=True, kw_only=True)
class Keyformer(Policy):
    """Accumulated softmax with noise, and a recent window.

    Attributes:
        tau: temperature, above 0.
        recent_share: share of the budget for the recent window, from 0 to 1 (the published code has 0.3).
        seed: seed of the noise.
    """

    name: ClassVar[str] = "keyformer"
    label: ClassVar[str] = "Keyformer"
    memory: ClassVar[int] = 1  # the sum so far

    tau: float = 1.0
    recent_share: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.tau, int | float) or isinstance(self.tau, bool) or not 0 < self.tau < float("inf"):
            raise ConfigError("policy.tau", self.tau, "give a number above 0")
        check_share("policy.recent_share", self.recent_share)
        check_tokens("policy.seed", self.seed)

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=share_of(budget, self.recent_share), rule=NO_SCORES)

    def priorities(self, step: Step) -> tuple[Tensor, Tensor]:
        logits = (step.probabilities.log() + self.noise(step)) / self.tau  # log p is x, but for a constant
        noisy = logits.masked_fill(~step.cached[:, :, None], -torch.inf).softmax(-1)
        score = step.memory[..., 0] + noisy.sum(2)
        return score, score[..., None]

    def noise(self, step: Step) -> Tensor:
        """Gumbel noise [B, K, G, N]."""
        K, G = step.probabilities.shape[1:3]
        head = torch.arange(K * G, device=step.now.device).view(K, G, 1)
        drawn = step.positions[:, :, None] + step.now[..., None] * 0x632BE5AB + head * 0x1B873593
        uniform = Draw(self.seed)(step.probabilities, step.probabilities, drawn).clamp(min=2**-25)
        return -(-uniform.log()).log()
