"""Tables of accuracies: policy x budget (x factor) down, tasks and their average across, one per model and shots.

Bold: the best pruned value among the policies with the same budget. A dagger: not significantly different from that best
one (paired test, Holm-corrected over the table, α = 0.05). `a2sf.report.tables.write` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from a2sf.analysis.comparisons.pairs import Comparer
from a2sf.analysis.results.chance import chance_levels
from a2sf.analysis.results.documents import texts_note
from a2sf.analysis.results.grid import AVERAGE, DEFAULT_PAIR, SYSTEM, Grid, System
from a2sf.analysis.results.labels import DASH, MINUS
from a2sf.analysis.statistics.paired import holm
from a2sf.analysis.statistics.texts import CONFIDENCE


@dataclass(frozen=True)
class Entry:
    """One number of a table, in the metric's own unit.

    Attributes:
        best: the best pruned value at this budget.
        tied: not significantly different from the best (paired test, Holm); None where no test was made.
    """

    value: float
    stderr: float = math.nan
    n: int = 0
    best: bool = False
    tied: bool | None = None


@dataclass(frozen=True)
class Row:
    """One system; `to_full` and `to_control` are differences of its average (or only task) in the metric's unit."""

    label: str
    budget: str
    factor: str
    schedule: str = DASH
    is_full: bool = False
    causal: bool = True
    entries: dict[str, Entry] = field(default_factory=dict)
    to_full: float | None = None
    to_control: float | None = None


@dataclass(frozen=True)
class Table:
    """A laid-out table.

    Attributes:
        columns: keys of `Row.entries`, in order.
        heads: headings of the leading text columns that are used, of `label`, `budget`, `schedule`, `factor`.
        to_full, to_control: headings of the difference columns; None leaves them out.
        tested: whether paired tests were made for the daggers.
        footnotes: notes under the numbers wherever they are shown, one sentence each.
        stopped: of a column whose documents were not all scored, how many were of how many.
        members: columns of tasks whose group has a column, too.
        documents: of a column, how many documents its rows have; `100 to 200` where they differ.
        chance: of a column, the metric of random choice, where that is known.
    """

    title: str
    model: str
    shots: int
    metric: str
    percent: bool
    columns: list[str]
    rows: list[Row]
    heads: tuple[str, ...] = ("label", "budget", "schedule", "factor")
    to_full: str | None = None
    to_control: str | None = None
    tested: bool = False
    notes: tuple[str, ...] = ()
    footnotes: tuple[str, ...] = ()
    stopped: dict[str, str] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    documents: dict[str, str] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)


def build_tables(
    grid: Grid, pivot: str = "task", tested: bool = True, pair: tuple[str, str] = DEFAULT_PAIR
) -> list[Table]:
    """Lay out a grid: one table per model and shots (for another pivot than `task`, also per task).

    Args:
        pivot: what goes across: one of `PIVOTS`.
        tested: whether to run the paired tests; False is quick.
        pair: treatment and control policy of the difference column.
    """
    tables = [_by_task(model, shots, part, tested, pair) for model, shots, part in grid.by_model()]
    if pivot != "task":
        tables = [turned for table in tables for turned in _turn(table, pivot)]
    return tables


def _by_task(model: str, shots: int, part: Grid, tested: bool, pair: tuple[str, str]) -> Table:
    systems, tasks = part.systems(pair), part.tasks
    groups = part.group_scores()
    columns = [*groups, *([*tasks, AVERAGE] if len(tasks) > 1 else tasks)]
    score = columns[-1]
    rows = [_row(system, tasks, groups) for system in systems]
    comparer = Comparer(part)
    rows = _mark(systems, rows, columns, part, comparer if tested and part.cells else None)
    full = {s.variant: r for s, r in zip(systems, rows, strict=True) if s.is_full}
    control = {(s.budget, s.schedule, s.variant): r for s, r in zip(systems, rows, strict=True) if s.policy == pair[1]}
    labels = {s.policy: s.short_label for s in systems}
    final = []
    for system, row in zip(systems, rows, strict=True):
        against = full.get(system.variant)
        row = replace(row, to_full=None if system.is_full else _minus(row, against, score))
        if system.policy == pair[0]:
            row = replace(
                row, to_control=_minus(row, control.get((system.budget, system.schedule, system.variant)), score)
            )
        final.append(row)
    notes = list(comparer.problems)
    if not full:
        notes.append("There is no full-cache result, so there is no difference to it.")
    if pair[0] in labels and pair[1] not in labels:
        notes.append(f"There is no result of the policy {pair[1]}, so there is no difference to it.")
    if len(rows) == 1:
        notes.append("There is one row only, so there is nothing to compare it with.")
    return Table(
        title=f"{model}, {shots}-shot, {part.metric}" + (" (%)" if part.percent else "") + part.one_schedule,
        model=model,
        shots=shots,
        metric=part.metric,
        percent=part.percent,
        columns=columns,
        rows=final,
        heads=_used_heads(final),
        to_full="Δ full" if any(r.to_full is not None for r in final) else None,
        to_control=f"{labels[pair[0]]} {MINUS} {labels[pair[1]]}"
        if any(r.to_control is not None for r in final)
        else None,
        tested=tested and bool(part.cells),
        notes=tuple(notes),
        footnotes=footnotes(part),
        stopped={t: r.stopped for s in systems for t, r in s.rows.items() if isinstance(r.stopped, str)},
        documents={c: _span([r.entries[c].n for r in final if c in r.entries]) for c in columns},
        chance=chance_levels(part),
        members=tuple(t for t in tasks if any(t == m.task for g in part.groups if g.name in groups for m in g.members)),
    )


