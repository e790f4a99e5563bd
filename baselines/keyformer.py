"""Keyformer: accumulated attention of logits with random noise, so that evicted tokens do not distort it.

Paper: Adnan et al., 2024 (arXiv 2403.09054): a token's score is the sum over steps and query heads of
`softmax((x + g) / tau)`, where `x` are the logits, `g` is Gumbel noise and `tau` a temperature. The highest scores and the
newest tokens are retained. Deviations: the noise is a function of the seed, the positions of query and key and the head, so
that no score depends on batch or chunk (the published code draws anew for every pass; it too draws for each query and
head); a model's learned attention sinks are left out of the softmax; `tau` is constant (the paper raises it from 1 to 2
while it generates a known number of tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from a2sf.errors import ConfigError
from a2sf.policies.base import Policy, Retention, check_seed, check_share, share_of
from a2sf.policies.rule import AttentionRows, Rule, Step
from baselines.random import Draw

NO_SCORES = Rule(scored=False)
BLOCK, STORED = 64, 512
"""Noise of the first `STORED` tokens of prompts is stored, for as many queries at a time."""


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
        check_seed("policy.seed", self.seed)

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=share_of(budget, self.recent_share), rule=NO_SCORES)

    def remember(self, rows: AttentionRows) -> Tensor:
        logits = (rows.probabilities.log() + self.noise(rows)) / self.tau  # log p is x, but for a constant
        return rows.memory + logits.softmax(-1).sum((2, 3))[..., None]

    def priorities(self, step: Step) -> Tensor:
        return step.memory[..., 0]

    def noise(self, rows: AttentionRows) -> Tensor:
        """Gumbel noise [B, K, G, Q, N]."""
        like = rows.probabilities
        B, K, G, Q, N = like.shape
        if B == 1 and 1 < Q <= BLOCK and N <= STORED:
            first = int(rows.now[0, 0, 0])
            from_first_on = bool((rows.positions == torch.arange(N, device=like.device)).all())
            if from_first_on and first % BLOCK == 0 and first + Q == N:
                return _noise_of_block(self.seed, K, G, first, like.dtype, like.device)[..., :Q, :N]
        return _noise(self.seed, rows.positions, rows.now, K, G, like)


def _noise(seed: int, positions: Tensor, now: Tensor, K: int, G: int, like: Tensor) -> Tensor:
    """Gumbel noise [B, K, G, Q, N] like `like`, for keys at `positions` [B, K, N] and queries at `now` [B, 1, Q]."""
    head = torch.arange(K * G, device=now.device).view(K, G, 1, 1)
    drawn = positions[:, :, None, None] + now[:, :, None, :, None] * 0x632BE5AB + head * 0x1B873593
    uniform = Draw(seed)(like, like, drawn).clamp(min=2**-25)
    return -(-uniform.log()).log()


@lru_cache(maxsize=16)
def _noise_of_block(seed: int, K: int, G: int, first: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Noise for the queries of `BLOCK` tokens from `first` on: the same in all layers and all prompts."""
    now = torch.arange(first, first + BLOCK, device=device)[None, None]
    keys = torch.arange(first + BLOCK, device=device).expand(1, K, -1)
    return _noise(seed, keys, now, K, G, torch.empty(0, dtype=dtype, device=device))
