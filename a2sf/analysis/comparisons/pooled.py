"""Differences between two systems pooled over models: the pair's, and every policy's to the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from a2sf.analysis.comparisons.pairs import Comparer, matched
from a2sf.analysis.results.documents import DOCUMENT, TEXT, paired_documents, texts_of
from a2sf.analysis.results.grid import AVERAGE, DEFAULT_PAIR, SYSTEM, Grid, SystemResults
from a2sf.analysis.statistics.families import HOLM, Adjusted, Correction, span
from a2sf.analysis.statistics.paired import Difference
from a2sf.analysis.statistics.pooled import Changes, Pooled, pool_tasks
from a2sf.errors import UserError

ALL = "all models"


@dataclass(frozen=True)
class OverModels:
    """One comparison in several models, on a task or the average over tasks.

    Attributes:
        shots: None where they are not known; budget, schedule and factor are then "".
        first, second: labels of the systems; differences are first minus second.
        by_model: model -> its paired difference.
        pooled: over the models.
        adjusted: the pooled p-value after correction over the rows of a table; those of single tasks, beside their average,
            are a family of their own. None until corrected.
    """

    shots: int | None
    task: str
    budget: str
    schedule: str
    first: str
    second: str
    factor: str
    by_model: dict[str, Difference]
    pooled: Pooled
    adjusted: Adjusted | None = None


@dataclass(frozen=True)
class _Matched:
    """Two systems in one model."""

    model: str
    part: Grid
    first: SystemResults
    second: SystemResults


def compare_over_models(
    grid: Grid, pair: tuple[str, str] = DEFAULT_PAIR, correction: Correction = HOLM
) -> tuple[list[OverModels], list[OverModels], list[str]]:
    """The pair's differences, and those of every pruned causal system to the full cache, in all models that have both.

    Returns:
        Both lists, empty with a single model, and one sentence for each thing that could not be pooled.
    """
    of_pair: list[OverModels] = []
    of_full: list[OverModels] = []
    notes: list[str] = []
    for shots, parts in _by_shots(grid).items():
        paired = [_Matched(m, p, a, b) for m, p in parts.items() for a, b in matched(p, pair) if b is not None]
        of_pair += _pooled(shots, paired, notes)
        to_full = []
        for model, part in parts.items():
            systems = part.systems(pair)
            fulls = {s.variant: s for s in systems if s.is_full}
            pruned = [s for s in systems if s.causal and not s.is_full and s.variant in fulls]
            to_full += [_Matched(model, part, s, fulls[s.variant]) for s in pruned]
        of_full += _pooled(shots, to_full, notes)
    return corrected(of_pair, correction), corrected(of_full, correction), list(dict.fromkeys(notes))


def _by_shots(grid: Grid) -> dict[int, dict[str, Grid]]:
    """Shots -> model -> its results, of the shots that at least two models have."""
    found: dict[int, dict[str, Grid]] = {}
    for model, shots, part in grid.by_model():
        if part.cells:
            found.setdefault(shots, {})[model] = part
    return {shots: parts for shots, parts in found.items() if len(parts) > 1}


def _pooled(shots: int, found: Sequence[_Matched], notes: list[str]) -> list[OverModels]:
    places: dict[tuple[Any, ...], list[_Matched]] = {}
    for m in found:
        places.setdefault((*(getattr(m.first, k) for k in SYSTEM), m.second.settings), []).append(m)
    rows: list[OverModels] = []
    for several in places.values():
        if len(several) < 2:
            continue
        tasks = [t for t in several[0].part.tasks if all({t} <= {*m.first.keys} & {*m.second.keys} for m in several)]
        if missing := sorted({t for m in several for t in m.part.tasks} - set(tasks)):
            notes.append(f"Not pooled over models, because a model lacks them: {', '.join(missing)}.")
        for task in [*tasks, *([AVERAGE] if len(tasks) > 1 else [])]:
            row = _row(shots, task, tasks if task == AVERAGE else [task], several, notes)
            rows += [] if row is None else [row]
    return rows


def corrected(rows: Sequence[OverModels], correction: Correction = HOLM) -> list[OverModels]:
    """The same with corrected p-values; the rows of one number of shots are a table."""
    shown = {id(r) for r in shown_tasks(rows)}
    adjusted = correction.adjusted([r.pooled.p for r in rows], [(ALL, (r.shots, id(r) in shown)) for r in rows])
    return [replace(r, adjusted=a) for r, a in zip(rows, adjusted, strict=True)]


def shown_tasks(found: Sequence[OverModels]) -> list[OverModels]:
    """The rows of tables: of the average over tasks, or of a comparison's only task."""
    averaged = {_place(o) for o in found if o.task == AVERAGE}
    return [o for o in found if o.task == AVERAGE or _place(o) not in averaged]