def _span(numbers: list[int]) -> str:
    low, high = min(numbers, default=0), max(numbers, default=0)
    return str(low) if low == high else f"{low} to {high}"


def footnotes(part: Grid) -> tuple[str, ...]:
    """Notes that concern all numbers of a grid."""
    return tuple(filter(None, [texts_note(part.cells_shown), part.versions_note]))


def _row(system: System, tasks: list[str], groups: dict[str, dict[tuple[Any, ...], Any]]) -> Row:
    place = tuple(getattr(system, k) for k in SYSTEM)
    scored = {name: rows[place] for name, rows in groups.items() if place in rows} | system.rows
    entries = {t: Entry(float(r.value), float(r.stderr), int(r.n)) for t, r in scored.items()}
    if len(tasks) > 1 and set(tasks) <= set(entries):
        parts = [entries[t] for t in tasks]
        # tasks share no documents, so their errors are independent
        stderr = math.sqrt(sum(e.stderr**2 for e in parts)) / len(parts)
        entries[AVERAGE] = Entry(fmean(e.value for e in parts), stderr, sum(e.n for e in parts))
    return Row(
        system.short_label, system.budget, system.factor, system.schedule, system.is_full, system.causal, entries
    )


def _mark(
    systems: list[System], rows: list[Row], columns: list[str], part: Grid, comparer: Comparer | None
) -> list[Row]:
    """Find the best pruned value per budget, schedule and column, and test the others against it; causal policies only."""
    better = max if part.higher_is_better else min
    pruned = [i for i, s in enumerate(systems) if not s.is_full and s.causal]
    tests: list[tuple[int, str, float]] = []
    best: dict[tuple[str, str, str, str], float] = {}
    places = {i: (systems[i].budget, systems[i].schedule, systems[i].variant) for i in pruned}
    for place in dict.fromkeys(places.values()):
        for column in columns:
            peers = [i for i in pruned if places[i] == place and column in rows[i].entries]
            if len(peers) < 2:
                continue
            top = better(peers, key=lambda i: rows[i].entries[column].value)
            best[*place, column] = rows[top].entries[column].value
            for i in peers if comparer else []:
                p = _p_value(comparer, systems[i], systems[top], column, part) if i != top else None  # type: ignore[arg-type]
                if p is not None:
                    tests.append((i, column, p))
    corrected = holm([p for _, _, p in tests])
    tied = {(i, column): p > 1 - CONFIDENCE for (i, column, _), p in zip(tests, corrected, strict=True)}
    marked = list(rows)
    for i in pruned:
        entries = {}
        for column, entry in rows[i].entries.items():
            is_best = entry.value == best.get((*places[i], column))
            entries[column] = replace(entry, best=is_best, tied=None if is_best else tied.get((i, column)))
        marked[i] = replace(rows[i], entries=entries)
    return marked


def _p_value(comparer: Comparer, a: System, b: System, column: str, part: Grid) -> float | None:
    same = a.keys.keys() == b.keys.keys()
    group = next((g for g in part.groups if g.name == column), None)
    if column == AVERAGE:
        difference = comparer.average(a.keys, b.keys) if same else None
    elif group is not None and column not in a.keys:
        scored = [m.task for m in group.members if m.task in part.tasks]  # which lm-eval takes for all, too
        difference = comparer.group(a.keys, b.keys, scored, bool(group.weighted(part.metric)))
    else:
        difference = comparer.task(a.keys[column], b.keys[column])
    return None if difference is None else difference.p


def _minus(row: Row, other: Row | None, column: str) -> float | None:
    if other is None or column not in row.entries or column not in other.entries:
        return None
    return row.entries[column].value - other.entries[column].value


def _used_heads(rows: list[Row]) -> tuple[str, ...]:
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
    across: Callable[[Row], str] = {
        "budget": lambda r: r.budget,
        "factor": lambda r: "no factor" if r.factor == DASH else r.factor,
        "policy": lambda r: r.label if r.factor == DASH or r.is_full else f"{r.label} ({r.factor})",
    }[pivot]
    columns = list(dict.fromkeys(across(r) for r in table.rows if not (pivot == "budget" and r.is_full)))
    if pivot == "factor":
        columns.sort(key=lambda c: (c != "no factor", _numeric(c), c))
    turned = []
    for column in table.columns:
        rows: dict[tuple[str, str, str, str], Row] = {}
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
            target = rows.setdefault(key, Row(*key, is_full=row.is_full, causal=row.causal))
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
                to_control=None,
            )
        )
    return turned
