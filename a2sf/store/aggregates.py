"""Groups of tasks: a score computed from the scores of several tasks, as in lm-eval.

The tasks of a group and their weights are stored with a sweep (`groups.json`), not in its cells. So a cell does not
depend on the groups that it is part of, and tables can be made without lm-eval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

OPTIONS = [
    *("chat_template", "system_instruction", "fewshot_as_multiturn", "gen_kwargs", "samples", "enable_thinking"),
    *("think_end_token", "task_args", "add_bos_token"),
]
"""Columns for lm-eval's options; empty if an option is not set."""
SAME = [
    *("model", "policy", "budget_ratio", "forgetting_factor", "model_path", "weights", "budget_tokens", "budget_base"),
    *("schedule", "policy_settings", "limit", "seed", "dtype", "data_settings", "device", *OPTIONS),
]
"""Columns of `results.csv` that are equal in all cells of one aggregate."""
MEMBERS = "members"
"""Column with the number of tasks of a group; empty for a cell."""
LM_EVAL_STDERR = "lm_eval_stderr"
"""Column with the standard error that lm-eval gives, which takes documents as independent."""
NAMED = 3
"""The largest number of tasks that a note names."""


@dataclass(frozen=True)
class Member:
    """A task of a group: its name, its number of examples, and the hash of its definition (None: lm-eval's definition)."""

    task: str
    shots: int
    definition: str | None = None


@dataclass(frozen=True)
class Average:
    """A metric that a group averages over its tasks.

    Attributes:
        filters: lm-eval's filters of the metric; None: all of them.
        weighted: whether tasks are weighted by their numbers of documents.
    """

    metric: str
    filters: tuple[str, ...] | None
    weighted: bool


@dataclass(frozen=True)
class TaskGroup:
    """A group of a sweep, with the metrics that it averages and its tasks."""

    name: str
    averages: tuple[Average, ...]
    members: tuple[Member, ...]

    @property
    def shots(self) -> int | None:
        """The shots of its tasks; None if they differ."""
        several = {m.shots for m in self.members}
        return several.pop() if len(several) == 1 else None

    def weighted(self, metric: str) -> bool | None:
        """Whether a metric, named as in results, is weighted by size; None if the group does not average it."""
        name, _, filtered = metric.partition(",")
        for a in self.averages:
            if a.metric == name and (a.filters is None or (filtered or "none") in a.filters):
                return a.weighted
        return None


def groups_to_json(groups: Iterable[TaskGroup]) -> str:
    """Groups as JSON."""
    return json.dumps([asdict(g) for g in groups], indent=1) + "\n"


def groups_from_json(text: str) -> list[TaskGroup]:
    """Groups from the JSON of `groups_to_json`."""
    return [
        TaskGroup(
            e["name"],
            tuple(Average(a["metric"], a["filters"] and tuple(a["filters"]), a["weighted"]) for a in e["averages"]),
            tuple(Member(**m) for m in e["members"]),
        )
        for e in json.loads(text)
    ]


def aggregates(
    table: pd.DataFrame, groups: Iterable[TaskGroup], same: Sequence[str] = SAME
) -> tuple[pd.DataFrame, list[str]]:
    """The scores of groups, one row for each group, metric and system with results of all tasks.

    Args:
        table: one row per cell and metric, as `results_frame`.
        same: columns that are equal in all cells of one aggregate.

    Returns:
        Rows with those columns of `table` that apply, and `members`; and a sentence for each group with missing results.
    """
    same = [c for c in same if c in table]
    # no "\0": pandas before 3.1 groups texts by what comes before it
    keys = pd.Series(
        ["\x1f".join(map(str, row)) for row in table[same].itertuples(index=False)], table.index, dtype=object
    )
    definitions = table["definition"] if "definition" in table else [None] * len(table)
    places = [
        (task, int(shots), None if pd.isna(d) else d)
        for task, shots, d in zip(table["task"], table["shots"], definitions, strict=True)
    ]
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for group in groups:
        wanted = {(m.task, m.shots, m.definition) for m in group.members}
        mine = [place in wanted for place in places]
        missing: set[str] = set()
        for _, cells in table[mine].groupby(keys[mine], sort=False):
            available = set(zip(cells["task"], cells["shots"], strict=True))
            lacking = {m.task for m in group.members if (m.task, m.shots) not in available}
            if lacking:
                missing |= lacking
            elif cells.duplicated(["task", "shots", "metric"]).any():
                notes.append(f"The group {group.name} has no score where a task has two results, of other documents.")
            elif "stopped" in cells and cells["stopped"].notna().any():
                notes.append(f"The group {group.name} has no score where a task stopped before its last document.")
            else:
                about = {key: cells[key].iloc[0] for key in same}
                rows += [about | score for score in _scores(group, cells)]
        if missing:
            number = len({m.task for m in group.members})
            first = ", ".join(sorted(missing)[:NAMED]) + ", …" * (len(missing) > NAMED)
            notes.append(
                f"The group {group.name} has no score in rows that lack some of its {number} tasks; missing are {first}."
            )
    return pd.DataFrame(rows), list(dict.fromkeys(notes))


def _scores(group: TaskGroup, cells: pd.DataFrame) -> list[dict[str, Any]]:
    """As lm-eval's `Group.aggregate`: over the tasks that have a metric, with its two formulas for the standard error."""
    found = []
    for metric, of_metric in cells.groupby("metric", sort=False):
        weighted = group.weighted(str(metric))
        if weighted is None:
            continue
        columns = ("task", "shots", "value", LM_EVAL_STDERR, "n")
        known = {(task, shots): rest for task, shots, *rest in zip(*(of_metric[c] for c in columns), strict=True)}
        parts = [known[m.task, m.shots] for m in group.members if (m.task, m.shots) in known]
        values, errors = ([math.nan if pd.isna(p[i]) else float(p[i]) for p in parts] for i in (0, 1))
        sizes = [int(n) for _, _, n in parts]
        found.append(
            {
                "task": group.name,
                "shots": group.shots,
                "metric": metric,
                "value": _mean(values, sizes if weighted else [1] * len(sizes)),
                LM_EVAL_STDERR: _pooled(errors, sizes)
                if weighted
                else math.sqrt(sum(e**2 for e in errors)) / len(errors),
                "n": sum(sizes),
                MEMBERS: len(parts),
                "weighted": weighted,
            }
        )
    return found


def _mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    return sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)


def _pooled(errors: Sequence[float], sizes: Sequence[int]) -> float:
    """The standard error of a mean weighted by size, from the pooled variance."""
    freedom = sum(sizes) - len(sizes)
    if not freedom:
        return math.nan
    variance = sum((n - 1) * e**2 * n for n, e in zip(sizes, errors, strict=True)) / freedom
    return math.sqrt(variance / sum(sizes))
