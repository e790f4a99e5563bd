"""Chance level: the accuracy of random choice, which a result has to be compared with."""

from __future__ import annotations

from statistics import fmean

from a2sf.analysis.results.grid import AVERAGE, Grid
from a2sf.errors import UserError

OF_CHOICES = ("acc", "acc_norm", "acc_mutual_info")
"""Metrics that score the choice of one of several answers."""


def chance_levels(grid: Grid) -> dict[str, float]:
    """Task -> the expected metric of random choice, in the metric's unit: the mean of 1 / choices over its documents.

    `average` is the mean over the tasks of a grid with one model and number of shots, where all are known. Tasks without
    choices, or without per-document files, are missing.
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
        numbers = [len(choices) for choices in documents["choices"]]
        if numbers and min(numbers) > 1:
            levels[task], sizes[task] = fmean(1 / n for n in numbers), len(numbers)
    if len(grid.tasks) > 1 and set(grid.tasks) <= set(levels):
        weights = [sizes[t] for t in grid.tasks] if grid.by_documents else None
        levels[AVERAGE] = fmean((levels[t] for t in grid.tasks), weights)
    return levels
