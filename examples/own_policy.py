"""A policy of one's own in 20 lines, and its invariants. `a2sf check own_policy:FirstAndLast` does the same from here."""

from dataclasses import dataclass
from typing import ClassVar

from a2sf import Policy, Retention


@dataclass(frozen=True, kw_only=True)
class FirstAndLast(Policy):
    """A share of the budget for the first tokens, the rest for the newest.

    Attributes:
        first_share: share of the budget that the first tokens take, from 0 to 1.
    """

    name: ClassVar[str] = "first_and_last"
    label: ClassVar[str] = "First and last"

    first_share: float = 0.25

    def retention(self, budget: int, layer: int) -> Retention:
        sinks = int(budget * self.first_share)
        return Retention(budget=budget, sinks=sinks, recent=budget - sinks)


if __name__ == "__main__":
    from a2sf.engine.invariants import check, in_words

    for finding in check(FirstAndLast()):
        print(
            "broken" if finding.broken else "holds ",
            finding.name,
            f"({in_words(finding.schedule)})",
            finding.broken or "",
        )
