"""A laid-out table of scores: its rows and numbers, before they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from a2sf.analysis.results.labels import DASH
from a2sf.analysis.statistics.equivalence import Within, verdict
from a2sf.analysis.statistics.families import Adjusted
from a2sf.analysis.statistics.paired import Difference


@dataclass(frozen=True)
class Entry:
    """One number of a table, in the metric's own unit.

    Attributes:
        stderr, low, high: its standard error and 95 % interval.
        best: the best pruned value at this budget.
        test: p-value of "no difference from the best" after correction; None where no test was made.
    """

    value: float
    stderr: float = math.nan
    n: int = 0
    low: float = math.nan
    high: float = math.nan
    best: bool = False
    test: Adjusted | None = None

    @property
    def worse(self) -> bool:
        """Whether it is significantly worse than the best."""
        return not self.best and self.test is not None and self.test.significant

    @property
    def mark(self) -> str:
        """For CSV files: `best`, `worse` (significantly), `tied` (not significantly), or "" where no test was made."""
        if self.best:
            return "best"
        return "" if self.test is None else "worse" if self.worse else "tied"


@dataclass(frozen=True)
class Equivalence:
    """The average of a system (or its only task) against the full cache's and a margin.

    Attributes:
        difference: the system minus the full cache.
        p_not_worse: p-value of "worse by the margin or more", not corrected.
        test: p-value of "they differ by the margin or more, either way" after correction; None until corrected.
    """

    difference: Difference
    within: Within
    p_not_worse: float
    test: Adjusted | None = None

    @property
    def verdict(self) -> str:
        """`yes`: shown to differ by less than the margin; `no`: the 95 % interval lies outside of it; or `not shown`."""
        return "" if self.test is None else verdict(self.test.p, self.difference, self.within.margin)


@dataclass(frozen=True)
class TableRow:
    """One system; `to_full` and `to_control` are differences of its average (or only task) in the metric's unit.

    Attributes:
        equivalence: of these with the full cache; None where it was not tested.
    """

    label: str
    budget: str
    factor: str
    schedule: str = DASH
    is_full: bool = False
    causal: bool = True
    entries: dict[str, Entry] = field(default_factory=dict)
    to_full: float | None = None
    to_control: float | None = None
    equivalence: Equivalence | None = None


@dataclass(frozen=True)
class Table:
    """A laid-out table.

    Attributes:
        columns: keys of `TableRow.entries`, in order.
        heads: headings of the leading text columns that are used, of `label`, `budget`, `schedule`, `factor`.
        to_full, to_control: headings of the difference columns; None leaves them out.
        tested: whether paired tests were made.
        margin: within which systems are tested to be of the full cache, in the metric's unit; None: they are not.
        higher: whether a higher value is better.
        footnotes: notes under the numbers wherever they are shown, one sentence each.
        stopped: of a column whose documents were not all scored, how many were of how many.
        members: columns of tasks whose group has a column, too.
        documents: of a column, how many documents its rows have; `100 to 200` where they differ.
        chance: of a column, the metric of random choice, where that is known.
    """

    title: str
    model: str
    shots: int
    metric: str
    percent: bool
    columns: list[str]
    rows: list[TableRow]
    heads: tuple[str, ...] = ("label", "budget", "schedule", "factor")
    to_full: str | None = None
    to_control: str | None = None
    tested: bool = False
    margin: float | None = None
    higher: bool = True
    notes: tuple[str, ...] = ()
    footnotes: tuple[str, ...] = ()
    stopped: dict[str, str] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    documents: dict[str, str] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
