"""What the values of a metric mean in each task: whether a higher one is better, and whether they are shares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

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
    share = frame["value"].between(-1, 1).groupby(frame["task"]).transform("all") & higher
    kinds = list(dict.fromkeys(zip(higher, share, strict=True)))  # the first row's first
    parts = [frame[(higher == better) & (share == shares)] for better, shares in kinds]
    for (better, shares), rows in zip(kinds[1:], parts[1:], strict=True):
        if better != kinds[0][0]:
            why = f"a {'higher' if better else 'lower'} {metric} is better"
        else:
            why = f"{metric} is {'at most 1' if shares else 'more than 1 in some results'}"
        notes.append(f"{_tasks(rows)}: {why}, other than in {_tasks(parts[0])}, so it has tables of its own.")
    return parts


def _tasks(rows: pd.DataFrame) -> str:
    return ", ".join(sorted(map(str, rows["task"].unique())))
