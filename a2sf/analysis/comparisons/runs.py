"""Paired comparisons of finished runs, whichever harness made them: each run against the first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from a2sf.analysis.comparisons.pairs import joined
from a2sf.analysis.results.documents import texts_sentence
from a2sf.analysis.results.grid import AVERAGE, BY_DOCUMENTS
from a2sf.analysis.runs.run import Document, Run, TaskRun, means, pair, variance_of_drawn_difference, variance_of_draws
from a2sf.analysis.statistics.equivalence import Within, average_within_margin, verdict, within_margin
from a2sf.analysis.statistics.families import HOLM, Adjusted, Correction
from a2sf.analysis.statistics.paired import Difference, average_difference, paired_difference
from a2sf.analysis.statistics.texts import TextClusters
from a2sf.errors import UserError, nearest

USUAL = ("acc", "exact_match", "choice", "match", "pass@1")
"""Metrics that are compared where no other is named, the first that both runs have."""


@dataclass(frozen=True)
class RunComparison:
    """A run against the first one, on a task or the average over tasks.

    Attributes:
        task, run: names.
        reference, value: means of the first run and of this one, on the documents that both have.
        difference: this run minus the first.
        within: tests of the difference against a margin; None: no margin was given.
        model: of this run; None: it is not known.
        adjusted, equivalent: the p-values of the difference, and of its equivalence, after correction; None until corrected.
        draws: share of the squared standard error of this run's mean that comes from drawing answers at random; None: each
            document has one answer.
        draws_of_difference: the same of the difference: the rest comes from the choice of documents.
    """

    task: str
    run: str
    reference: float
    value: float
    difference: Difference
    within: Within | None = None
    model: str | None = None
    adjusted: Adjusted | None = None
    equivalent: Adjusted | None = None
    draws: float | None = None
    draws_of_difference: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the difference is shown to lie within the margin: `yes`, `no` (shown to lie outside) or `not shown`."""
        if self.within is None or self.equivalent is None:
            return ""
        return verdict(self.equivalent.p, self.difference, self.within.margin)


@dataclass
class ComparedRuns:
    """All comparisons with the first run.

    Attributes:
        metrics: by task, the metric of the first and of the other runs.
        correction: how p-values are corrected.
        notes: what could not be compared, and how documents were matched.
    """

    reference: str
    rows: list[RunComparison] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    correction: Correction = HOLM
    percent: bool = True


def compare_runs(
    runs: Sequence[Run],
    metric: str | None = None,
    margin: float | None = None,
    by_documents: bool = False,
    correction: Correction = HOLM,
) -> ComparedRuns:
    """Compare each run with the first, task by task and on the average over tasks.

    Args:
        metric: its name in both harnesses; None: the usual one.
        margin: for tests of equivalence, in the metric's own unit.
        by_documents: the average counts each document once, and not each task.
        correction: of the p-values; all rows are one table.

    Raises:
        UserError: if nothing can be compared.
    """
    reference, *others = runs
    made = ComparedRuns(reference.label, correction=correction, notes=[note for run in runs for note in run.notes])
    shares: dict[str, bool] = {}
    shared: dict[str, TextClusters] = {}
    for run in others:
        changes, texts, levels = [], [], []
        for a, b in _tasks(reference, run, made):
            try:
                names = metrics_of(a, b, metric)
                row, change, of_texts, share = _compared(a, b, names, run.label, margin, made)
            except UserError as error:
                made.notes.append(f"{run.label}: {error}")
                continue
            made.metrics[a.task] = " / ".join(dict.fromkeys(names))
            made.rows.append(replace(row, model=run.model))
            changes.append(change)
            texts.append(of_texts)
            levels.append((row.reference, row.value))
            shares[a.task] = shares.get(a.task, True) and share
            shared |= {a.task: of_texts} if of_texts.shared else {}
        if len(changes) > 1 and not one_unit(shares, made.notes):
            continue
        if len(changes) > 1:
            sizes = [len(c) for c in changes] if by_documents else None
            first, value = (float(np.average(x, weights=sizes)) for x in zip(*levels, strict=True))
            if by_documents:
                changes, texts = joined(changes, texts)
            within = None if margin is None else average_within_margin(changes, texts, margin)
            difference = average_difference(changes, texts)
            made.rows.append(RunComparison(AVERAGE, run.label, first, value, difference, within, model=run.model))
    if not made.rows:
        raise UserError(" ".join(["Nothing can be compared.", *made.notes]))
    made.percent = all(shares.values())
    if shared:
        made.notes.append(texts_sentence({task: (len(t.of), t.number) for task, t in shared.items()}))
    if by_documents and any(r.task == AVERAGE for r in made.rows):
        made.notes.append(BY_DOCUMENTS)
    made.rows = _corrected(made.rows, correction)
    return made


