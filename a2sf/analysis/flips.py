"""Documents whose answer flipped between two policies: what a difference in accuracy is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from a2sf.analysis.collect import DEFAULT_PAIR, Grid, System
from a2sf.analysis.compare import matched, paired_documents
from a2sf.errors import UserError
from a2sf.experiments.runs import StoredCell


@dataclass(frozen=True)
class Flip:
    """A document that one of two systems got right and the other did not.

    Attributes:
        context: the prompt's end.
        first, second: labels; `*_prediction` indexes `choices`, `*_logs` are their log-likelihoods.
        gained: whether the first system is the right one.
        size: how far the right choice's lead moved, in nats.
    """

    task: str
    budget: str
    factor: str
    doc_id: int
    context: str
    choices: list[str]
    gold: int
    first: str
    second: str
    first_prediction: int
    second_prediction: int
    first_logs: list[float]
    second_logs: list[float]
    gained: bool
    size: float


def flipped(a: StoredCell, b: StoredCell, common: bool = False) -> pd.DataFrame:
    """Documents whose chosen answer is right in one cell and wrong in the other, the largest moves first.

    Returns:
        Columns of the per-document file, with suffixes `_a` and `_b`, and `gained`, `size` as in `Flip`.
    """
    left, right = paired_documents(a, b, common)
    both = left.add_suffix("_a").join(right.add_suffix("_b"))
    hit_a, hit_b = both["prediction_a"] == both["gold_a"], both["prediction_b"] == both["gold_b"]
    both["gained"] = hit_a
    both = both[(hit_a != hit_b) & (both["gold_a"] >= 0)].copy()
    both["size"] = [
        abs(_lead(r["loglikelihoods_a"], r["gold_a"]) - _lead(r["loglikelihoods_b"], r["gold_a"]))
        for r in both.to_dict("records")
    ]
    return both.sort_values("size", ascending=False, kind="stable")


def flips(grid: Grid, pair: tuple[str, str] = DEFAULT_PAIR, limit: int = 60) -> tuple[list[Flip], int]:
    """The documents that flipped between the pair, the largest moves of each comparison.

    Returns:
        At most `limit` of them, and how many there are.
    """
    found: list[tuple[str, System, System, pd.DataFrame]] = []
    for _, _, part in grid.parts():
        for a, b in matched(part, pair):
            for task in sorted(set(a.keys) & set(b.keys)) if b else ():
                assert b is not None
                try:
                    cells = part.cells[a.keys[task]], part.cells[b.keys[task]]
                    found.append((task, a, b, flipped(*cells, common=part.mixed)))
                except (KeyError, UserError):
                    continue  # compare_pair says why
    each = max(1, limit // max(1, len(found)))
    chosen = [
        Flip(
            task=task,
            budget=a.budget,
            factor=a.factor,
            doc_id=row["doc_id_a"],
            context=row["context_a"][-400:],
            choices=list(row["choices_a"]),
            gold=row["gold_a"],
            first=a.label,
            second=b.label,
            first_prediction=row["prediction_a"],
            second_prediction=row["prediction_b"],
            first_logs=list(row["loglikelihoods_a"]),
            second_logs=list(row["loglikelihoods_b"]),
            gained=row["gained"],
            size=row["size"],
        )
        for task, a, b, frame in found
        for row in frame.head(each).to_dict("records")
    ]
    return chosen[:limit], sum(len(frame) for *_, frame in found)


def _lead(logs: np.ndarray, gold: int) -> float:
    """The right choice's log-likelihood minus the best wrong one's."""
    return float(logs[gold] - max((v for i, v in enumerate(logs) if i != gold), default=0.0))
