"""Paired comparisons of finished runs, whichever harness made them: each run against the first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from a2sf.analysis.comparisons.pairs import joined
from a2sf.analysis.results.grid import AVERAGE, BY_DOCUMENTS
from a2sf.analysis.runs.run import Document, Run, TaskRun, means, pair, variance_of_drawn_difference, variance_of_draws
from a2sf.analysis.statistics.equivalence import Within, average_within_margin, verdict, within_margin
from a2sf.analysis.statistics.families import HOLM, Adjusted, Correction
from a2sf.analysis.statistics.paired import Difference, average_difference, paired_difference
from a2sf.analysis.statistics.texts import Texts
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
    made = ComparedRuns(reference.label, correction=correction)
    binary = True
    for run in others:
        changes, texts, levels = [], [], []
        for a, b in _tasks(reference, run, made):
            try:
                names = metric_of(a, metric), metric_of(b, metric)
                row, change, of_texts, right = _compared(a, b, names, run.label, margin, made)
            except UserError as error:
                made.notes.append(f"{run.label}: {error}")
                continue
            made.metrics[a.task] = " / ".join(dict.fromkeys(names))
            made.rows.append(replace(row, model=run.model))
            changes.append(change)
            texts.append(of_texts)
            levels.append((row.reference, row.value))
            binary = binary and right
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
    made.percent = binary
    if by_documents and any(r.task == AVERAGE for r in made.rows):
        made.notes.append(BY_DOCUMENTS)
    made.rows = _corrected(made.rows, correction)
    return made


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


def metric_of(run: TaskRun, requested: str | None) -> str:
    """The metric of a task that is compared: the requested one, else the usual one.

    Raises:
        UserError: if it is not there, or none is usual.
    """
    if requested is not None:
        if requested not in run.metrics:
            known = ", ".join(run.metrics) or "none"
            raise UserError(
                f"{run.task} has no metric {requested} for each document; it has {known}{nearest(requested, run.metrics)}."
            )
        return requested
    found = [m for m in USUAL if m in run.metrics] or [m for m in run.metrics if m.partition(",")[0] in USUAL]
    if found:
        return found[0]
    if len(run.metrics) == 1:
        return run.metrics[0]
    raise UserError(f"{run.task} has the metrics {', '.join(run.metrics) or 'none'}; choose one with --metric.")


def _compared(
    a: TaskRun, b: TaskRun, names: tuple[str, str], label: str, margin: float | None, made: ComparedRuns
) -> tuple[RunComparison, np.ndarray, Texts, bool]:
    found = pair(a, b)
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
    return row, second - first, texts, bool(((first >= 0) & (first <= 1) & (second >= 0) & (second <= 1)).all())


def _share(draws: float | None, values: np.ndarray) -> float | None:
    """A part of the squared standard error of a mean as a share of it."""
    spread = values.var(ddof=1) / len(values) if len(values) > 1 else math.nan
    return None if draws is None or not spread > 0 else min(1.0, draws / spread)


def texts_of_runs(first: Sequence[Document], second: Sequence[Document]) -> Texts:
    """Which documents share a text (or another cluster), as either run says."""
    for documents in (first, second):
        if all(d.cluster is not None for d in documents):
            return Texts.keyed([str(d.cluster) for d in documents])
    return Texts.independent(len(first))


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
