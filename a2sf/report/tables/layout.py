"""Tables of accuracies: policy x budget (x factor) down, tasks and their average across, one per model and shots.

`a2sf.report.tables.marks` marks the best values and those significantly worse; `a2sf.report.tables.write` writes tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import fmean
from typing import Any

from a2sf.analysis.comparisons.pairs import Comparer, controls_of
from a2sf.analysis.results.chance import chance_levels
from a2sf.analysis.results.documents import texts_note
from a2sf.analysis.results.errors import estimate_of
from a2sf.analysis.results.grid import AVERAGE, BY_DOCUMENTS, DEFAULT_PAIR, SYSTEM, Grid, SystemResults
from a2sf.analysis.results.labels import DASH, MINUS
from a2sf.analysis.statistics.families import HOLM, Correction
from a2sf.analysis.statistics.intervals import averaged
from a2sf.report.tables.marks import Tests, correct, mark_best, test_equivalence
from a2sf.report.tables.table import Entry, Table, TableRow

WITHIN_NOTE = (
    "Which systems are within the margin of the full cache is in the tables of --pivot task, and in the ranking."
)


def build_tables(
    grid: Grid,
    pivot: str = "task",
    tested: bool = True,
    pair: tuple[str, str] = DEFAULT_PAIR,
    correction: Correction = HOLM,
    margin: float | None = None,
) -> list[Table]:
    """Lay out a grid: one table per model and shots (for another pivot than `task`, also per task).

    Args:
        pivot: what goes across: one of `PIVOTS`.
        tested: whether to run the paired tests; False is quick.
        pair: treatment and control policy of the difference column.
        correction: of the tests' p-values.
        margin: in the metric's unit; if it is given, each system is tested to be within it of the full cache.
    """
    made = [_by_task(model, shots, part, tested, pair, margin) for model, shots, part in grid.by_model()]
    tables = correct([table for table, _ in made], [tests for _, tests in made], correction)
    if pivot != "task":
        tables = [turned for table in tables for turned in _turn(table, pivot)]
    return tables


def _by_task(
    model: str, shots: int, part: Grid, tested: bool, pair: tuple[str, str], margin: float | None
) -> tuple[Table, Tests]:
    systems, tasks = part.systems(pair), part.tasks
    groups = part.group_scores()
    columns = [*groups, *([*tasks, AVERAGE] if len(tasks) > 1 else tasks)]
    score = columns[-1]
    tested = tested and bool(part.cells)
    comparer = Comparer(part)
    rows, tests = mark_best(
        systems, [_row(system, tasks, groups) for system in systems], columns, part, comparer if tested else None
    )
    if tested and margin is not None:
        tests.to_full = test_equivalence(systems, part, comparer, margin)
    full, controls = {s.variant: s for s in systems if s.is_full}, controls_of(systems, pair)
    values = {id(s): r.entries[score].value for s, r in zip(systems, rows, strict=True) if score in r.entries}

    def minus(one: SystemResults, other: SystemResults | None) -> float | None:
        """The difference of their scores; None where one has none, or has it of other documents."""
        if other is None or not {id(one), id(other)} <= values.keys() or not comparer.comparable(one, other):
            return None
        return values[id(one)] - values[id(other)]

    final = []
    for system, row in zip(systems, rows, strict=True):
        if not system.is_full:
            row = replace(row, to_full=minus(system, full.get(system.variant)))
        if system.policy == pair[0]:
            control = controls.get((system.budget, system.schedule, system.variant))
            row = replace(row, to_control=minus(system, control))
        final.append(row)
    notes = list(comparer.problems)
    if not full:
        notes.append("There is no full-cache result, so there is no difference to it.")
    firsts = [s for s in systems if s.policy == pair[0]]
    if firsts and not controls:
        notes.append(f"There is no result of the policy {pair[1]}, so there is no difference to it.")
    if len(rows) == 1:
        notes.append("There is one row only, so there is nothing to compare it with.")
    table = Table(
        title=f"{model}, {shots}-shot, {part.metric}" + (" (%)" if part.percent else "") + part.one_schedule,
        model=model,
        shots=shots,
        metric=part.metric,
        percent=part.percent,
        columns=columns,
        rows=final,
        heads=_used_heads(final),
        to_full="Δ full" if any(r.to_full is not None for r in final) else None,
        to_control=f"{_one_label(firsts)} {MINUS} {_one_label(controls.values())}"
        if any(r.to_control is not None for r in final)
        else None,
        tested=tested,
        margin=margin if tests.to_full else None,
        higher=part.higher_is_better,
        notes=tuple(notes),
        footnotes=footnotes(part),
        stopped={t: r.stopped for s in systems for t, r in s.rows.items() if isinstance(r.stopped, str)},
        documents={c: _span([r.entries[c].n for r in final if c in r.entries]) for c in columns},
        chance=chance_levels(part),
        members=tuple(t for t in tasks if any(t == m.task for g in part.groups if g.name in groups for m in g.members)),
    )
    return table, tests


def _one_label(systems: Iterable[SystemResults]) -> str:
    """The label of some systems of a policy: with their settings and variant, if these are the same in all."""
    systems = list(systems)
    labels = {s.short_label for s in systems}
    return labels.pop() if len(labels) == 1 else systems[0].policy_label


def _span(numbers: list[int]) -> str:
    low, high = min(numbers, default=0), max(numbers, default=0)
    return str(low) if low == high else f"{low} to {high}"


def footnotes(part: Grid) -> tuple[str, ...]:
    """Notes that concern all numbers of a grid."""
    weighted = BY_DOCUMENTS if part.by_documents and len(part.tasks) > 1 else ""
    return tuple(filter(None, [weighted, texts_note(part.cells_shown), part.versions_note]))


def _row(system: SystemResults, tasks: list[str], groups: dict[str, dict[tuple[Any, ...], Any]]) -> TableRow:
    place = tuple(getattr(system, k) for k in SYSTEM)
    scored = {name: rows[place] for name, rows in groups.items() if place in rows} | system.rows
    found = {t: estimate_of(r) for t, r in scored.items()}
    sizes = {t: int(r.n) for t, r in scored.items()}
    if len(tasks) > 1 and set(tasks) <= set(found):
        # tasks share no documents, so their errors are independent
        found[AVERAGE], sizes[AVERAGE] = (
            averaged([found[t] for t in tasks], system.weights(tasks)),
            sum(sizes[t] for t in tasks),
        )
        found[AVERAGE] = replace(found[AVERAGE], value=fmean((found[t].value for t in tasks), system.weights(tasks)))
    entries = {t: Entry(e.value, e.stderr, sizes[t], e.low, e.high) for t, e in found.items()}
    return TableRow(
        system.short_label, system.budget, system.factor, system.schedule, system.is_full, system.causal, entries
    )


def _used_heads(rows: list[TableRow]) -> tuple[str, ...]:
    several = len({r.schedule for r in rows if r.schedule != DASH}) > 1
    shown = {"label": True, "schedule": several}
    heads = ("label", "budget", "schedule", "factor")
    return tuple(h for h in heads if shown.get(h, any(getattr(r, h) != DASH for r in rows)))


def _numeric(text: str) -> float:
    try:
        return float(text.split()[0])
    except ValueError:
        return math.inf


def _turn(table: Table, pivot: str) -> list[Table]:
    """One table per task with budgets, factors or policies across."""
    across: Callable[[TableRow], str] = {
        "budget": lambda r: r.budget,
        "factor": lambda r: "no factor" if r.factor == DASH else r.factor,
        "policy": lambda r: r.label if r.factor == DASH or r.is_full else f"{r.label} ({r.factor})",
    }[pivot]
    columns = list(dict.fromkeys(across(r) for r in table.rows if not (pivot == "budget" and r.is_full)))
    if pivot == "factor":
        columns.sort(key=lambda c: (c != "no factor", _numeric(c), c))
    turned = []
    for column in table.columns:
        rows: dict[tuple[str, str, str, str], TableRow] = {}
        for row in table.rows:
            if column not in row.entries:
                continue
            label = "" if pivot == "policy" else row.label
            key = (
                label,
                DASH if pivot == "budget" else row.budget,
                DASH if pivot in ("factor", "policy") else row.factor,
                row.schedule,
            )
            target = rows.setdefault(key, TableRow(*key, is_full=row.is_full, causal=row.causal))
            # the full cache has no budget: it is the same under every one
            places = columns if pivot == "budget" and row.is_full else [across(row)]
            target.entries.update(dict.fromkeys(places, row.entries[column]))
        heads = tuple(
            h for h in _used_heads(list(rows.values())) if h != pivot and not (pivot == "policy" and h == "label")
        )
        turned.append(
            replace(
                table,
                title=f"{table.title}, {column}",
                columns=columns,
                rows=list(rows.values()),
                heads=heads,
                members=(),
                documents=dict.fromkeys(columns, table.documents[column]),
                chance=dict.fromkeys(columns, table.chance[column]) if column in table.chance else {},
                to_full=None,
                margin=None,
                notes=(*table.notes, *[WITHIN_NOTE] * (table.margin is not None)),
                to_control=None,
            )
        )
    return turned
