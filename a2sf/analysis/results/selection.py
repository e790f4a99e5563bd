"""Which results are shown, and under which names: filters, groups of tasks, lm-eval's options, one metric."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from a2sf.analysis.results.directions import add_shares, of_one_kind
from a2sf.analysis.results.errors import add_group_intervals, add_intervals
from a2sf.analysis.results.grid import SYSTEM, Grid
from a2sf.analysis.results.labels import DASH, name_settings, shorten_names
from a2sf.analysis.results.limits import limit_label
from a2sf.analysis.results.variants import label_variants
from a2sf.errors import UserError, nearest
from a2sf.store.aggregates import OPTIONS, TaskGroup, aggregates
from a2sf.store.names import Named, distinct
from a2sf.store.runs import TABLE, StoredCell

DEFAULT_METRIC = "acc"
LONGEST = 40
"""Characters of an option's value in a table's title."""


@dataclass(frozen=True)
class Selection:
    """Which results to show; an empty tuple shows all of a kind.

    Attributes:
        metric: the metric's name as in lm-eval; None takes `acc` where a task has it, else the first by name.
        limits: numbers of documents, or `all`; empty: of each sweep the largest, if it has every system of a smaller one.
        mixed: show cells side by side although they differ in a `MUST_AGREE` key.
        strict: refuse cells that were computed with different versions of a library.
        by_documents: averages over tasks count each document once, and not each task.
    """

    metric: str | None = None
    models: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    schedules: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    shots: tuple[int, ...] = ()
    limits: tuple[str, ...] = ()
    mixed: bool = False
    strict: bool = False
    by_documents: bool = False


def select(
    frame: pd.DataFrame,
    cells: dict[str, StoredCell],
    selection: Selection,
    notes: list[str],
    groups: Sequence[TaskGroup],
) -> Iterator[Grid]:
    """The selected rows of a frame as grids: filtered, of one metric, with names that tell them apart.

    If the selection names no metric, tasks that do not have that of the first grid are in further ones; and those in which
    its values have another meaning (`of_one_kind`).

    Args:
        frame: one row per cell and metric, as `gather` makes it.
        cells: by the frame's `key`.
        notes: for the reader; those of a grid are added to it.
        groups: all groups of tasks; those of which tasks are left out are not shown.

    Raises:
        UserError: if nothing matches, or the cells should not be mixed.
    """
    frame["model"] = _distinct_models(frame)
    groups, tasks = chosen_groups(groups, selection.tasks)
    frame = _filtered(frame, replace(selection, tasks=tasks))
    while True:
        chosen, metric, others = _one_metric(frame, selection.metric)
        without = _left_out(frame, metric, others) if selection.metric else []
        said = [*notes, *without]
        add_shares(chosen, cells, metric)
        for rows in of_one_kind(chosen, metric, said):
            yield _grid(rows, cells, metric, selection, list(said), groups)
        if selection.metric or not others:
            return
        frame = frame[frame["task"].isin(others)]


def _grid(
    frame: pd.DataFrame,
    cells: dict[str, StoredCell],
    metric: str,
    selection: Selection,
    notes: list[str],
    groups: Sequence[TaskGroup],
) -> Grid:
    frame = _without_duplicates(frame)
    frame["model"] = models_with_options(frame)
    place = ["model", "shots", "task", *SYSTEM]
    frame = shorten_names(label_variants(frame, selection.mixed, place, notes), place)
    frame = name_settings(frame)
    used = {k: c for k, c in cells.items() if k in set(frame["key"])}
    add_intervals(frame, used, metric)
    scores, incomplete = aggregates(frame, groups, ["model", *SYSTEM])
    if len(scores):
        for name in sorted(scores.loc[scores["shots"].isna(), "task"].unique()):
            notes.append(f"The tasks of the group {name} have different shots, so its score is in {TABLE} alone.")
        scores = scores[scores["shots"].notna()].copy()
        add_group_intervals(scores, frame, groups, metric)
    grid = Grid(
        frame.reset_index(drop=True),
        used,
        metric,
        (*notes, *incomplete),
        selection.mixed,
        tuple(groups),
        scores,
        selection.by_documents,
    )
    if selection.strict and (note := grid.versions_note):
        raise UserError(f"{note} Compute them with one, choose among them, or leave out --strict.")
    return grid


def _filtered(frame: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """The rows of the selected models, tasks, shots, limits, policies, budgets, factors and schedules.

    A filter on budgets, factors or schedules keeps the rows that have none, the full cache above all.
    """
    wanted = {
        "model": selection.models,
        "task": selection.tasks,
        "shots": selection.shots,
        "limit": selection.limits,
        "policy": selection.policies,
        "budget": selection.budgets,
        "factor": selection.factors,
        "schedule": selection.schedules,
    }
    for column, values in wanted.items():
        if not values:
            continue
        without = frame["is_full"] & (column in ("budget", "factor", "schedule"))
        if column == "factor":
            without |= frame["factor"].eq(DASH)
        shown = frame["limit"].map(limit_label) if column == "limit" else frame[column]
        present = shown[~without].unique()
        for value in values:
            if value not in present:
                hint = nearest(str(value), map(str, present))
                known = ", ".join(map(str, sorted(present)))
                raise UserError(f"There is no result with {column} {value}{hint}; there are: {known}.")
        frame = frame[shown.isin(values) | without]
    return frame


def _distinct_models(frame: pd.DataFrame) -> list[str]:
    """Names that put no two different weights under one, whichever sweeps they come from."""
    known = frame[["model", "model_path", "weights"]].astype(object)
    known = known.where(known.notna(), None)
    models = [Named(name, path or name, weights) for name, path, weights in known.itertuples(index=False)]
    names = distinct(models)
    return [names[m] for m in models]


def _one_metric(frame: pd.DataFrame, metric: str | None) -> tuple[pd.DataFrame, str, list[str]]:
    """The rows of one metric, its name, and the tasks that do not have it."""
    present = sorted(frame["metric"].unique())
    if metric is None:
        metric = DEFAULT_METRIC if DEFAULT_METRIC in present else present[0]
    elif metric not in present:
        raise UserError(f"No task has the metric {metric}{nearest(metric, present)}; there are: {', '.join(present)}.")
    chosen = frame[frame["metric"] == metric].copy()
    return chosen, metric, sorted(set(frame["task"]) - set(chosen["task"]))


def _left_out(frame: pd.DataFrame, metric: str, tasks: Sequence[str]) -> list[str]:
    """A note for each task that does not have the metric."""
    has = {task: ", ".join(sorted(frame.loc[frame["task"] == task, "metric"].unique())) for task in tasks}
    return [f"The task {t} has no metric {metric} (it has {has[t]}), so it is left out." for t in tasks]


def _without_duplicates(frame: pd.DataFrame) -> pd.DataFrame:
    """The same cell met in two sweeps is one cell; cells of more documents, or fewer, share its id."""
    known = frame["cell_id"].notna()
    return frame[~(known & frame.duplicated(["cell_id", "limit", "stopped", "metric"]))].copy()


def chosen_groups(groups: Sequence[TaskGroup], chosen: tuple[str, ...]) -> tuple[list[TaskGroup], tuple[str, ...]]:
    """The groups to show, and the tasks; the name of a group stands for its tasks.

    Args:
        groups: a group that was noted twice counts as noted last.
        chosen: tasks and groups to show; all if it is empty.
    """
    latest = list({(g.name, tuple(m.shots for m in g.members)): g for g in groups}.values())
    if not chosen:
        return latest, chosen
    members = {g.name: [m.task for m in g.members] for g in latest}
    tasks = tuple(dict.fromkeys(t for name in chosen for t in members.get(name, [name])))
    return [g for g in latest if set(members[g.name]) <= set(tasks)], tasks


def models_with_options(frame: pd.DataFrame) -> pd.Series:
    """Models, with those of lm-eval's options behind their names in which results of one task differ."""
    names = frame["model"].astype(str).copy()
    for key in OPTIONS:
        text = frame[key].map(lambda v: "" if pd.isna(v) else str(v).lower() if isinstance(v, bool) else str(v))
        differ = text.groupby(frame["task"]).transform("nunique") > 1
        chosen = differ & (text != "")
        names[chosen] += ", " + text[chosen].map(lambda v, key=key: key if v == "true" else f"{key} {_shortened(v)}")
    return names


def _shortened(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST]}… #{zlib.crc32(text.encode()):08x}"
