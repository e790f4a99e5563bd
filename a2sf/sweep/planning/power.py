"""The keys `plan.flips` and `plan.detect`: what a plan says about the differences that its sweep can detect."""

from __future__ import annotations

from dataclasses import dataclass

from a2sf.errors import ConfigError
from a2sf.tasks.numbers import is_number


@dataclass(frozen=True)
class PowerSettings:
    """The checked keys `plan.flips` and `plan.detect`.

    Attributes:
        flips: share of documents on which two systems differ; None: that of earlier results.
        detect: difference in points; None: none was given.

    Raises:
        ConfigError: if a value is not allowed.
    """

    flips: float | None = None
    detect: float | None = None

    def __post_init__(self) -> None:
        if not (self.flips is None or (is_number(self.flips) and 0 < self.flips <= 1)):
            raise ConfigError(
                "plan.flips", self.flips, "give a share of the documents above 0 and up to 1, such as 0.15"
            )
        if not (self.detect is None or (is_number(self.detect) and 0 < self.detect <= 100)):
            raise ConfigError("plan.detect", self.detect, "give a number of points above 0 and up to 100, such as 2.0")
        if self.flips is not None and self.detect is not None and self.detect > 100 * self.flips + 1e-9:
            share = f"{100 * self.flips:g} % of the documents (plan.flips)"
            why = f"the accuracies of two systems that differ on {share} differ by at most as many points"
            raise ConfigError("plan.detect", self.detect, why)

    @property
    def given(self) -> bool:
        """Whether the user has set one of the two keys."""
        return self.flips is not None or self.detect is not None
