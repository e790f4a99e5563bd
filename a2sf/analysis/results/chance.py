"""Chance level: the accuracy of random choice, which a result has to be compared with."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pandas as pd

from a2sf.analysis.results.grid import AVERAGE, Grid
from a2sf.analysis.statistics.paired import is_binary
from a2sf.errors import UserError

OF_CHOICES = ("acc", "acc_norm", "acc_mutual_info")
"""Metrics that score the choice of one of several answers."""


def chance_levels(grid: Grid) -> dict[str, float]:
    """Task -> the expected metric of random choice, in the metric's unit: the mean of right choices / choices.

    `average` is the mean over the tasks of a grid with one model and number of shots, where all are known. Tasks without
    choices or per-document files are missing, and so are those whose metric does not say whether the choice is right.
    """
    levels: dict[str, float] = {}
    sizes: dict[str, int] = {}
    if grid.metric not in OF_CHOICES:
        return levels
    for stored in grid.cells_shown:
        task = str(stored.cell["task"])
        if task in levels:
            continue
        try:
            documents = stored.documents
        except UserError:
            continue  # whoever needs the documents reports that they cannot be read
        if (shares := _right_shares(documents, grid.metric)) is not None:
            levels[task], sizes[task] = fmean(shares), len(shares)
    if len(grid.tasks) > 1 and set(grid.tasks) <= set(levels):
        weights = [sizes[t] for t in grid.tasks] if grid.by_documents else None
        levels[AVERAGE] = fmean((levels[t] for t in grid.tasks), weights)
    return levels


def _right_shares(documents: pd.DataFrame, metric: str) -> list[float] | None:
    """Of each document the share of its choices that count as right; None: not known.

    A metric of a task's own code may be another number by the name of `acc`, as truthfulqa_mc2's probability of all true
    choices; and results of earlier versions do not say which choices are right where several are.
    """
    counts = [len(choices) for choices in documents["choices"]]
    if not counts or min(counts) < 2:
        return None
    golds = documents["golds"] if "golds" in documents else ([g] for g in documents["gold"])
    right = [{g for g in of if g >= 0} for of in golds]
    if not any(right):
        return None
    if (column := f"metric/{metric}") in documents:
        values = documents[column].to_numpy(float)
        hits = [p in of for p, of in zip(documents["prediction"], right, strict=True)]
        if not is_binary(values) or (metric == OF_CHOICES[0] and not np.array_equal(values, hits)):
            return None
    return [len(of) / n for of, n in zip(right, counts, strict=True)]
