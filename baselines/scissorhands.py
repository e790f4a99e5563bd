"""Scissorhands: tokens that were attended to less than average most often in the last steps are evicted.

Paper: Liu et al., 2023 (arXiv 2305.17118), algorithm 2: over the last `window` steps, a token's record is the number of
steps in which its attention was below the average `1/n` of `n` cached tokens; the largest records are evicted, but for
the newest `recent` tokens. Deviations: query heads of a group share one record, of their mean attention; the paper drops
half of the budget at once (the schedule `every` with half of the budget), here every schedule is possible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from a2sf.policies.base import MOST_QUERIES, Policy, Retention, check_tokens
from a2sf.policies.rule import AttentionRows, Rule, Step

BITS = 24
"""How many steps one number remembers, one bit each: what float32 holds exactly."""
AVERAGE = 1 - 1e-5
"""`p * n` of average attention, but for the rounding of equal shares."""


@dataclass(frozen=True, kw_only=True)
class Scissorhands(Policy):
    """The number of recent steps in which a token got at least average attention.

    Attributes:
        window: number of steps that are counted.
        recent: how many of the newest tokens are never evicted; all, if the budget is smaller.
    """

    name: ClassVar[str] = "scissorhands"
    label: ClassVar[str] = "Scissorhands"

    window: int = 400
    recent: int = 10

    def __post_init__(self) -> None:
        check_tokens("policy.window", self.window, least=1, most=MOST_QUERIES)
        check_tokens("policy.recent", self.recent)

    def retention(self, budget: int, layer: int) -> Retention:
        # a token's memory: its record, and which of the last steps are in it
        memory = 1 + -(-self.window // BITS)
        rule = Rule(scored=False, priority_fn=self.record, memory=memory, memory_fn=self.remember)
        return Retention(budget=budget, recent=min(self.recent, budget), rule=rule)

    def record(self, step: Step) -> Tensor:
        """Minus the number of steps with less than average attention."""
        return -step.memory[..., 0]

    def remember(self, rows: AttentionRows) -> Tensor:
        """The record, and the steps in it; all numbers are whole and exact."""
        seen = rows.seen[:, :, -self.window :]  # of more rows, all but the last leave the window again
        attention = rows.probabilities[:, :, :, -self.window :].mean(2)
        low = seen & (attention * seen.sum(-1, keepdim=True) < AVERAGE)
        low = low.transpose(2, 3).to(rows.memory.dtype)  # [B, K, N, Q]
        at = rows.now[..., None, -self.window :] % self.window  # each step takes the place of the one that leaves
        bit = 2.0 ** (at % BITS).to(low.dtype)
        place = (1 + at // BITS).expand(low.shape)
        change = low - (rows.memory.gather(-1, place) / bit).floor() % 2
        memory = rows.memory.scatter_add(-1, place, change * bit)
        memory[..., 0] += change.sum(-1)
        return memory
