"""Whether a higher value of a metric is better: what a task says of it, and what is taken where it says nothing."""

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


def by_direction(frame: pd.DataFrame, metric: str, notes: list[str]) -> list[pd.DataFrame]:
    """The rows of one metric, apart where a higher value is better in some tasks and a lower one in others.

    Args:
        notes: what is to be said of it is added.
    """
    higher = frame["higher_is_better"].astype(bool)
    for better, word in ((True, "higher"), (False, "lower")):
        rows = frame[higher == better]
        if unknown := sorted(map(str, rows.loc[~rows["direction_known"].astype(bool), "task"].unique())):
            notes.append(
                f"{', '.join(unknown)}: nothing says whether a higher or a lower {metric} is better; {word} is taken as "
                "better (higher_is_better in the metric_list of the task's file says it)."
            )
    first = bool(higher.iloc[0])
    parts = [frame[higher == better] for better in (first, not first)]
    if len(parts[1]):
        tasks = ", ".join(sorted(map(str, parts[1]["task"].unique())))
        notes.append(f"{tasks}: a {'lower' if first else 'higher'} {metric} is better, so it has tables of its own.")
    return [rows for rows in parts if len(rows)]
