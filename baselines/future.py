"""Future: retain the tokens that later queries attend to: an oracle, not a causal policy.

Source: none. The priority is the attention that later queries of the same sequence pay to a token with the full cache,
summed over queries and the group. This is not the best possible choice, which would have to compare outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from a2sf.policies.base import Policy, Retention
from a2sf.policies.rule import Sequence, Step


@dataclass(frozen=True, kw_only=True)
class Future(Policy):
    """An oracle: never ranked with other policies, never used to generate text."""

    name: ClassVar[str] = "future"
    label: ClassVar[str] = "Future (not causal)"
    schedules: ClassVar[tuple[str, ...]] = ("step",)
    causal: ClassVar[bool] = False

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget)

    def precompute(self, sequence: Sequence) -> Tensor:
        """For each token and each step: the attention that the queries after that step pay to it, [B, K, T, T]."""
        T = sequence.key.shape[2]
        at = torch.arange(T, device=sequence.key.device)
        logits = sequence.query @ sequence.key[:, :, None].transpose(-1, -2) * sequence.scale
        paid = sequence.softmax(logits, at > at[:, None]).sum(2)  # [B, K, queries, T]
        paid = paid * (at < sequence.lengths[:, None])[:, None, :, None]
        return (paid.flip(2).cumsum(2).flip(2) - paid).transpose(2, 3)

    def priorities(self, step: Step) -> Tensor:
        return step.memory.gather(-1, step.now[..., None].expand(*step.positions.shape, 1))[..., 0]
