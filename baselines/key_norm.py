"""Key norm: the token whose key has the largest norm is evicted; attention is not used.

Paper: Devoto et al., 2024 (arXiv 2406.11430): keys with a small norm receive much attention, so the priority is
`-||k_j||_2`. Deviations: the norm is that of the cached key, after the rotary embedding (which does not change it); the
paper leaves out the first two layers, here all layers are pruned.
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
    """Retains the tokens whose keys have the smallest norm."""

    name: ClassVar[str] = "key_norm"
    label: ClassVar[str] = "Key norm"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, rule=BY_KEY)
