"""TOVA: the token to which the newest query attends least is evicted, the same token in all heads of a layer.

Paper: Oren et al., 2024 (arXiv 2401.06104): the priority is the last query's attention, averaged over the layer's heads.
Deviations: none; the newest token itself may be evicted, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a2sf.policies.base import Policy, Retention
from a2sf.policies.rule import Rule

SHARED = Rule(shared=True)


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """The attention of the last query, with the same retained tokens in all heads of a layer."""

    name: ClassVar[str] = "tova"
    label: ClassVar[str] = "TOVA"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, forgetting_factor=0.0, rule=SHARED)
