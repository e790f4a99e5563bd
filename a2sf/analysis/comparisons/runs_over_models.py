"""Finished runs of several models: each system against the reference in its own model, pooled over models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from a2sf.analysis.comparisons.pairs import joined
from a2sf.analysis.comparisons.pooled import OverModels, corrected, pool_over_tasks
from a2sf.analysis.comparisons.runs import clusters_of, is_share, metrics_of, one_unit
from a2sf.analysis.results.grid import AVERAGE
from a2sf.analysis.runs.run import Run, TaskRun, means, pair
from a2sf.analysis.statistics.families import HOLM, Correction
from a2sf.analysis.statistics.paired import Difference, average_difference, paired_difference
from a2sf.analysis.statistics.pooled import Changes
from a2sf.analysis.statistics.texts import TextClusters
from a2sf.errors import UserError


def with_models(runs: Sequence[Run], models: Sequence[str]) -> list[Run]:
    """Runs with the models that the user gives; the labels are the systems.

    Raises:
        UserError: if there are not as many models as runs.
    """
    if len(models) != len(runs):
        listed = ", ".join(r.label for r in runs)
        raise UserError(f"--models gives {len(models)} names for {len(runs)} runs: {listed}.")
    return [replace(r, label=f"{r.label} {m}", model=m, system=r.label) for r, m in zip(runs, models, strict=True)]


def compare_runs_over_models(
    runs: Sequence[Run], metric: str | None = None, by_documents: bool = False, correction: Correction = HOLM
) -> tuple[list[OverModels], list[str]]:
    """Each system minus the first run's, in every model that has both, on the tasks that all of these have.

    Args:
        metric, by_documents, correction: as `compare_runs`.

    Returns:
        The comparisons, none unless at least two models have the same two systems; and one sentence for each thing that
        could not be pooled.
    """
    found: dict[str, dict[str, Run]] = {}
    notes: list[str] = []
    for run in runs:
        if run.model is None:
            return [], []
        of_model = found.setdefault(run.model, {})
        if of_model.setdefault(run.system, run) is not run:
            notes.append(f"{run.label}: there are several runs of {run.system} with {run.model}; the first is pooled.")
    reference = runs[0].system
    rows: list[OverModels] = []
    for system in dict.fromkeys(r.system for r in runs if r.system != reference):
        pairs = {m: (s[reference], s[system]) for m, s in found.items() if {reference, system} <= s.keys()}
        if len(pairs) < 2:
            continue
        try:
            rows += _rows(system, reference, pairs, metric, by_documents, notes)
        except UserError as error:
            notes.append(f"{system} is not pooled over models: {error}")
    return corrected(rows, correction), notes


def _rows(
    system: str,
    reference: str,
    pairs: dict[str, tuple[Run, Run]],
    metric: str | None,
    by_documents: bool,
    notes: list[str],
) -> list[OverModels]:
    tasks = [t for t in next(iter(pairs.values()))[0].tasks if all(t in r.tasks for two in pairs.values() for r in two)]
    if not tasks:
        raise UserError("no task is in all runs.")
    found = {m: [_compared(a.tasks[t], b.tasks[t], metric) for t in tasks] for m, (a, b) in pairs.items()}
    shares = {t: all(of_model[i].share for of_model in found.values()) for i, t in enumerate(tasks)}
    averaged = len(tasks) > 1 and one_unit(shares, notes)
    rows = []
    for i, task in enumerate([*tasks, *([AVERAGE] if averaged else [])]):
        if task == AVERAGE:
            differences = {m: _average(of_model, by_documents) for m, of_model in found.items()}
            pooled = pool_over_tasks([[c.changes for c in of_model] for of_model in found.values()], by_documents)
        else:
            differences = {m: of_model[i].difference for m, of_model in found.items()}
            pooled = pool_over_tasks([[of_model[i].changes] for of_model in found.values()])
        if pooled is None:
            raise UserError(f"{task} has a single document or text, so that no error is known.")
        rows.append(OverModels(None, task, "", "", system, reference, "", differences, pooled))
    return rows


@dataclass(frozen=True)
class _Compared:
    """Two runs of one model on a task.

    Attributes:
        share: whether the metric is a share, from 0 to 1.
    """

    changes: Changes
    texts: TextClusters
    difference: Difference
    share: bool


def _compared(a: TaskRun, b: TaskRun, metric: str | None) -> _Compared:
    matched, names = pair(a, b), metrics_of(a, b, metric)
    first, second = means(matched.first, names[0]), means(matched.second, names[1])
    keys = clusters_of(matched.first, matched.second)
    texts = TextClusters.keyed(keys) if keys else TextClusters.independent(len(first))
    if keys is None or not texts.shared:
        keys = [d.key for d in matched.first]
    difference = paired_difference(second, first, texts)
    return _Compared(Changes(second - first, keys), texts, difference, is_share(first, second))


def _average(of_model: Sequence[_Compared], by_documents: bool) -> Difference:
    changes, texts = [c.changes.values for c in of_model], [c.texts for c in of_model]
    return average_difference(*(joined(changes, texts) if by_documents else (changes, texts)))
