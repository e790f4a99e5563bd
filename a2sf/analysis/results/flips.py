"""On how many documents two systems differ, one right and the other wrong, from results on disk."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from a2sf.analysis.results.documents import documents_of, texts_of
from a2sf.analysis.statistics.paired import is_binary
from a2sf.analysis.statistics.texts import TextClusters
from a2sf.errors import UserError
from a2sf.store.runs import StoredCell

METRICS = ("acc", "exact_match")
"""Metrics that say whether a document is right, the first that a cell has; `metric,filter` counts as well."""
MOST_PAIRS = 60
"""Pairs of systems from which the effective number of documents is estimated, where documents share texts."""


@dataclass(frozen=True)
class Flips:
    """How often two systems at the same budget differ; the full cache is one of the systems of every budget.

    Attributes:
        share: of the documents, mean over all pairs of systems; None: no answer is right or wrong.
        effective: number of independent documents, as a share of their number; below 1 where documents share texts.
        pairs: of systems, behind the mean.
    """

    share: float | None
    effective: float = 1.0
    pairs: int = 0


def flips_of(cells: Iterable[StoredCell]) -> dict[str, Flips]:
    """Task -> how often two systems differed, mean over models, shots and budgets."""
    by_task: dict[str, list[StoredCell]] = {}
    for stored in cells:
        if stored.stopped is None and stored.cell.get("policy_causal", True):
            by_task.setdefault(str(stored.cell["task"]), []).append(stored)
    found = {}
    for task, of_task in by_task.items():
        sets = list(_same_documents(of_task))
        measured = [m for answers, texts in sets if (m := _measured(answers, texts)) is not None]
        pairs = sum(m.pairs for m in measured)
        if pairs:
            weights = [m.pairs / pairs for m in measured]
            share = sum(w * (m.share or 0.0) for w, m in zip(weights, measured, strict=True))
            found[task] = Flips(share, sum(w * m.effective for w, m in zip(weights, measured, strict=True)), pairs)
        elif not sets and all(_right(c) is None for c in of_task):
            found[task] = Flips(None)
    return found


def _same_documents(cells: Sequence[StoredCell]) -> Iterable[tuple[np.ndarray, TextClusters]]:
    """Right or wrong of the systems with the same model, shots, documents and budget, [systems, n]."""
    parts: dict[str, list[StoredCell]] = {}
    for stored in cells:
        cell = stored.cell
        where = [cell["model"], cell["shots"], cell.get("dtype"), cell.get("options"), stored.result["documents"]]
        parts.setdefault(json.dumps(where, sort_keys=True, default=str), []).append(stored)
    for part in parts.values():
        budgets: dict[str, list[StoredCell]] = {}
        full = [c for c in part if c.cell["policy"] == "full"][:1]
        for stored in part:
            if stored.cell["policy"] != "full":
                place = [stored.cell["budget"], stored.cell.get("schedule")]
                budgets.setdefault(json.dumps(place, sort_keys=True), []).append(stored)
        for systems in budgets.values():
            known = [(c, r) for c in [*full, *systems] if (r := _right(c)) is not None]
            known = [(c, r) for c, r in known if len(r) == len(known[0][1])]
            if len(known) > 1:
                yield np.array([r for _, r in known]), texts_of(documents_of(known[0][0]))


def _right(stored: StoredCell) -> np.ndarray | None:
    """[n] 1 where a document is right, in the order of documents; None: not known."""
    with suppress(UserError):  # the file cannot be read
        documents = stored.documents
        columns = [str(c).removeprefix("metric/") for c in documents if str(c).startswith("metric/")]
        for name in METRICS:
            for column in columns:
                if column.partition(",")[0] == name:
                    values = documents[f"metric/{column}"].to_numpy(float)
                    return values if is_binary(values) else None
    return None


def _measured(answers: np.ndarray, texts: TextClusters) -> Flips | None:
    systems, n = answers.shape
    pairs = systems * (systems - 1) // 2
    right = answers.sum(axis=0)
    share = float((right * (systems - right)).sum()) / (pairs * n)  # pairs of which one is right
    if not texts.shared:
        return Flips(share, 1.0, pairs)
    chosen: list[Any] = list(itertools.combinations(range(systems), 2))
    chosen = chosen[:: max(1, len(chosen) // MOST_PAIRS)]
    effective = np.mean([texts.effective_share(answers[i] - answers[j]) for i, j in chosen])
    return Flips(share, float(effective), pairs)
