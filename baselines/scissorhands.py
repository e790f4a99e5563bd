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

from a2sf.policies.base import Policy, Retention, check_tokens
from a2sf.policies.rule import Rule, Step

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
        check_tokens("policy.window", self.window, least=1)
        check_tokens("policy.recent", self.recent)

    def retention(self, budget: int, layer: int) -> Retention:
        # a token's memory: its record, and which of the last steps are in it
        rule = Rule(scored=False, priority_fn=self.record, memory=1 + -(-self.window // BITS))
        return Retention(budget=budget, recent=min(self.recent, budget), rule=rule)

    def record(self, step: Step) -> tuple[Tensor, Tensor]:
        """Minus the number of steps with less than average attention, and the memory of these steps."""
        cached = step.cached.sum(-1, keepdim=True)
        low = (step.probabilities.mean(2) * cached < AVERAGE).to(step.scores.dtype)
        at = step.now % self.window  # this step takes the place of the one that leaves the window
        bit = 2.0 ** (at % BITS).to(low.dtype)
        place = (1 + at // BITS)[..., None].expand(*low.shape, 1)
        held = step.memory.gather(-1, place)[..., 0]
        change = low - (held / bit).floor() % 2
        memory = step.memory.scatter(-1, place, (held + change * bit)[..., None])
        memory[..., 0] += change
        return -memory[..., 0], memory
