"""Random: every token draws a number when it enters, and the smallest goes. What any policy has to beat.

Source: none. The number depends on the seed and the position alone, so that chunks, batches and repetitions agree, and all
heads and layers keep the same tokens. What is kept is at any time a uniform sample of the tokens so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from a2sf.policies.base import Policy, Retention, check_tokens
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
    """Keep a uniform sample.

    Attributes:
        seed: another seed is another sample.
    """

    name: ClassVar[str] = "random"
    label: ClassVar[str] = "Random"

    seed: int = 0

    def __post_init__(self) -> None:
        check_tokens("policy.seed", self.seed)

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, rule=Rule(bias=Draw(self.seed), scored=False))
