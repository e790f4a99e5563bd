"""What the values of a metric mean in each task: whether a higher one is better, and whether they are shares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from a2sf.analysis.results.documents import documents_of
from a2sf.analysis.results.errors import scores_of
from a2sf.analysis.statistics.intervals import right_or_wrong
from a2sf.errors import UserError
from a2sf.store.runs import StoredCell

LOWER = "perplexity|bits_per_byte|loss"
"""Part of the names of metrics of which a lower value is better, where nothing else says so."""


def direction(name: str, metric: Mapping[str, Any]) -> dict[str, bool]:
    """`higher_is_better` of a stored metric, and whether its task says so (`direction_known`).

    lm-eval has None for a metric of a task's own code without `higher_is_better`; results of earlier versions lack the key.
    """
    stated = metric.get("higher_is_better", True)
    return {
        "higher_is_better": not re.search(LOWER, name) if stated is None else bool(stated),
        "direction_known": stated is not None,
    }


def of_one_kind(frame: pd.DataFrame, metric: str, notes: list[str]) -> list[pd.DataFrame]:
    """The rows of one metric, apart where its values in some tasks have another meaning: no table or average holds both.

    A higher value is better in some tasks, and a lower one in others; or its values are at most 1 in some (shares), and
    more in others (from 0 to 100), which only counts where higher is better: losses may be anything.

    Args:
        frame: with `share`.
        notes: what is to be said of it is added.
    """
    higher = frame["higher_is_better"].astype(bool)
    for better, word in ((True, "higher"), (False, "lower")):
        rows = frame[higher == better]
        if unknown := _tasks(rows[~rows["direction_known"].astype(bool)]):
            notes.append(
                f"{unknown}: nothing says whether a higher or a lower {metric} is better; {word} is taken as "
                "better (higher_is_better in the metric_list of the task's file says it)."
            )
    share = frame["share"].groupby(frame["task"]).transform("all") & higher
    kinds = list(dict.fromkeys(zip(higher, share, strict=True)))  # the first row's first
    parts = [frame[(higher == better) & (share == shares)] for better, shares in kinds]
    for (better, shares), rows in zip(kinds[1:], parts[1:], strict=True):
        if better != kinds[0][0]:
            why = f"a {'higher' if better else 'lower'} {metric} is better"
        else:
            why = f"{metric} is {'at most 1' if shares else 'more than 1 in some documents or results'}"
        notes.append(f"{_tasks(rows)}: {why}, other than in {_tasks(parts[0])}, so it has tables of its own.")
    return parts


def add_shares(frame: pd.DataFrame, cells: Mapping[str, StoredCell], metric: str) -> None:
    """Add `share` to the rows of one metric: whether neither its value nor that of any document is beyond -1 and 1.

    The mean of numbers from 0 to 100 may be at most 1. Documents are read where a result does not show that each is 0 or 1.
    """
    found = []
    for key, value, stderr, n in scores_of(frame):
        share = -1 <= value <= 1
        if share and key in cells and not right_or_wrong(value, stderr, n):
            share = _within_one(cells[key], metric)
        found.append(share)
    frame["share"] = found


def _within_one(stored: StoredCell, metric: str) -> bool:
    """Whether the metric is at most 1 in each document of a cell, as far as documents have it."""
    column = f"metric/{metric}"
    try:
        documents = documents_of(stored)
    except UserError:
        return True  # whoever needs the documents reports that they cannot be read
    return column not in documents or bool((documents[column].dropna().abs() <= 1).all())


def _tasks(rows: pd.DataFrame) -> str:
    return ", ".join(sorted(map(str, rows["task"].unique())))
