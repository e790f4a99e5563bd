"""KeyDiff: retain the tokens whose keys differ most from the other keys; attention is not used.

Paper: Park et al., 2025 (arXiv 2504.15364): the priority is `-cos(k_j, mean of the cached keys' directions)`. Deviations:
the paper evicts after each block of a prompt (the schedule `every` is closest to that); here every schedule is possible.
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
    """Evicts the token whose key is most similar to the mean key."""

    name: ClassVar[str] = "keydiff"
    label: ClassVar[str] = "KeyDiff"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget)

    def priorities(self, step: Step) -> Tensor:
        inverse = 1 / step.keys.norm(dim=-1).clamp(min=1e-12)
        mean = normalize(inverse[:, :, None] @ step.keys, dim=-1)  # a key that is not cached is 0
        similarity = (step.keys * mean).sum(-1) * inverse
        # two keys have the same similarity to their mean: a tie that rounding must not decide
        return -similarity.masked_fill(step.cached.sum(-1, keepdim=True) <= 2, 0)
