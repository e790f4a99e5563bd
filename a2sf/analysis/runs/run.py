"""A finished run of any harness: for each task, what it scored on each document."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from a2sf.errors import UserError

LEAST_TEXT, MOST_TEXT = 15, 20_000
"""Characters of a text that documents can be matched by: the least, and how many are compared."""


@dataclass
class Document:
    """One document of a task, and what it scored.

    Attributes:
        hash: lm-eval's `doc_hash`; None where the harness has none.
        id: inspect_ai's sample id; None where the harness has none.
        texts: its texts (prompt, question), normalised: what documents of two harnesses are matched by.
        cluster: what it shares with other documents, such as a passage; None: nothing.
        values: metric -> one value for each sampled answer (epoch).
    """

    hash: str | None = None
    id: str | None = None
    texts: frozenset[str] = frozenset()
    cluster: str | None = None
    values: dict[str, list[float]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What identifies it in the runs of all models."""
        return self.hash or self.id or " ".join(sorted(self.texts))


@dataclass(frozen=True)
class TaskRun:
    """The documents of one task in one run.

    Attributes:
        settings: of the task, by what they are called in a sentence (shots, task version); without what is not known.
    """

    task: str
    documents: tuple[Document, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """Metrics that every document has, in their first order."""
        return [m for m, n in self.counted.items() if n == len(self.documents)]

    @property
    def counted(self) -> Counter[str]:
        """Metric -> how many documents have a number of it."""
        return Counter(m for d in self.documents for m, v in d.values.items() if v)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        label: its name in tables.
        source: where it was read.
        tasks: by name.
        model: None where it is not known.
        system: what was run with the model (policy, budget, …), the same in every model.
        notes: what is to be said of how it was read, one sentence each.
    """

    label: str
    source: str
    tasks: Mapping[str, TaskRun]
    model: str | None = None
    system: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Paired:
    """Documents that two runs have in common, in one order.

    Attributes:
        by: what they were matched by: `doc_hash`, `sample id` or `text`.
        only_first, only_second: how many documents have no partner.
    """

    first: tuple[Document, ...]
    second: tuple[Document, ...]
    by: str
    only_first: int
    only_second: int


def normalised(text: str) -> str:
    """A text for matching: without differences in white space and case."""
    return re.sub(r"\s+", " ", text[:MOST_TEXT]).strip().casefold()


def texts_to_match(values: Iterable[Any]) -> frozenset[str]:
    """The normalised texts among some values; short ones are left out, since answers and labels are in many documents."""
    made = (normalised(v) for v in values if isinstance(v, str))
    return frozenset(t for t in made if len(t) >= LEAST_TEXT)


def number_of(value: Any) -> float | None:
    """A value of a metric; None if it is not a number, or NaN."""
    return float(value) if isinstance(value, bool | int | float) and value == value else None


def field_of(document: Any, name: str | None) -> str | None:
    """The field of a document that dependent documents share, as a key; None if it has none."""
    found = document.get(name) if name is not None and isinstance(document, Mapping) else None
    return None if found is None else json.dumps(found, sort_keys=True, default=str)


def pair(a: TaskRun, b: TaskRun) -> Paired:
    """Match the documents of a task in two runs: by hash if both have one, else by sample id, else by a common text.

    A key that several documents of a run have is matched in the order in which they come. Sample ids are often just numbers,
    so they count only if the documents with equal ids have a text in common.

    Raises:
        UserError: if no document has a partner.
    """
    for by, key in (("doc_hash", "hash"), ("sample id", "id")):
        if all(getattr(d, key) is not None for d in (*a.documents, *b.documents)):
            found = _matched(a, b, [getattr(d, key) for d in a.documents], [getattr(d, key) for d in b.documents])
            if found and (key == "hash" or _same_questions(a, b, found)):
                return _paired(a, b, found, by)
    found = _by_text(a, b)
    if not found:
        raise UserError(f"{a.task}: no document of one run is in the other, by hash, sample id or text.")
    return _paired(a, b, found, "text")


def _same_questions(a: TaskRun, b: TaskRun, found: Sequence[tuple[int, int]]) -> bool:
    """Whether matched documents have a text in common; where none has a text, whether the tasks have one name."""
    texts = [(a.documents[i].texts, b.documents[j].texts) for i, j in found]
    known = [bool(one & other) for one, other in texts if one and other]
    return all(known) if known else a.task == b.task


def _matched(a: TaskRun, b: TaskRun, keys_a: list[str], keys_b: list[str]) -> list[tuple[int, int]]:
    places: dict[str, list[int]] = {}
    for i, key in enumerate(keys_b):
        places.setdefault(key, []).append(i)
    return [(i, places[key].pop(0)) for i, key in enumerate(keys_a) if places.get(key)]


def _by_text(a: TaskRun, b: TaskRun) -> list[tuple[int, int]]:
    """Pairs of documents with a text in common that no other document of either run has."""
    counted = [Counter(t for d in run.documents for t in d.texts) for run in (a, b)]
    place = {t: i for i, d in enumerate(b.documents) for t in d.texts if counted[1][t] == 1}
    found: list[tuple[int, int]] = []
    used: set[int] = set()
    for i, d in enumerate(a.documents):
        partners = {place[t] for t in d.texts if counted[0][t] == 1 and t in place}
        if len(partners) == 1 and not partners & used:
            found.append((i, *partners))  # type: ignore[arg-type]
            used |= partners
    return found


def _paired(a: TaskRun, b: TaskRun, found: list[tuple[int, int]], by: str) -> Paired:
    return Paired(
        tuple(a.documents[i] for i, _ in found),
        tuple(b.documents[j] for _, j in found),
        by,
        len(a.documents) - len(found),
        len(b.documents) - len(found),
    )


def means(documents: Iterable[Document], metric: str) -> np.ndarray:
    """float [n]: the metric of each document, the mean over its sampled answers."""
    return np.array([np.mean(d.values[metric]) for d in documents])


def variance_of_draws(documents: Iterable[Document], metric: str) -> float | None:
    """The variance of the mean over documents that comes from drawing answers at random; None for single answers.

    With k answers for a document it is the sum over documents of (variance of the answers) / k, divided by n².
    """
    values = [np.array(d.values[metric]) for d in documents]
    if not values or max(len(v) for v in values) < 2:
        return None
    within = [v.var(ddof=1) / len(v) for v in values if len(v) > 1]
    return float(np.mean(within) / len(values)) if within else None


def variance_of_drawn_difference(
    first: Sequence[Document], second: Sequence[Document], metrics: Sequence[str]
) -> float | None:
    """The variance of a mean difference over documents that comes from drawing answers; None for single answers.

    Where both have as many answers of a document, answer j of one is paired with answer j of the other: systems that were
    compared here draw them with the same random numbers. Else the two are drawn independently, and their variances add up.

    Args:
        metrics: of the first and of the second run.
    """
    parts = []
    for a, b in zip(first, second, strict=True):
        x, y = np.array(a.values[metrics[0]]), np.array(b.values[metrics[1]])
        if max(len(x), len(y)) < 2:
            return None
        if len(x) == len(y):
            parts.append((y - x).var(ddof=1) / len(x))
        else:
            parts.append(sum(v.var(ddof=1) / len(v) for v in (x, y) if len(v) > 1))
    return float(np.mean(parts) / len(parts)) if parts else None
