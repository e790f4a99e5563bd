"""The documents behind a cell's number: the same rows for two cells, and which of them share a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from a2sf.analysis.statistics.texts import TextClusters
from a2sf.errors import UserError
from a2sf.store.runs import StoredCell

DOCUMENT = ["doc_id", "doc_hash"]
TEXT = "cluster"
"""Column that is equal for documents that share a text (`a2sf.tasks.shared_texts`)."""
LONG, QUESTION = "long_", "\n\nQuestion: "
"""Tasks whose older results lack that column, and what separates their text from the question in a prompt."""


def may_share(stored: StoredCell) -> bool:
    """Whether some documents of a cell may share a text, as far as its result shows without reading its documents."""
    documents = stored.result["documents"]
    noted = documents.get("clusters")
    return str(stored.cell["task"]).startswith(LONG) if noted is None else noted < documents["n"]


def documents_of(stored: StoredCell) -> pd.DataFrame:
    """One row per document, with the column `TEXT` where it is known which of them share a text.

    Without numbers of which a metric's score is not the mean: those of a perplexity are log-likelihoods.

    Raises:
        UserError: if the per-document file cannot be read.
    """
    documents = stored.documents
    scores = {f"metric/{name}": m.get("value") for name, m in stored.metrics.items()}
    parts = [c for c, score in scores.items() if c in documents and not is_mean(documents[c].dropna(), score)]
    documents = documents.drop(columns=parts) if parts else documents
    if TEXT in documents or not str(stored.cell["task"]).startswith(LONG) or "context" not in documents:
        return documents
    parted = documents["context"].str.rpartition(QUESTION)
    return documents.assign(**{TEXT: parted[0]}) if (parted[1] == QUESTION).all() else documents


def is_mean(values: Any, score: float | None) -> bool:
    """Whether a score is the mean of some documents' numbers, or nothing says that it is not."""
    known = [float(v) for v in values]
    return score is None or not known or math.isclose(math.fsum(known) / len(known), score, rel_tol=1e-6, abs_tol=1e-9)


def paired_documents(a: StoredCell, b: StoredCell, common: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The documents of two cells, row by row the same.

    Args:
        common: keep the documents both have, instead of refusing cells whose documents differ.

    Raises:
        UserError: if the documents are not the same, or a per-document file cannot be read.
    """
    left, right = documents_of(a), documents_of(b)
    if left[DOCUMENT].equals(right[DOCUMENT]):
        return left, right
    both = left[DOCUMENT].merge(right[DOCUMENT], on=DOCUMENT, validate="1:1")
    if both.empty or (not common and not len(both) == len(left) == len(right)):
        raise UserError(
            f"{a.path.name} and {b.path.name} were not run on the same documents "
            f"({len(left)} and {len(right)}, {len(both)} in common), so they cannot be paired."
        )
    return both.merge(left, on=DOCUMENT), both.merge(right, on=DOCUMENT)


def texts_of(*documents: pd.DataFrame) -> TextClusters:
    """Which documents share a text, from the first of some equal lists of documents that has the column.

    Raises:
        UserError: if two of them have different texts, from two values of `data.cluster`.
    """
    known = [TextClusters.keyed(d[TEXT].to_numpy()) for d in documents if TEXT in d and d[TEXT].notna().all()]
    if not known:
        return TextClusters.independent(len(documents[0]))
    for other in known[1:]:
        # the same partition has as many parts as its product with the other
        pairs = pd.DataFrame({"a": known[0].of, "b": other.of}).drop_duplicates()
        if not len(pairs) == known[0].number == other.number:
            raise UserError(
                "Two results disagree on which documents share a text (data.cluster), so they cannot be paired."
            )
    return known[0]


def shared_texts(cells: Iterable[StoredCell]) -> dict[str, tuple[int, int]]:
    """Task -> its number of documents and of texts, of the tasks in which documents share a text."""
    found: dict[str, tuple[int, int]] = {}
    for stored in cells:
        task = str(stored.cell["task"])
        try:
            if task not in found and may_share(stored) and (texts := texts_of(documents_of(stored))).shared:
                found[task] = (len(texts.of), texts.number)
        except UserError:
            continue  # whoever needs the documents reports that they cannot be read
    return dict(sorted(found.items()))


def texts_note(cells: Iterable[StoredCell]) -> str:
    """The note under a table whose documents share texts; "" where none do."""
    shared = shared_texts(cells)
    return texts_sentence(shared) if shared else ""


def texts_sentence(shared: Mapping[str, tuple[int, int]]) -> str:
    """The same sentence, of a task's number of documents and of texts."""
    tasks_of: dict[tuple[int, int], list[str]] = {}
    for task, counts in shared.items():
        tasks_of.setdefault(counts, []).append(task)
    counted = "; ".join(
        f"{', '.join(tasks)}: {n} documents in {texts} text{'s' * (texts > 1)}{' each' * (len(tasks) > 1)}"
        for (n, texts), tasks in tasks_of.items()
    )
    return f"Documents share texts ({counted}): tests permute whole texts; intervals and standard errors count texts."
