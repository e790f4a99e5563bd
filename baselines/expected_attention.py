"""Expected attention: the attention that queries of the next positions will pay, if they are like the last ones.

Paper: Devoto et al., 2025 (arXiv 2510.00636): queries before the rotary embedding are taken as normally distributed,
with the mean `m` and the covariance `S` of the prompt's. Let `R` be the rotary embedding averaged over the next
`future` positions. A future query is expected to give a key the weight `exp(k R m / sqrt(d) + k R S R' k / 2d)`. These
weights, normalised over the tokens and averaged over the query heads of the group, are multiplied by `||v||_2`. The
first tokens are retained, and their queries left out. Deviations: statistics of the last `window` queries instead of
all of the prompt's, as in kvpress without those of the first `sinks` tokens; every schedule is possible. Without a
model (a2sf.attend) no rotary embedding is known, and `R` is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from a2sf.errors import ConfigError
from a2sf.policies.base import Policy, Retention, check_tokens
from a2sf.policies.rotary import Rotary
from a2sf.policies.rule import Rule, Step

NO_SCORES = Rule(scored=False)


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Policy):
    """Expected attention of future queries, times the norm of the value.

    Attributes:
        future: number of next positions over which the rotary embedding is averaged.
        covariance: whether the covariance of the queries is used, or their mean alone.
        sinks: how many of the first tokens are never evicted.
        window: number of last tokens whose queries give the mean and the covariance.
    """

    name: ClassVar[str] = "expected_attention"
    label: ClassVar[str] = "Expected attention"
    unrotated: ClassVar[bool] = True

    future: int = 512
    covariance: bool = True
    sinks: int = 4
    window: int = 512

    def __post_init__(self) -> None:
        check_tokens("policy.future", self.future, least=1)
        check_tokens("policy.sinks", self.sinks)
        check_tokens("policy.window", self.window, least=1)
        if not isinstance(self.covariance, bool):
            raise ConfigError("policy.covariance", self.covariance, "give true or false")

    @property
    def queries(self) -> int:
        return self.window

    @property
    def min_budget(self) -> int:
        return max(1, self.sinks)

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, sinks=min(self.sinks, budget), rule=NO_SCORES)

    def priorities(self, step: Step) -> Tensor:
        counted = (step.query_positions >= self.sinks).to(step.keys.dtype)[..., None]  # [B, 1, 1, W, 1]
        total = counted.sum(-2).clamp(min=1)
        queries = step.unrotated_queries * counted
        mean = queries.sum(-2) / total  # [B, K, G, D]
        keys = step.keys if step.rotary is None else _turned_back(step.rotary, step.keys, step.now, self.future)
        logits = mean @ keys.transpose(-1, -2) * step.scale  # [B, K, G, N]
        if self.covariance:
            apart = (queries - mean[..., None, :]) * counted
            covariance = apart.transpose(-1, -2) @ apart / total[..., None]  # [B, K, G, D, D]
            spread = ((keys[:, :, None] @ covariance) * keys[:, :, None]).sum(-1)
            logits = logits + spread * step.scale**2 / 2
        hidden = ~step.cached | (step.positions < self.sinks)
        expected = logits.masked_fill(hidden[:, :, None], -torch.inf).softmax(-1).mean(2)
        return expected.nan_to_num(0) * step.values.norm(dim=-1)


def _turned_back(rotary: Rotary, keys: Tensor, now: Tensor, future: int) -> Tensor:
    """`R' k`: keys as unrotated queries see them from the next positions on average.

    The average of rotations by evenly spaced angles is a rotation by the middle angle, shortened by the mean cosine of the
    distances from it.
    """
    shorter = _shorter(rotary, future, keys.shape[-1], keys.dtype, keys.device)
    return rotary.rotate(keys * shorter, -(now + 1 + (future - 1) / 2))


@lru_cache(maxsize=64)  # the same at every step
def _shorter(rotary: Rotary, future: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[D], the mean cosine of the distances from the middle."""
    distance = torch.arange(future, device=device) - (future - 1) / 2
    ones = torch.ones(future, size, dtype=dtype, device=device)
    return rotary.rotate(ones, distance).mean(0) / rotary.rotate(ones[:1], distance[:1] * 0)[0]
