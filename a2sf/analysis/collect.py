"""Sweeps gathered into one frame: what tables, plots and reports read.

One row of `Grid.frame` is one cell and metric. Directories of cells give everything; a directory with only a
`results.csv` gives the numbers without the documents behind them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from a2sf.analysis.apart import MUST_AGREE, kept_apart, newest_documents, rest_of_identity
from a2sf.analysis.asked import asked_groups, with_options
from a2sf.analysis.documents import TEXT, documents_of, may_share, texts_of
from a2sf.analysis.labels import DASH, budget_label, factor_label, first_of, name_settings, one_name, settings_label
from a2sf.errors import UserError, nearest
from a2sf.store.aggregates import MEMBERS, OPTIONS, Group, aggregates
from a2sf.store.archive import groups_of, is_archive, read_sweep
from a2sf.store.names import Named, distinct
from a2sf.store.runs import COMPUTED_WITH, TABLE, StoredCell, id_of, is_cell, name_of, results_frame

OPTIONAL_COLUMNS = [
    *("stderr", "forgetting_factor", "budget_tokens", "budget_base", "policy_settings", *MUST_AGREE),
    *("tokens_per_second", "kept_tokens", "cache_share", "cell", "cell_id", "model_path", "weights"),
    *("schedule", "causal", "data_settings", "rest", *OPTIONS, *COMPUTED_WITH),
]
SYSTEM = ["policy", "settings", "factor", "budget", "schedule", "variant"]
"""Columns that tell one table row from another."""
DEFAULT_METRIC = "acc"
DEFAULT_PAIR = ("a2sf", "h2o")
"""The comparison the project is about: the first policy minus the second, at the same budget."""
STEP = "step"
"""How tables write the schedule that a result without one had."""


@dataclass(frozen=True)
class Selection:
    """Which results to show; an empty tuple shows all of a kind.

    Attributes:
        metric: the metric's name as in lm-eval; None takes `acc` where a task has it.
        mixed: show cells side by side although they differ in a `MUST_AGREE` key.
        strict: refuse cells that were computed with different versions of a library.
    """

    metric: str | None = None
    models: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    schedules: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    shots: tuple[int, ...] = ()
    mixed: bool = False
    strict: bool = False


@dataclass(frozen=True)
class System:
    """A policy at one budget, schedule and forgetting factor: one row of a table.

    Attributes:
        label: how tables spell the policy, with what tells two of its settings apart, and the schedule if several are shown.
        bare: the same without the schedule.
        budget, factor, schedule: as tables write them.
        causal: False for a policy that looks at later tokens: an oracle (upper bound), compared with no other.
        keys: task -> key of the cell (`Grid.cells`, `Grid.frame`).
        rows: task -> the frame's row.
    """

    policy: str
    label: str
    bare: str
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

    def value(self, task: str) -> float:
        return float(self.rows[task].value)

    def average(self, tasks: Sequence[str]) -> float | None:
        """Unweighted mean over tasks; None where one is missing."""
        return fmean(map(self.value, tasks)) if set(tasks) <= set(self.rows) else None


@dataclass(frozen=True)
class Grid:
    """Selected results of one or more sweeps.

    Attributes:
        frame: one row per cell, one metric.
        cells: the cells behind the rows, by the frame's `key`; empty where only a results.csv was there.
        metric: the metric shown.
        notes: what a reader has to be told, one sentence each.
        groups: whose tasks were asked for together.
        scores: one row per group and system that has all of its tasks.
    """

    frame: pd.DataFrame
    cells: dict[str, StoredCell]
    metric: str
    notes: tuple[str, ...] = field(default=())
    mixed: bool = False
    groups: tuple[Group, ...] = ()
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def tasks(self) -> list[str]:
        return sorted(self.frame["task"].unique())

    @property
    def percent(self) -> bool:
        """Whether the metric is a share, shown as a percentage."""
        return self.metric.startswith(("acc", "exact_match", "em", "f1", "mc", "recall")) and bool(
            self.frame["value"].between(0, 1).all()
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
        told = []
        for name in COMPUTED_WITH:
            if (counts := self.frame[name].dropna().value_counts(sort=False)).size > 1:
                parts = (f"{name} {version} ({n} cells)" for version, n in sorted(counts.items()))
                told.append(", ".join(parts))
        return f"Computed with different versions, which can move numbers: {'; '.join(told)}." if told else ""

    def systems(self, pair: tuple[str, str] = DEFAULT_PAIR) -> list[System]:
        """Every system of a grid with one model and number of shots: full cache on top, then by budget and schedule.

        Within these the pair that is compared comes last of those that are causal, the policies before it in the order of
        their names.
        """
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in self.frame.itertuples():
            groups.setdefault(tuple(getattr(row, k) for k in SYSTEM), {})[str(row.task)] = row
        systems = []
        for by_task in groups.values():
            first = next(iter(by_task.values()))
            more = ["label", "bare", "budget_order", "factor_value", "is_full", "causal"]
            same = {k: getattr(first, k) for k in [*SYSTEM, *more]}
            systems.append(System(**same, keys={task: r.key for task, r in by_task.items()}, rows=by_task))

        def order(s: System) -> tuple[Any, ...]:
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

    def apart(self) -> list[tuple[str, Grid]]:
        """One grid for each value of what a sweep varied without a column (`a2sf.analysis.apart`), with its name."""
        return [(str(v), replace(self, frame=rows)) for v, rows in self.frame.groupby("variant", sort=False)]

    def at(self, schedule: str) -> Grid:
        """The pruned cells of one schedule, with the full cache's."""
        return replace(self, frame=self.frame[self.frame["is_full"] | (self.frame["schedule"] == schedule)])

    def parts(self) -> list[tuple[str, int, Grid]]:
        """One grid per model and shots, in that order."""

        def scores(model: str, shots: int) -> pd.DataFrame:
            return self.scores[(self.scores["model"] == model) & (self.scores["shots"] == shots)]

        groups = self.frame.groupby(["model", "shots"], sort=True)
        places = [(str(key[0]), int(str(key[1])), rows) for key, rows in groups]
        return [
            (m, n, replace(self, frame=rows, scores=scores(m, n) if len(self.scores) else self.scores))
            for m, n, rows in places
        ]

    def group_scores(self) -> dict[str, dict[tuple[Any, ...], Any]]:
        """Group -> system, by its `SYSTEM` -> the row of `scores`; of a grid with one model and number of shots."""
        found: dict[str, dict[tuple[Any, ...], Any]] = {}
        for row in self.scores.itertuples():
            found.setdefault(str(row.task), {})[tuple(getattr(row, k) for k in SYSTEM)] = row
        return found