def documents_in_words(found: Sequence[OverModels]) -> str:
    """How many documents each model's differences are of, in words."""
    return f"n = {span([d.n for o in found for d in o.by_model.values()])} documents in each model"


def _place(o: OverModels) -> tuple[object, ...]:
    return (o.shots, o.budget, o.schedule, o.first, o.second, o.factor)


def _row(
    shots: int, task: str, tasks: Sequence[str], several: Sequence[_Matched], notes: list[str]
) -> OverModels | None:
    differences, changes = {}, []
    for m in several:
        comparer = Comparer(m.part)
        a, b = ({t: s.keys[t] for t in tasks} for s in (m.first, m.second))
        found = comparer.average(a, b) if task == AVERAGE else comparer.task(a[task], b[task])
        if found is None:
            notes += comparer.problems
            return None
        differences[m.model] = found
        changes.append([changes_of(m.part, [a[t]], [b[t]]) for t in tasks])
    pooled = pool_over_tasks(changes, several[0].part.by_documents)
    if pooled is None:
        return None
    first, second = several[0].first, several[0].second
    return OverModels(
        shots, task, first.budget, first.schedule, first.label, second.label, first.factor, differences, pooled
    )


def pool_over_tasks(models: Sequence[Sequence[Changes]], by_documents: bool = False) -> Pooled | None:
    """Pool the mean over tasks; None where a task has a single document or text, so that no error is known.

    Args:
        models: for each model the changes of each task, in the same order.
        by_documents: count each document once, and not each task.
    """
    if by_documents:
        models = [[Changes.joined(of_model)] for of_model in models]
    tasks = list(zip(*models, strict=True))
    if any(c.texts.number < 2 for of_task in tasks for c in of_task):
        return None
    return pool_tasks(tasks)


def changes_of(part: Grid, a: Sequence[str], b: Sequence[str]) -> Changes:
    """How a task's documents change between two policies, on the mean over budgets.

    Args:
        a, b: keys of the cells at each budget.

    Raises:
        UserError: if they cannot be paired, or budgets have other documents.
    """
    values, keys = [], None
    column = f"metric/{part.metric}"
    for one, other in zip(a, b, strict=True):
        left, right = paired_documents(part.cells[one], part.cells[other], part.mixed)
        values.append(left[column].to_numpy(float) - right[column].to_numpy(float))
        texts = texts_of(left, right)
        if texts.shared:
            known = next(d[TEXT] for d in (left, right) if TEXT in d and d[TEXT].notna().all())
            mine = known.astype(str).tolist()
        else:
            mine = [f"{i} {h}" for i, h in left[DOCUMENT].itertuples(index=False)]
        if keys is not None and mine != keys:
            raise UserError("The budgets were not run on the same documents, so they cannot be averaged.")
        keys = mine
    return Changes(np.mean(values, axis=0), keys or [])


def over_models_frame(found: Sequence[OverModels]) -> pd.DataFrame:
    """`models.csv`: for each comparison a row per model and one for all, unrounded, in the metric's own unit."""
    rows = []
    for o in found:
        same = {k: getattr(o, k) for k in ("shots", "task", "budget", "schedule", "first", "second", "factor")}
        for model, d in o.by_model.items():
            rows.append(same | {"model": model, "n": d.n, "value": d.value, "low": d.low, "high": d.high, "p": d.p})
        rows.append(same | {"model": ALL} | vars(o.pooled) | (o.adjusted.columns if o.adjusted else {}))
    return pd.DataFrame(rows)
