"""Expected attention: the attention that queries of the next positions will pay, if they are like the last ones.

Paper: Devoto et al., 2025 (arXiv 2510.00636): queries before the rotary embedding are taken as normally distributed,
with the mean `m` and the covariance `S` of the prompt's. Let `R` be the rotary embedding averaged over the next
`future` positions. A future query is expected to give a key the weight `exp(k R m / sqrt(d) + k R S R' k / 2d)`. These
weights, normalised over the tokens and averaged over the query heads of the group, are multiplied by `||v||_2`. The
first tokens are retained, and their queries left out. Deviations: statistics of the last `window` queries instead of
all of the prompt's, as in kvpress without those of the first `sinks` tokens; every schedule is possible. Without a
model (a2sf.attend) no rotary embedding is known, and `R` is the identity. A model's softcap bounds the exponent as a
whole, and its learned sinks take part in the normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from a2sf.errors import ConfigError
from a2sf.policies.base import MOST_QUERIES, Policy, Retention, check_tokens
from a2sf.policies.model.rotary import Rotary
from a2sf.policies.rule import Rule, Step

NO_SCORES = Rule(scored=False)
BLOCK = 64
"""Queries whose sums are computed at a time."""


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
        check_tokens("policy.future", self.future, least=1, most=MOST_QUERIES)
        check_tokens("policy.sinks", self.sinks)
        check_tokens("policy.window", self.window, least=1, most=MOST_QUERIES)
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
        mean, covariance = self._moments(step)
        keys = step.keys if step.rotary is None else _turned_back(step.rotary, step.keys, step.now, self.future)
        logits = mean @ keys.transpose(-1, -2) * step.scale  # [B, K, G, N]
        if covariance is not None:
            spread = ((keys[:, :, None] @ covariance) * keys[:, :, None]).sum(-1)
            logits = logits + spread * step.scale**2 / 2
        hidden = ~step.cached | (step.positions < self.sinks)
        expected = step.softmax(logits[:, :, :, None], hidden[:, :, None, None])[:, :, :, 0].mean(2)
        return expected.nan_to_num(0) * step.values.norm(dim=-1)

    def _moments(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """The mean [B, K, G, D] and covariance [B, K, G, D, D] of the unrotated queries after the sinks."""
        assert step.queries is not None
        # as many blocks as the longest row has read: the first queries of a wide window are 0
        n = -(-min(self.window, int(step.now.max()) + 1) // BLOCK) * BLOCK
        given = step.queries[..., -n:, :]
        step = replace(step, queries=pad(given, (0, 0, n - given.shape[-2], 0)))
        # the first block may begin before the window
        inside = torch.arange(n, device=step.now.device) >= n - self.window
        counted = ((step.query_positions >= self.sinks) & inside).to(step.keys.dtype)[..., None]  # [B, 1, 1, W, 1]
        total = counted.sum(-2).clamp(min=1)
        queries = step.unrotated_queries * counted
        mean = _newest_first(queries.unflatten(-2, (-1, BLOCK)).sum(-2)) / total
        if not self.covariance:
            return mean, None
        apart = ((queries - mean[..., None, :]) * counted).unflatten(-2, (-1, BLOCK))
        return mean, _newest_first(apart.transpose(-1, -2) @ apart, last=2) / total[..., None]


def _newest_first(blocks: Tensor, last: int = 1) -> Tensor:
    """The sum over blocks, the dimension before the `last` ones: one by one from the newest.

    So blocks of 0 before the first query, which a row has where others of its batch are longer, change no last bit.
    """
    total, *earlier = reversed(blocks.unbind(-1 - last))
    for block in earlier:
        total = total + block
    return total


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
