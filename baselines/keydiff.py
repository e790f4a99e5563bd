"""KeyDiff: keep the keys that differ most from the others; no attention is looked at.

Paper: Park et al., 2025 (arXiv 2504.15364): the priority is `-cos(k_j, mean of the cached keys' directions)`. Deviations:
the paper evicts by blocks of a prompt (schedule `every` is the nearest), here any schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from a2sf.policies.base import Policy, Retention
from a2sf.policies.rule import Step


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """The most usual key goes first."""

    name: ClassVar[str] = "keydiff"
    label: ClassVar[str] = "KeyDiff"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget)

    def priorities(self, step: Step) -> Tensor:
        shrink = 1 / step.keys.norm(dim=-1).clamp(min=1e-12)
        usual = normalize(shrink[:, :, None] @ step.keys, dim=-1)  # an uncached key is 0
        alike = (step.keys * usual).sum(-1) * shrink
        # two keys are as far from their mean: a tie that rounding must not decide
        return -alike.masked_fill(step.cached.sum(-1, keepdim=True) <= 2, 0)
