"""What a sweep can detect: the smallest difference that its documents can show, and how many documents a given one needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from a2sf.analysis.results.flips import Flips, flips_of
from a2sf.analysis.results.grid import AVERAGE
from a2sf.analysis.results.labels import DASH
from a2sf.analysis.statistics.equivalence import ALPHA
from a2sf.analysis.statistics.power import (
    documents_for_average,
    documents_needed,
    smallest_average,
    smallest_difference,
)
from a2sf.sweep.cell import Cell
from a2sf.sweep.planning.estimate import Measurements
from a2sf.sweep.planning.power import PowerSettings

USUAL_FLIPS = 0.15
"""Share of documents on which two systems differ, where no earlier result shows it."""

TITLE = "Smallest difference detected with 80 % power, in points (paired test, 5 %):"


@dataclass(frozen=True)
class TaskPower:
    """What one task, or the average over tasks, can detect; differences are shares, not points.

    Attributes:
        documents: that are scored, of all tasks for the average.
        flips: share on which two systems differ; None: of an average.
        known: whether earlier results, or the user, say how many flip.
        one: whether `flips` is a single document, because fewer were expected.
        alone, corrected: smallest difference with one test, and with the correction for all; None: none is found.
        needed: documents for the wanted difference at the corrected level, of each task for the average; None: none is
            wanted, or too many.
    """

    name: str
    documents: int
    flips: float | None
    known: bool
    alone: float | None
    corrected: float | None
    needed: int | None = None
    one: bool = False


def number_of_tests(cells: Sequence[Cell]) -> int:
    """How many tests a table of the cells makes: at each budget every pruned system against the best, in each column.

    With one system at each budget it is compared with the full cache. Of several models and shots the largest number counts.
    """
    most = 0
    for place in {(c.model_name, c.shots) for c in cells}:
        part = [c for c in cells if (c.model_name, c.shots) == place and c.policy.causal]
        tasks = {c.task_name for c in part}
        columns = len(tasks) + (len(tasks) > 1)
        by_budget: dict[str, set[str]] = {}
        for c in part:
            if c.policy.name != "full":
                by_budget.setdefault(f"{c.budget}{c.schedule}", set()).add(repr(c.policy))
        has_full = any(c.policy.name == "full" for c in part)
        tests = sum(len(systems) - 1 for systems in by_budget.values()) or len(by_budget) * has_full
        most = max(most, tests * columns)
    return most


def power_rows(
    documents: Mapping[str, int], earlier: Mapping[str, Flips], settings: PowerSettings, level: float
) -> list[TaskPower]:
    """One row for each task whose answers are right or wrong, and one for their average.

    Args:
        documents: task -> how many are scored.
        earlier: task -> flips of earlier results.
        level: of a test after correction.
    """
    rows, independent, shares = [], [], []
    wanted = None if settings.detect is None else settings.detect / 100
    for task, n in documents.items():
        found = earlier.get(task, Flips(USUAL_FLIPS))
        share = settings.flips or found.share
        if share is None:
            continue
        one, share = share < 1 / n, max(share, 1 / n)
        effective = max(1, round(found.effective * n))
        known = settings.flips is not None or task in earlier
        needed = None if wanted is None else documents_needed(wanted, share, level)
        needed = None if needed is None else round(needed / found.effective)
        alone, corrected = (smallest_difference(effective, share, a) for a in (ALPHA, level))
        rows.append(TaskPower(task, n, share, known, alone, corrected, needed, one))
        independent.append(effective)
        shares.append(share)
    if len(rows) > 1:
        needed = None
        if wanted is not None:
            per_task = documents_for_average(wanted, shares, level)
            needed = round(per_task * max(r.documents / n for r, n in zip(rows, independent, strict=True)))
        alone, corrected = (smallest_average(independent, shares, a) for a in (ALPHA, level))
        rows.append(TaskPower(AVERAGE, sum(r.documents for r in rows), None, True, alone, corrected, needed))
    return rows


def power_of(cells: Sequence[Cell], measurements: Measurements, settings: PowerSettings) -> RenderableType | None:
    """The table that a plan shows; None: no two cells can be compared, and the user has set no key of `plan`.

    Args:
        cells: of the sweep, done or not.
        measurements: of earlier results, with the cells of these tasks.
    """
    tests = number_of_tests(cells)
    if not (tests and any(c.stopping_rule is None for c in cells)) and not settings.given:
        return None
    documents, unknown, shared = {}, [], []
    earlier = flips_of(measurements.stored)
    for task, cell in {c.task_name: c for c in cells}.items():
        if cell.spec.definition.config.get("output_type") == "loglikelihood_rolling":
            continue  # it has no right answers
        if (n := measurements.documents_of(cell)) is None:
            unknown.append(task)
            continue
        documents[task] = n
        if cell.spec.shared_context and task not in earlier:
            shared.append(task)
    level = ALPHA / max(1, tests)
    rows = power_rows(documents, earlier, settings, level)
    notes = []
    if unknown:
        notes.append(f"The number of documents is not known before they are fetched: {', '.join(unknown)}.")
    if shared:
        notes.append(f"Documents share texts, so that larger differences than shown are needed: {', '.join(shared)}.")
    if not rows:
        return Group(*map(escape, notes)) if notes and settings.given else None
    return Group(TITLE, _table(rows, tests, settings), escape(" ".join([_legend(rows, tests, settings), *notes])))


def _table(rows: Sequence[TaskPower], tests: int, settings: PowerSettings) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("Task", overflow="fold")
    heads = ["Documents", "Flips", "One test"]
    heads += [f"Corrected for\n{tests} tests"] if tests > 1 else []
    heads += [f"Documents for\n{settings.detect:g} points"] if settings.detect is not None else []
    for head in heads:
        table.add_column(head, justify="right")
    for r in rows:
        share = DASH if r.flips is None else f"{100 * r.flips:.1f} %{'†' if r.one else '' if r.known else '*'}"
        texts = [r.name, f"{r.documents:,}", share, _points(r.alone)]
        texts += [_points(r.corrected)] if tests > 1 else []
        if settings.detect is not None:
            each = " each" * (r.name == AVERAGE)
            texts += [DASH if r.needed is None else f"{float(f'{r.needed:.3g}'):,.0f}{each}"]
        table.add_row(*map(escape, texts))
    return table


def _legend(rows: Sequence[TaskPower], tests: int, settings: PowerSettings) -> str:
    shares = [r for r in rows if r.flips is not None]
    how = []
    if any(r.known and not r.one for r in shares):
        how.append("plan.flips" if settings.flips is not None else "from earlier results")
    if any(not r.known and not r.one for r in shares):
        how.append(f"* not known, assumed; plan.flips={USUAL_FLIPS}")
    if any(r.one for r in shares):
        how.append("† one document, the least there can be")
    text = f"Flips: documents on which two systems differ ({'; '.join(how)})."
    if settings.detect is None:
        return f"{text} plan.detect=2.0 adds the documents that 2 points need."
    return f"{text} Documents for {settings.detect:g} points: with 80 % power{' at the corrected level' * (tests > 1)}."


def _points(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f}"