def gather(directories: Sequence[Path], selection: Selection | None = None) -> Grid:
    """Read sweeps and keep what is selected.

    Raises:
        UserError: if a directory is missing or empty, nothing matches, or the cells should not be mixed.
    """
    frames: list[pd.DataFrame] = []
    cells: dict[str, StoredCell] = {}
    notes: list[str] = []
    groups: list[Group] = []
    for directory in directories:
        if not is_archive(directory) and (directory / TABLE).is_file() and not any(map(is_cell, directory.iterdir())):
            frames.append(_from_csv(directory))
            notes.append(
                f"{directory} holds only a {TABLE}: paired tests need the per-document files, so there are none."
            )
            continue
        groups += groups_of(directory)
        stored = newest_documents(list(read_sweep(directory)), notes)
        frame = _from_cells(stored, name_of(directory))
        frames.append(frame)
        cells |= {f"{name_of(directory)}/{name_of(c.path)}": c for c in stored}
    return _select(pd.concat(frames, ignore_index=True), cells, selection or Selection(), notes, groups)


def grid_of(cells: Sequence[StoredCell], selection: Selection | None = None, groups: Sequence[Group] = ()) -> Grid:
    """The same for cells already read."""
    if not cells:
        raise UserError("There is no finished cell to show.")
    keyed = {f"{name_of(c.path.parent)}/{name_of(c.path)}": c for c in cells}
    frame = _from_cells(list(cells), None)
    return _select(frame, keyed, selection or Selection(), [], groups)


