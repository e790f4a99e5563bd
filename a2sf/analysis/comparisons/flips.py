"""Documents whose answer flipped between two policies: what a difference in accuracy is made of."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pandas as pd

from a2sf.analysis.comparisons.pairs import matched
from a2sf.analysis.results.documents import paired_documents
from a2sf.analysis.results.grid import DEFAULT_PAIR, Grid, System
from a2sf.analysis.statistics.paired import is_binary
from a2sf.errors import UserError
from a2sf.store.runs import StoredCell


@dataclass(frozen=True)
class Flip:
    """A document that one of two systems got right and the other did not.

    Attributes:
        context: the prompt's end.
        choices: none where the answer is written.
        first, second: labels; `*_prediction` indexes `choices`, `*_logs` are their log-likelihoods, `*_text` is what was
            written, None where texts were not stored.
        target: the right answer where it is written.
        gained: whether the first system is the right one.
        size: how far the right choice's lead moved, in nats; 0 without choices.
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
    target: str | None = None
    first_text: str | None = None
    second_text: str | None = None


def flipped(a: StoredCell, b: StoredCell, metric: str = "acc", common: bool = False) -> pd.DataFrame:
    """Documents that are right in one cell and wrong in the other by a metric, as the paired test counts them.

    Returns:
        The largest moves first: columns of the per-document file, with suffixes `_a` and `_b`, and `gained`, `size` as in
        `Flip`. None where the metric is more than right or wrong.
    """
    left, right = paired_documents(a, b, common)
    both = left.add_suffix("_a").join(right.add_suffix("_b"))
    values = [both.get(f"metric/{metric}{end}", pd.Series(np.nan, both.index)).to_numpy(float) for end in ("_a", "_b")]
    both_binary = all(is_binary(v) for v in values)
    both["gained"] = values[0] > values[1]
    both = both[both_binary & (values[0] != values[1])].copy()
    both["size"] = [
        abs(_lead(r["loglikelihoods_a"], r["gold_a"]) - _lead(r["loglikelihoods_b"], r["gold_a"]))
        if r["gold_a"] >= 0
        else 0.0
        for r in both.to_dict("records")
    ]
    return both.sort_values("size", ascending=False, kind="stable")


def flips(grid: Grid, pair: tuple[str, str] = DEFAULT_PAIR, limit: int = 60) -> tuple[list[Flip], int]:
    """The documents that flipped between the pair, the largest moves of each comparison.

    Returns:
        At most `limit` of them, and how many there are.
    """
    found: list[tuple[str, System, System, pd.DataFrame]] = []
    for _, _, part in grid.by_model():
        for a, b in matched(part, pair):
            for task in sorted(set(a.keys) & set(b.keys)) if b else ():
                assert b is not None
                try:
                    cells = part.cells[a.keys[task]], part.cells[b.keys[task]]
                    found.append((task, a, b, flipped(*cells, part.metric, common=part.mixed)))
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
            target=row.get("target_a"),
            first_text=row.get("generated_a"),
            second_text=row.get("generated_b"),
        )
        for task, a, b, frame in found
        for row in frame.head(each).to_dict("records")
    ]
    return chosen[:limit], sum(len(frame) for *_, frame in found)


def are_counted(grid: Grid) -> bool:
    """Whether the documents of some task are right or wrong by the grid's metric, so that flips can be counted."""
    column = f"metric/{grid.metric}"
    binary: dict[str, bool] = {}
    for stored in grid.cells_shown:
        with suppress(UserError):
            there = column in stored.documents and is_binary(stored.documents[column].to_numpy(float))
            task = str(stored.cell["task"])
            binary[task] = there and binary.get(task, True)
    return any(binary.values())


def _lead(logs: np.ndarray, gold: int) -> float:
    """The right choice's log-likelihood minus the best wrong one's."""
    return float(logs[gold] - max((v for i, v in enumerate(logs) if i != gold), default=0.0))
