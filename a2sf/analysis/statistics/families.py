"""Corrections of p-values and e-values for the number of tests, and the families of tests that are corrected together."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from a2sf.analysis.statistics.choices import CORRECTIONS, FAMILIES
from a2sf.analysis.statistics.paired import holm
from a2sf.errors import ConfigError

ALPHA = 0.05


@dataclass(frozen=True)
class Correction:
    """How p-values are corrected.

    Attributes:
        family: which tests of one kind are corrected together: those of a table (of one model and number of shots), of a
            model, or of everything that is shown.
        method: `holm`: at most 5 % of families have a false finding. `fdr` (Benjamini and Hochberg, 1995): on average at
            most 5 % of a family's findings are false.

    Raises:
        ConfigError: for other values.
    """

    family: str = "table"
    method: str = "holm"

    def __post_init__(self) -> None:
        for name, value, allowed in (("family", self.family, FAMILIES), ("correction", self.method, CORRECTIONS)):
            if value not in allowed:
                raise ConfigError(f"--{name}", value, f"choose {', '.join(allowed)}")

    @property
    def column(self) -> str:
        """Name of a column of corrected p-values in CSV files."""
        return f"p_{self.method}"

    @property
    def label(self) -> str:
        """The same in a heading."""
        return {"holm": "Holm", "fdr": "FDR"}[self.method]

    def adjusted(self, p: Sequence[float | None], tables: Sequence[tuple[str, Hashable]]) -> list[Adjusted | None]:
        """p-values after correction.

        Args:
            p: None where no test was made, which stays None.
            tables: of each test, its model, and the table that it is in (any key, different for different tables).
        """
        families: dict[Hashable, list[tuple[int, float]]] = {}
        for i, (value, table) in enumerate(zip(p, tables, strict=True)):
            family: Hashable = {"table": table, "model": table[0], "sweep": None}[self.family]
            if value is not None:
                families.setdefault(family, []).append((i, value))
        method = holm if self.method == "holm" else benjamini_hochberg
        found: list[Adjusted | None] = [None] * len(p)
        for tests in families.values():
            for (i, _), value in zip(tests, method([value for _, value in tests]), strict=True):
                found[i] = Adjusted(value, len(tests), self)
        return found


@dataclass(frozen=True)
class Adjusted:
    """A p-value after correction.

    Attributes:
        tests: in its family.
    """

    p: float
    tests: int
    correction: Correction

    @property
    def significant(self) -> bool:
        return self.p <= ALPHA

    @property
    def family(self) -> str:
        return self.correction.family

    @property
    def columns(self) -> dict[str, float | int | str]:
        """For CSV files: the p-value, the number of tests in its family, and the family."""
        return {self.correction.column: self.p, "tests": self.tests, "family": self.family}

    @property
    def how(self) -> str:
        """For a caption: which correction, over how many tests of which family; no full stop."""
        where = {"table": "of this table", "model": "of this model", "sweep": "of all tables"}[self.correction.family]
        return self._how(f"over the {self.tests:,} tests {where}" if self.tests > 1 else f"over the only test {where}")

    def _how(self, over: str) -> str:
        if self.correction.method == "holm":
            return f"Holm-corrected {over}"
        return f"false discovery rate (Benjamini and Hochberg) {over}: exploratory, about one finding in twenty may be false"


def how_of_all(tests: Sequence[Adjusted]) -> str:
    """As `Adjusted.how`, for a table with the tests of several models, whose families may differ in size."""
    sizes = [t.tests for t in tests]
    if tests[0].family != "model" or len(tests) == min(sizes):
        return tests[0].how
    return tests[0]._how(f"over the tests of each model ({span(sizes)})")


def span(numbers: Collection[int]) -> str:
    """The smallest and the largest number in words, or the only one: "30 to 1,100"."""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


HOLM = Correction()
"""Over the tests of each table."""


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for the false discovery rate (Benjamini and Hochberg, 1995, J. R. Stat. Soc. B 57)."""
    if not len(p_values):
        return []
    from scipy.stats import false_discovery_control  # takes a second to import

    return [float(p) for p in false_discovery_control(p_values, method="bh")]


def e_bh(e_values: Sequence[float], rate: float = ALPHA) -> list[bool]:
    """Which null hypotheses e-values reject so that on average at most `rate` of the rejections are false.

    It holds for e-values that depend on each other in any way, and that were read at any time (Wang and Ramdas, 2022, J. R.
    Stat. Soc. B 84, "False discovery rate control with e-values"). With m tests, the k largest are rejected, for the largest
    k for which the k-th is at least m / (k rate).
    """
    e = np.asarray(e_values, float)
    ranked = np.sort(e)[::-1]
    enough = np.flatnonzero(ranked * np.arange(1, len(e) + 1) >= len(e) / rate)
    if not enough.size:
        return [False] * len(e)
    return [bool(x) for x in e >= ranked[enough[-1]]]
