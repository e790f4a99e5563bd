"""The selected results of sweeps: one row per cell and metric, and the systems that are the rows of tables."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import pandas as pd

from a2sf.analysis.results.labels import DASH
from a2sf.store.aggregates import TaskGroup
from a2sf.store.runs import COMPUTED_WITH, StoredCell

SYSTEM = ["policy", "settings", "factor", "budget", "schedule", "variant"]
"""Columns that identify a row of a table."""
DEFAULT_PAIR = ("a2sf", "h2o")
"""The project's main comparison: the first policy minus the second, at the same budget."""
AVERAGE = "average"
"""Column name of the unweighted mean over tasks."""
BY_DOCUMENTS = "Average: over all documents, so that tasks count by their size."
"""The note where tasks do not count equally."""
STEP = "step"
"""The schedule of results that do not name one."""


@dataclass(frozen=True)
class SystemResults:
    """A policy at one budget, schedule and forgetting factor: one row of a table.

    Attributes:
        label: how tables name the policy, with settings in which systems differ, and the schedule if several are shown.
        short_label: the same without the schedule.
        policy_label: without settings and variant, too.
        budget, factor, schedule: as tables write them.
        causal: False for a policy that looks at later tokens: an oracle (upper bound), compared with no other.
        keys: task -> key of the cell (`Grid.cells`, `Grid.frame`).
        rows: task -> the frame's row.
        by_documents: whether an average over tasks counts each document once, and not each task.
    """

    policy: str
    label: str
    short_label: str
    policy_label: str
    settings: str
    budget: str
    budget_order: float
    factor: str
    factor_value: float
    schedule: str
    variant: str
    is_full: bool
    causal: bool
    keys: dict[str, str]
    rows: dict[str, Any]
    by_documents: bool = False

    @property
    def named(self) -> str:
        """Its label with its factor."""
        return self.label if self.factor == DASH else f"{self.label} {self.factor}"

    def value(self, task: str) -> float:
        return float(self.rows[task].value)

    def average(self, tasks: Sequence[str]) -> float | None:
        """Mean over tasks; None where one is missing."""
        return fmean(map(self.value, tasks), self.weights(tasks)) if set(tasks) <= set(self.rows) else None

    def weights(self, tasks: Sequence[str]) -> list[float] | None:
        """Of the tasks in an average; None: equal."""
        return [float(self.rows[t].n) for t in tasks] if self.by_documents else None