def schedule_order(schedule: str) -> tuple[bool, str, int]:
    """Sorts schedules: step first, every16 after every4."""
    digits = re.search(r"\d+", schedule)
    return schedule not in (STEP, DASH), re.sub(r"\d+", "", schedule), int(digits[0]) if digits else 0


def _from_cells(cells: Sequence[StoredCell], source: str | None) -> pd.DataFrame:
    frame = results_frame(cells)
    more = []
    for stored in cells:
        timing = stored.result["timing"]
        common = {
            "source": source or name_of(stored.path.parent),
            "cell": name_of(stored.path),
            "label": stored.cell.get("policy_label") or stored.cell["policy"],
            "cell_id": id_of(stored.cell),
            "causal": stored.cell.get("policy_causal", True),
            "rest": rest_of_identity(stored.cell),
            "kept_tokens": timing.get("kept_tokens_mean"),
            "cache_share": timing.get("cache_share"),
        }
        more += [
            common | {"metric": name, "higher_is_better": m.get("higher_is_better", True)}
            for name, m in stored.metrics.items()
        ]
    extra = pd.DataFrame(more, columns=None if more else ["source", "cell", "metric"])
    return _tidy(frame.merge(extra, on=["cell", "metric"], how="left", validate="1:1"))


def _from_csv(directory: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(directory / TABLE, dtype={"forgetting_factor": object, "budget_ratio": object})
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / TABLE} cannot be read ({error}).") from error
    needed = {"model", "policy", "budget_ratio", "shots", "task", "metric", "value", "n"}
    if missing := needed - set(frame.columns):
        raise UserError(f"{directory / TABLE} lacks the column {', '.join(sorted(missing))}.")
    if frame.empty:
        raise UserError(f"{directory / TABLE} holds no row; run `a2sf run` with that sweep first.")
    if MEMBERS in frame:  # a group's score, of cells that are here, too
        frame = frame[frame[MEMBERS].isna()].copy()
    frame["budget_ratio"] = [_number_or_text(v) for v in frame["budget_ratio"]]
    frame["label"], frame["source"] = frame["policy"], name_of(directory)
    frame["higher_is_better"] = ~frame["metric"].str.contains("perplexity|bits_per_byte|loss")
    return _tidy(frame)


def _tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """Add what tables sort and group by."""
    for column in OPTIONAL_COLUMNS:
        if column not in frame:
            frame[column] = None
    # files of published numbers have no base; there a ratio of 1 is the full cache
    whole = np.array([first_of(r) >= 1.0 for r in frame["budget_ratio"]])
    frame["is_full"] = whole & frame["budget_base"].isna() & frame["budget_tokens"].isna()
    budgets = frame[["is_full", "budget_ratio", "budget_tokens", "budget_base"]]
    labelled = [budget_label(*row) for row in budgets.itertuples(index=False)]
    frame["budget"], frame["budget_order"] = ([pair[i] for pair in labelled] for i in (0, 1))
    frame["factor"] = [factor_label(v) for v in frame["forgetting_factor"]]
    frame["factor_value"] = pd.to_numeric(frame["forgetting_factor"], errors="coerce")
    frame["settings"] = [settings_label(s) for s in frame["policy_settings"]]
    frame["schedule"] = frame["schedule"].fillna("").astype(str).replace("", STEP).mask(frame["is_full"], DASH)
    frame["causal"] = ~frame["causal"].isin([False])
    frame["stderr"] = pd.to_numeric(frame["stderr"], errors="coerce")
    frame["key"] = frame["source"] + "/" + frame["cell"].fillna("").astype(str)
    frame["variant"] = ""
    frame["data_settings"] = frame["data_settings"].fillna("{}").astype(str).replace("", "{}")
    frame["rest"] = frame["rest"].fillna("{}")
    return frame


