"""Our standard errors and intervals of scores, beside lm-eval's standard error: columns `stderr`, `low` and `high`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from a2sf.analysis.results.chance import OF_CHOICES
from a2sf.analysis.results.documents import TEXT, documents_of, may_share, texts_of
from a2sf.analysis.results.grid import SYSTEM
from a2sf.analysis.statistics.intervals import Estimate, averaged, of_documents, of_mean, of_share, right_or_wrong
from a2sf.errors import UserError
from a2sf.store.aggregates import LM_EVAL_STDERR, TaskGroup
from a2sf.store.runs import StoredCell

ESTIMATED = ("stderr", "low", "high")


def add_intervals(frame: pd.DataFrame, cells: Mapping[str, StoredCell], metric: str) -> None:
    """Add `ESTIMATED` to the rows of one metric.

    Documents are read where they may share texts. Elsewhere lm-eval's numbers say all that is needed.
    """
    found = []
    for key, value, stderr, n in scores_of(frame):
        estimate = _by_text(cells[key], metric, value) if key in cells and may_share(cells[key]) else None
        unknown = math.isnan(stderr) and metric in OF_CHOICES  # published numbers
        if estimate is None and (unknown or right_or_wrong(value, stderr, n)):
            estimate = of_share(value, n)
        found.append(estimate or of_mean(value, stderr, n))
    for name in ESTIMATED:
        frame[name] = [getattr(e, name) for e in found]


def scores_of(frame: pd.DataFrame) -> Iterator[tuple[str, float, float, int]]:
    """Key of the cell, value, lm-eval's standard error and n of each row."""
    for row in frame[["key", "value", LM_EVAL_STDERR, "n"]].itertuples(index=False):
        yield str(row[0]), float(row[1]), float(row[2]), int(row[3])


def add_group_intervals(scores: pd.DataFrame, frame: pd.DataFrame, groups: Sequence[TaskGroup], metric: str) -> None:
    """The same for the scores of groups, from their tasks' (`frame`, which has `ESTIMATED`)."""
    place = ["model", *SYSTEM]
    by_system: dict[tuple[Any, ...], dict[tuple[str, int], Any]] = {}
    for row in frame.itertuples():
        tasks = by_system.setdefault(tuple(getattr(row, k) for k in place), {})
        tasks[str(row.task), int(float(str(row.shots)))] = row
    members = {(g.name, g.shots): g for g in groups}
    found = []
    for score in scores.itertuples():
        tasks = by_system[tuple(getattr(score, k) for k in place)]
        group = members[str(score.task), int(float(str(score.shots)))]
        rows = [tasks[m.task, m.shots] for m in group.members if (m.task, m.shots) in tasks]
        weights = [r.n for r in rows] if group.weighted(metric) else None
        found.append(averaged([estimate_of(r) for r in rows], weights))
    for name in ESTIMATED:
        scores[name] = [getattr(e, name) for e in found]


def estimate_of(row: Any) -> Estimate:
    """The estimate in a row of a frame that has `ESTIMATED`."""
    return Estimate(float(row.value), *(float(getattr(row, name)) for name in ESTIMATED))


def _by_text(stored: StoredCell, metric: str, value: float) -> Estimate | None:
    """Of a cell whose documents share texts; None: they share none, or are not known, or have other values."""
    try:
        documents = documents_of(stored)
        column = f"metric/{metric}"
        if TEXT not in documents or column not in documents:
            return None
        texts, values = texts_of(documents), documents[column].to_numpy(float)
    except (UserError, ValueError):
        return None  # whoever needs the documents reports that they cannot be read
    if not texts.shared or np.isnan(values).any() or not math.isclose(values.mean(), value, abs_tol=1e-9):
        return None
    return of_documents(values, texts)