@dataclass(frozen=True)
class Grid:
    """Selected results of one or more sweeps.

    Attributes:
        frame: one row per cell, one metric.
        cells: the cells behind the rows, by the frame's `key`; empty where only a results.csv was there.
        metric: the metric shown.
        notes: for the reader, one sentence each.
        groups: groups of tasks that were requested.
        scores: one row per group and system that has all of its tasks.
        by_documents: whether averages over tasks count each document once, and not each task.
        whole: the policies of the results that this grid is a part of; None: it is all of them.
    """

    frame: pd.DataFrame
    cells: dict[str, StoredCell]
    metric: str
    notes: tuple[str, ...] = field(default=())
    mixed: bool = False
    groups: tuple[TaskGroup, ...] = ()
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)
    by_documents: bool = False
    whole: tuple[str, ...] | None = None

    @property
    def policies(self) -> tuple[str, ...]:
        """The pruned policies of all models and numbers of shots, in a part of a grid, too."""
        return self.whole or tuple(sorted(self.frame.loc[~self.frame["is_full"], "policy"].unique()))

    @property
    def tasks(self) -> list[str]:
        return sorted(self.frame["task"].unique())

    @property
    def percent(self) -> bool:
        """Whether the metric is a share, shown as a percentage."""
        return self.metric.startswith(("acc", "exact_match", "em", "f1", "mc", "recall")) and bool(
            (self.frame["share"] & self.frame["value"].ge(0)).all()
        )

    @property
    def higher_is_better(self) -> bool:
        return bool(self.frame["higher_is_better"].iloc[0])

    @property
    def cells_shown(self) -> Iterator[StoredCell]:
        """The cells behind the rows of `frame`, which may be fewer than `cells`."""
        return (self.cells[key] for key in dict.fromkeys(self.frame["key"]) if key in self.cells)

    @property
    def versions_note(self) -> str:
        """One sentence where cells were computed with different versions of a library; else nothing."""
        found = []
        for name in COMPUTED_WITH:
            if (counts := self.frame[name].dropna().value_counts(sort=False)).size > 1:
                parts = (f"{name} {version} ({n} cells)" for version, n in sorted(counts.items()))
                found.append(", ".join(parts))
        return f"Computed with different versions, which can move numbers: {'; '.join(found)}." if found else ""

    def systems(self, pair: tuple[str, str] = DEFAULT_PAIR) -> list[SystemResults]:
        """Every system of a grid with one model and number of shots: full cache on top, then by budget and schedule.

        Within these, causal policies by name and then the compared pair; policies that are not causal come last.
        """
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in self.frame.itertuples():
            groups.setdefault(tuple(getattr(row, k) for k in SYSTEM), {})[str(row.task)] = row
        systems = []
        for by_task in groups.values():
            first = next(iter(by_task.values()))
            more = ["label", "short_label", "policy_label", "budget_order", "factor_value", "is_full", "causal"]
            same = {k: getattr(first, k) for k in [*SYSTEM, *more]}
            systems.append(
                SystemResults(
                    **same,
                    keys={task: r.key for task, r in by_task.items()},
                    rows=by_task,
                    by_documents=self.by_documents,
                )
            )

        def order(s: SystemResults) -> tuple[Any, ...]:
            factor = -1.0 if math.isnan(s.factor_value) else s.factor_value
            place = {pair[1]: 1, pair[0]: 2}.get(s.policy, 0)
            where = (not s.is_full, s.budget_order, s.budget, schedule_order(s.schedule), not s.causal)
            return (*where, place, s.policy, s.settings, factor, s.factor, s.variant)

        return sorted(systems, key=order)

    @property
    def schedules(self) -> list[str]:
        """Those of the pruned cells, step first."""
        return sorted(self.frame.loc[~self.frame["is_full"], "schedule"].unique(), key=schedule_order)

    @property
    def one_schedule(self) -> str:
        """What a title adds where all pruned cells have one schedule that is not the usual one; else nothing."""
        return f", schedule {self.schedules[0]}" if len(self.schedules) == 1 and self.schedules != [STEP] else ""

    def by_variant(self) -> list[tuple[str, Grid]]:
        """One grid for each variant (`a2sf.analysis.results.variants`), with its name."""
        return [(str(v), replace(self, frame=rows)) for v, rows in self.frame.groupby("variant", sort=False)]

    def with_schedule(self, schedule: str) -> Grid:
        """The pruned cells of one schedule, with the full cache's."""
        return replace(self, frame=self.frame[self.frame["is_full"] | (self.frame["schedule"] == schedule)])

    def by_model(self) -> list[tuple[str, int, Grid]]:
        """One grid per model and shots, in that order."""

        def scores(model: str, shots: int) -> pd.DataFrame:
            return self.scores[(self.scores["model"] == model) & (self.scores["shots"] == shots)]

        part = replace(self, whole=self.policies)
        groups = self.frame.groupby(["model", "shots"], sort=True)
        places = [(str(key[0]), int(str(key[1])), rows) for key, rows in groups]
        return [
            (m, n, replace(part, frame=rows, scores=scores(m, n) if len(self.scores) else self.scores))
            for m, n, rows in places
        ]

    def group_scores(self) -> dict[str, dict[tuple[Any, ...], Any]]:
        """Group -> system, by its `SYSTEM` -> the row of `scores`; of a grid with one model and number of shots."""
        found: dict[str, dict[tuple[Any, ...], Any]] = {}
        for row in self.scores.itertuples():
            found.setdefault(str(row.task), {})[tuple(getattr(row, k) for k in SYSTEM)] = row
        return found


def schedule_order(schedule: str) -> tuple[bool, str, int]:
    """Sorts schedules: step first, every16 after every4."""
    digits = re.search(r"\d+", schedule)
    return schedule not in (STEP, DASH), re.sub(r"\d+", "", schedule), int(digits[0]) if digits else 0
