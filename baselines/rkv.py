"""R-KV: retain tokens that the last queries attend to, and whose keys are not similar to those of other tokens.

Paper: Cai et al., 2025 (arXiv 2505.24133), for long chains of thought. Importance `I`: the attention of the last
`window` queries to the tokens before them (logits: the maximum over the group's query heads), averaged over the
queries, the maximum over neighbouring tokens. Redundancy `R`: the cosine similarity of a key with all others, averaged,
as a softmax over the tokens; for each key, the similarity with the most recent key that is closer than 0.5 counts as 0,
so that of similar tokens the newest remains. The priority is `mix * I - (1 - mix) * R`; the window is retained.
Deviations: every schedule is possible (the paper: `every` 128). The published code has 0.07 for `mix`, and leaves the
window out of the softmax of the attention, as here; so are a model's learned attention sinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from a2sf.policies.base import MOST_QUERIES, Policy, Retention, check_share, check_tokens
from a2sf.policies.rule import Rule, Step

NO_SCORES = Rule(scored=False)
SIMILAR = 0.5
NEIGHBOURS = 7
LATE = 2**62


@dataclass(frozen=True, kw_only=True)
class RKV(Policy):
    """Attention of the last queries minus the similarity of keys.

    Attributes:
        window: number of last queries whose attention counts; their tokens are retained.
        mix: weight of attention, from 0 to 1; the rest is the weight of similarity.
    """

    name: ClassVar[str] = "rkv"
    label: ClassVar[str] = "R-KV"

    window: int = 8
    mix: float = 0.1

    def __post_init__(self) -> None:
        check_tokens("policy.window", self.window, least=1, most=MOST_QUERIES)
        check_share("policy.mix", self.mix)

    @property
    def queries(self) -> int:
        return self.window

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=min(self.window, budget), rule=NO_SCORES)

    def priorities(self, step: Step) -> Tensor:
        return self.mix * self.importance(step) - (1 - self.mix) * redundancy(step)

    def importance(self, step: Step) -> Tensor:
        """Attention of the last queries to the tokens before the window, the maximum of neighbours."""
        assert step.queries is not None
        before = step.cached & (step.ages >= self.window)
        products = step.queries @ step.keys[:, :, None].transpose(-1, -2)  # [B, K, G, W, N]
        logits = step.softmax.capped(products * step.scale)
        attention = logits.amax(2).masked_fill(~before[:, :, None], -torch.inf).softmax(-1).nan_to_num(0)
        read = (step.query_positions >= 0)[:, :, 0, :, None]
        mean = (attention * read).sum(2) / read.sum(2).clamp(min=1)
        # neighbours are those in the cache
        order = step.positions.where(before, LATE).argsort(dim=-1)
        best = max_pool1d(mean.gather(2, order), NEIGHBOURS, stride=1, padding=NEIGHBOURS // 2)
        return torch.empty_like(best).scatter_(2, order, best)


def redundancy(step: Step) -> Tensor:
    """How like the others each key is, as a softmax over the cached tokens."""
    direction = normalize(step.keys, dim=-1, eps=1e-8)
    similar = direction @ direction.transpose(-1, -2)
    itself = torch.eye(similar.shape[-1], dtype=torch.bool, device=similar.device)
    similar = similar.masked_fill(itself, 0)
    # of the keys that are close to a key, the newest does not count; where none is close, the first column, as published
    latest = step.positions[:, :, None].where(similar > SIMILAR, -1).amax(-1, keepdim=True)
    first = step.positions.where(step.cached, LATE).amin(-1, keepdim=True)[..., None]
    latest = latest.where(latest >= 0, first)
    similar = similar.masked_fill(step.positions[:, :, None] == latest, 0)
    mean = similar.sum(2) / step.cached.sum(-1, keepdim=True)
    return mean.masked_fill(~step.cached, -torch.inf).softmax(-1)