def one_unit(shares: Mapping[str, bool], notes: list[str]) -> bool:
    """Whether the metrics of tasks can be averaged: all are shares (from 0 to 1), or none is; else a note says so.

    Args:
        shares: task -> whether its metric is a share.
    """
    if len(set(shares.values())) < 2:
        return True
    note = (
        f"No average over tasks: the metric is a share in {', '.join(t for t, s in shares.items() if s)}, and not in "
    )
    note += f"{', '.join(t for t, s in shares.items() if not s)}."
    notes += [] if note in notes else [note]
    return False


def _tasks(a: Run, b: Run, made: ComparedRuns) -> list[tuple[TaskRun, TaskRun]]:
    """The tasks of two runs that are compared: of equal names, or the only one of each."""
    common = [t for t in a.tasks if t in b.tasks]
    if not common and len(a.tasks) == len(b.tasks) == 1:
        (first,), (second,) = a.tasks.values(), b.tasks.values()
        if first.task != second.task:
            made.notes.append(f"{b.label}: its task {second.task} is compared with {first.task} of {a.label}.")
        return [(first, second)]
    for run, other in ((a, b), (b, a)):
        if left := [t for t in run.tasks if t not in other.tasks]:
            made.notes.append(f"Not compared: {', '.join(left)} of {run.label}, which {other.label} does not have.")
    return [(a.tasks[t], b.tasks[t]) for t in common]


def metrics_of(a: TaskRun, b: TaskRun, requested: str | None) -> tuple[str, str]:
    """The metric of a task that is compared, in each of two runs.

    It is the requested one, else a usual one that both have, else the only one that both have, else the usual one of each.

    Raises:
        UserError: if a document lacks it, or none is usual.
    """
    both = [m for m in a.counted if m in b.counted]
    name = requested or _usual(both) or (both[0] if len(both) == 1 else None)
    names = (_metric_of(a), _metric_of(b)) if name is None else (name, name)
    for run, metric in zip((a, b), names, strict=True):
        some, n = run.counted[metric], len(run.documents)
        if some == 0 or n == 0:
            known = ", ".join(run.metrics) or "none"
            near = nearest(metric, run.metrics)
            raise UserError(f"{run.task} has no metric {metric} for each document; it has {known}{near}.")
        if some < n:
            raise UserError(
                f"{run.task}: {metric} is a number in {some} of {n} documents only; correct this, or choose another metric "
                "with --metric."
            )
    return names


def _metric_of(run: TaskRun) -> str:
    known = [*run.counted]
    if not known:
        raise UserError(
            f"{run.task} has {len(run.documents)} documents, and none has a metric that is a number and of which the score "
            "is the mean."
        )
    if (name := _usual(known) or (known[0] if len(known) == 1 else None)) is None:
        raise UserError(f"{run.task} has the metrics {', '.join(known)}; choose one with --metric.")
    return name


def _usual(metrics: Sequence[str]) -> str | None:
    """The first usual metric, also where a filter follows its name."""
    return next(iter([m for m in USUAL if m in metrics] or [m for m in metrics if m.partition(",")[0] in USUAL]), None)


