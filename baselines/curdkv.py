"""CurDKV: retain the tokens with the largest product of the leverage scores of key and value.

Paper: Sengupta et al., 2025 (arXiv 2509.15038): tokens are chosen as the rows of a CUR decomposition of the attention
output, by leverage scores of their keys and values. The scores are approximated by squared norms, each divided by the
sum over the neighbourhood: `||k_j||^2 / sum ||k_i||^2 * ||v_j||^2 / sum ||v_i||^2`, with sums over the `window`
consecutive positions that the token is in. The first tokens are retained. Deviations: no random projection before the
norms (an option in kvpress, off there too); sums are over the tokens that are still cached, and the newest window may
be incomplete, so that its tokens have larger shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from a2sf.policies.base import Policy, Retention, check_tokens
from a2sf.policies.ranking import chunk_sums
from a2sf.policies.rule import Step


@dataclass(frozen=True, kw_only=True)
class CurDKV(Policy):
    """Shares of the squared norms of keys and values among neighbours.

    Attributes:
        window: number of consecutive positions whose norms are compared.
        sinks: how many of the first tokens are never evicted.
    """

    name: ClassVar[str] = "curdkv"
    label: ClassVar[str] = "CurDKV"

    window: int = 16
    sinks: int = 4

    def __post_init__(self) -> None:
        check_tokens("policy.window", self.window, least=1)
        check_tokens("policy.sinks", self.sinks)

    @property
    def min_budget(self) -> int:
        return max(1, self.sinks)

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, sinks=min(self.sinks, budget))

    def priorities(self, step: Step) -> Tensor:
        key, value = (self._share(x.square().sum(-1), step.positions) for x in (step.keys, step.values))
        return key * value

    def _share(self, norms: Tensor, positions: Tensor) -> Tensor:
        return norms / chunk_sums(norms, positions, self.window).clamp(min=1e-30)
