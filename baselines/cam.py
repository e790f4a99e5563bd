"""CaM: the value of a token that is evicted is added, in parts, to the values of the retained tokens after it.

Paper: Zhang et al., 2024 (Cache Merging, ICML 2024, openreview LCTmppB165). Another policy chooses the token `i` that is
evicted. It is merged with probability `A_i / mean(A_k)`, at most 1, where `k` are the next `m` retained tokens: then
`V_i / m` is added to each of their values. Keys stay as they are. Deviations: where fewer than `m` retained tokens follow,
`m` is their number; `A` is that of the query heads of a group together; the paper merges while tokens are evicted one by
one, here every schedule is possible. The draw depends only on seed, layer, head and position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from a2sf.errors import ConfigError
from a2sf.policies.base import Policy, Retention, check_seed, check_tokens
from a2sf.policies.ranking import of_columns
from a2sf.policies.rule import Step
from baselines.by import Built
from baselines.random import Draw

LATE = 2**62
HEADS, LAYERS = 2**40, 2**50
"""What separates the positions of two heads, and of two layers, in a draw."""


@dataclass(frozen=True, kw_only=True)
class CaM(Built):
    """What another policy evicts is merged into the tokens after it.

    Attributes:
        by: the policy that chooses what is evicted: its name, or a mapping of its `name` and settings. It must use
            accumulated attention and support every schedule.
        window: number of retained tokens after an evicted one that get a part of its value (the paper uses 32).
        seed: seed of the draw.
    """

    name: ClassVar[str] = "cam"
    label: ClassVar[str] = "CaM"

    by: Any = "h2o"
    window: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_budget()
        check_tokens("policy.window", self.window, least=1)
        check_seed("policy.seed", self.seed)
        allowed = "give a policy that ranks tokens by accumulated attention under every schedule"
        inner = self.inner
        rule = inner.keeps(max(64, inner.min_budget)).rule
        if inner.schedules != Policy.schedules or not rule.scored:
            raise ConfigError("policy.by", self.by, allowed)
        if rule.shared:
            raise ConfigError(
                "policy.by", self.by, "it retains the same tokens in all heads, and values are merged by head"
            )
        if rule.heads:
            raise ConfigError("policy.by", inner.name, "its key/value heads differ in a layer; give another policy")

    def retention(self, budget: int, layer: int) -> Retention:
        return self.inner.completed(self.inner.retention(budget, layer))

    def merge(self, step: Step, evicted: Tensor) -> Tensor:
        K = step.positions.shape[1]
        order = step.positions.where(step.cached, LATE).argsort(-1)
        evicted, retained = (x.gather(2, order) for x in (evicted, step.cached & ~evicted))
        positions, scores = step.positions.gather(2, order), step.scores.gather(2, order)
        number = retained.sum(-1)[..., None]  # of retained tokens
        # retained tokens first, in their order; and of each evicted token, how many of them are before it
        retained_first = (~retained).int().argsort(dim=-1, stable=True)
        evicted_first = evicted.int().argsort(dim=-1, descending=True, stable=True)[..., : int(evicted.sum(-1).max())]
        before = retained.cumsum(-1).gather(2, evicted_first)
        into = before[..., None] + torch.arange(self.window, device=order.device)  # [B, K, evicted, window]
        real = (into < number[..., None]) & evicted.gather(2, evicted_first)[..., None]
        into = into.clamp(max=order.shape[-1] - 1)
        parts = real.sum(-1).clamp(min=1)
        attention = scores.gather(2, retained_first).gather(2, into.flatten(2)).unflatten(2, into.shape[2:])
        mean = (attention * real).sum(-1) / parts
        heads = torch.arange(K, device=order.device)[:, None] * HEADS + step.layer * LAYERS
        drawn = Draw(self.seed)(step.keys, step.values, positions.gather(2, evicted_first) + heads)
        merges = real.any(-1) & (scores.gather(2, evicted_first) >= drawn * mean) & (mean > 0)
        share = of_columns(step.values, order.gather(2, evicted_first)) / parts[..., None] * merges[..., None]
        # as a product: which retained tokens get a part of which evicted ones, [B, K, retained, evicted]
        retained_first = retained_first[..., : int(number.max())]
        place = torch.arange(retained_first.shape[-1], device=order.device)[:, None]
        gets = (place >= before[:, :, None]) & (place < (before + real.sum(-1))[:, :, None])
        at = order.gather(2, retained_first)[..., None].expand(-1, -1, -1, step.values.shape[-1])
        return step.values.scatter_add(2, at, gets.to(share.dtype) @ share)