def _compared(
    a: TaskRun, b: TaskRun, names: tuple[str, str], label: str, margin: float | None, made: ComparedRuns
) -> tuple[RunComparison, np.ndarray, TextClusters, bool]:
    found = pair(a, b)
    for name in sorted(a.settings.keys() & b.settings.keys()):
        first, second = a.settings[name], b.settings[name]
        if first != second:
            made.notes.append(f"{label}, {a.task}: different {name}: {first} in {made.reference}, {second} in {label}.")
    if found.only_first or found.only_second:
        made.notes.append(
            f"{label}, {a.task}: {len(found.first)} documents are compared, matched by {found.by}; without a partner are "
            f"{found.only_first} of {made.reference} and {found.only_second} of {label}."
        )
    elif found.by == "text":
        made.notes.append(f"{label}, {a.task}: documents are matched by their text.")
    first, second = means(found.first, names[0]), means(found.second, names[1])
    texts = texts_of_runs(found.first, found.second)
    draws = variance_of_draws(found.second, names[1])
    of_difference = variance_of_drawn_difference(found.first, found.second, names)
    row = RunComparison(
        a.task,
        label,
        float(first.mean()),
        float(second.mean()),
        paired_difference(second, first, texts),
        None if margin is None else within_margin(second, first, margin, texts),
        draws=_share(draws, second),
        draws_of_difference=_share(of_difference, second - first),
    )
    return row, second - first, texts, is_share(first, second)


def _share(draws: float | None, values: np.ndarray) -> float | None:
    """A part of the squared standard error of a mean as a share of it."""
    spread = values.var(ddof=1) / len(values) if len(values) > 1 else math.nan
    return None if draws is None or not spread > 0 else min(1.0, draws / spread)


def texts_of_runs(first: Sequence[Document], second: Sequence[Document]) -> TextClusters:
    """Which documents share a text (or another cluster), as either run says."""
    return TextClusters.keyed(keys) if (keys := clusters_of(first, second)) else TextClusters.independent(len(first))


def clusters_of(first: Sequence[Document], second: Sequence[Document]) -> list[str] | None:
    """What each of some paired documents shares with others, as the run says that knows it of more; None: nothing is known.

    A document of which it is not known shares nothing.
    """
    known = max(first, second, key=lambda documents: sum(d.cluster is not None for d in documents))
    if all(d.cluster is None for d in known):
        return None
    return [f"of {d.cluster}" if d.cluster is not None else f"alone {d.key}" for d in known]


def is_share(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether all values of two runs are from 0 to 1."""
    return bool(((first >= 0) & (first <= 1) & (second >= 0) & (second <= 1)).all())


def _corrected(rows: Sequence[RunComparison], correction: Correction) -> list[RunComparison]:
    """The same with corrected p-values; differences and equivalence are families of their own."""
    by_model = correction.family == "model"  # all rows are one table, also those of several models
    places = [((r.model or "") if by_model else "", "") for r in rows]
    adjusted = correction.adjusted([r.difference.p for r in rows], places)
    equivalent = correction.adjusted([None if r.within is None else r.within.p_equivalent for r in rows], places)
    return [replace(r, adjusted=a, equivalent=e) for r, a, e in zip(rows, adjusted, equivalent, strict=True)]


def with_labels(runs: Sequence[Run], given: Sequence[str] | None, distinct: bool = True) -> list[Run]:
    """Runs with the labels that the user gives, else with their own, to which their source is added where two are equal.

    Args:
        distinct: whether the source is added.

    Raises:
        UserError: if there are not as many labels as runs.
    """
    if given is not None:
        if len(given) != len(runs):
            raise UserError(
                f"--labels gives {len(given)} names for {len(runs)} runs: {', '.join(r.label for r in runs)}."
            )
        return [replace(r, label=name) for r, name in zip(runs, given, strict=True)]
    if not distinct:
        return list(runs)
    counted: Mapping[str, int] = {r.label: sum(x.label == r.label for x in runs) for r in runs}
    return [r if counted[r.label] == 1 else replace(r, label=f"{r.label} ({r.source})") for r in runs]
