"""Key norm: the token with the longest key goes; no attention is looked at.

Paper: Devoto et al., 2024 (arXiv 2406.11430): a short key goes with much attention, so the priority is `-||k_j||_2`.
Deviations: the key is the one that is cached, with its rotary position (which does not change its length); the paper skips
the first two layers, here the policy acts on all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from a2sf.policies.base import Policy, Retention
from a2sf.policies.rule import Rule


def short_key(keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """`-||k||_2` of each token."""
    return -keys.norm(dim=-1)


BY_KEY = Rule(bias=short_key, scored=False)


@dataclass(frozen=True, kw_only=True)
class KeyNorm(Policy):
    """Keep the shortest keys."""

    name: ClassVar[str] = "key_norm"
    label: ClassVar[str] = "Key norm"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, rule=BY_KEY)
