"""Full cache: nothing is evicted. Every other policy is compared with it.

Source: the model itself. Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a2sf.policies.base import UNLIMITED, Policy, Retention


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Retains every token; the budget is ignored."""

    name: ClassVar[str] = "full"
    label: ClassVar[str] = "Full cache"
    uses_budget: ClassVar[bool] = False
    evicts: ClassVar[bool] = False

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=UNLIMITED)
