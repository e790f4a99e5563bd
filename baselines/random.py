"""Random: each token gets a random number, and the token with the smallest is evicted. Every policy should be better.

Source: none. The number depends only on the seed and the position, so that it is the same in chunks, batches and
repetitions, and all heads and layers retain the same tokens. The retained tokens are always a uniform sample of the
tokens so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from a2sf.policies.base import Policy, Retention, check_seed
from a2sf.policies.rule import Rule

BITS = 2**32 - 1


@dataclass(frozen=True)
class Draw:
    """A number from 0 to 1 for each position: a 32-bit mixing function (MurmurHash3's last step) of position and seed."""

    seed: int

    def __call__(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        x = (positions * 0x9E3779B1 + self.seed * 0x7FEB352D) & BITS
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & BITS
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & BITS
        return ((x ^ (x >> 16)) >> 8).to(keys.dtype) / 2**24  # 24 bits, the same in float32


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Retains a uniform sample.

    Attributes:
        seed: seed of the sample.
    """

    name: ClassVar[str] = "random"
    label: ClassVar[str] = "Random"

    seed: int = 0

    def __post_init__(self) -> None:
        check_seed("policy.seed", self.seed)

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, rule=Rule(bias=Draw(self.seed), scored=False))
