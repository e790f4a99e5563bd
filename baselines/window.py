"""Sliding window ("local" attention): retain the newest tokens.

Source: Beltagy et al., 2020 (arXiv 2004.05150). The oldest token is evicted, whatever its attention
is. Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a2sf.policies.base import Policy, Retention


@dataclass(frozen=True, kw_only=True)
class Window(Policy):
    """The whole budget is the recent window."""

    name: ClassVar[str] = "window"
    label: ClassVar[str] = "Window"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=budget)