def _select(
    frame: pd.DataFrame,
    cells: dict[str, StoredCell],
    selection: Selection,
    notes: list[str],
    groups: Sequence[Group],
) -> Grid:
    frame["model"] = _distinct_models(frame)
    groups, tasks = asked_groups(groups, selection.tasks)
    selection = replace(selection, tasks=tasks)
    wanted = {
        "model": selection.models,
        "task": selection.tasks,
        "shots": selection.shots,
        "policy": selection.policies,
        "budget": selection.budgets,
        "factor": selection.factors,
        "schedule": selection.schedules,
    }
    for column, values in wanted.items():
        if not values:
            continue
        # a filter on budgets or factors keeps the rows that have none, the full cache above all
        spared = frame["is_full"] | frame["factor"].eq(DASH) if column == "factor" else frame["is_full"]
        spared = spared if column in ("budget", "factor", "schedule") else pd.Series(False, index=frame.index)
        present = frame.loc[~spared, column].unique()
        for value in values:
            if value not in present:
                hint = nearest(str(value), map(str, present))
                there = ", ".join(map(str, sorted(present)))
                raise UserError(f"There is no result with {column} {value}{hint}; there are: {there}.")
        frame = frame[frame[column].isin(values) | spared]
    frame, metric, lacking = _one_metric(frame, selection.metric)
    frame = _without_duplicates(frame)
    frame["model"] = with_options(frame)
    place = ["model", "shots", "task", *SYSTEM]
    frame = one_name(kept_apart(frame, selection.mixed, place, notes), place)
    frame = name_settings(frame)
    used = {k: c for k, c in cells.items() if k in set(frame["key"])}
    _errors_by_text(frame, used, metric)
    scores, incomplete = aggregates(frame, groups, ["model", *SYSTEM])
    if len(scores):
        for name in sorted(scores.loc[scores["shots"].isna(), "task"].unique()):
            lacking.append(f"The tasks of the group {name} have different shots, so its score is in {TABLE} alone.")
        scores = scores[scores["shots"].notna()]
    told = (*notes, *lacking, *incomplete)
    grid = Grid(frame.reset_index(drop=True), used, metric, told, selection.mixed, tuple(groups), scores)
    if selection.strict and (note := grid.versions_note):
        raise UserError(f"{note} Compute them with one, choose among them, or leave out --strict.")
    return grid


def _distinct_models(frame: pd.DataFrame) -> list[str]:
    """Names that put no two different weights under one, whichever sweeps they come from."""
    known = frame[["model", "model_path", "weights"]].astype(object)
    known = known.where(known.notna(), None)
    models = [Named(name, path or name, weights) for name, path, weights in known.itertuples(index=False)]
    names = distinct(models)
    return [names[m] for m in models]


def _one_metric(frame: pd.DataFrame, metric: str | None) -> tuple[pd.DataFrame, str, list[str]]:
    present = sorted(frame["metric"].unique())
    if metric is None:
        metric = DEFAULT_METRIC if DEFAULT_METRIC in present else present[0]
    elif metric not in present:
        raise UserError(f"No task has the metric {metric}{nearest(metric, present)}; there are: {', '.join(present)}.")
    chosen = frame[frame["metric"] == metric].copy()
    notes = []
    for task in sorted(set(frame["task"]) - set(chosen["task"])):
        has = ", ".join(sorted(frame.loc[frame["task"] == task, "metric"].unique()))
        notes.append(f"The task {task} has no metric {metric} (it has {has}), so it is left out.")
    return chosen, metric, notes


def _errors_by_text(frame: pd.DataFrame, cells: dict[str, StoredCell], metric: str) -> None:
    """Standard errors of means over texts, where documents share some: lm-eval's take documents for independent."""
    for row, key in frame["key"].items():
        with suppress(UserError):  # who needs the documents says that they cannot be read
            documents = documents_of(cells[key]) if key in cells and may_share(cells[key]) else None
            column = f"metric/{metric}"
            if documents is not None and TEXT in documents and column in documents:
                texts, values = texts_of(documents), documents[column].to_numpy(float)
                if texts.shared and not np.isnan(values).any():
                    frame.loc[row, "stderr"] = texts.standard_error(values)


def _without_duplicates(frame: pd.DataFrame) -> pd.DataFrame:
    """The same cell met in two sweeps is one cell; cells of more documents, or fewer, share its id."""
    known = frame["cell_id"].notna()
    return frame[~(known & frame.duplicated(["cell_id", "limit", "stopped", "metric"]))].copy()


def _number_or_text(value: Any) -> Any:
    try:
        return float(value)
    except ValueError:
        return value
