"""Marks of an accuracy table: the best pruned values, those significantly worse, and systems as good as the full cache.

Tests of several tables may be one family (`Correction`), so that tables are marked together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from a2sf.analysis.comparisons.pairs import Comparer
from a2sf.analysis.results.grid import AVERAGE, Grid, SystemResults
from a2sf.analysis.statistics.families import Correction
from a2sf.report.tables.table import Equivalence, Table, TableRow


@dataclass
class Tests:
    """The uncorrected tests of one table.

    Attributes:
        to_best: row, column and p-value of each value that was tested against the best of its budget.
        to_full: row -> its tests against the full cache.
    """

    to_best: list[tuple[int, str, float]] = field(default_factory=list)
    to_full: dict[int, Equivalence] = field(default_factory=dict)


def mark_best(
    systems: Sequence[SystemResults],
    rows: Sequence[TableRow],
    columns: Sequence[str],
    part: Grid,
    comparer: Comparer | None,
) -> tuple[list[TableRow], Tests]:
    """Find the best pruned value per budget, schedule and column, and test the others against it; causal policies only.

    Args:
        comparer: for the tests; None: none are made.
    """
    better = max if part.higher_is_better else min
    pruned = [i for i, s in enumerate(systems) if not s.is_full and s.causal]
    places = {i: (systems[i].budget, systems[i].schedule, systems[i].variant) for i in pruned}
    tests = Tests()
    marked = list(rows)
    for place in dict.fromkeys(places.values()):
        for column in columns:
            peers = [i for i in pruned if places[i] == place and column in rows[i].entries]
            if len(peers) < 2:
                continue
            top = better(peers, key=lambda i: rows[i].entries[column].value)
            for i in peers:
                entry = marked[i].entries[column]
                best = entry.value == rows[top].entries[column].value
                marked[i] = replace(marked[i], entries=marked[i].entries | {column: replace(entry, best=best)})
                p = _p_value(comparer, systems[i], systems[top], column, part) if comparer and i != top else None
                if p is not None:
                    tests.to_best.append((i, column, p))
    return marked, tests


def test_equivalence(
    systems: Sequence[SystemResults], part: Grid, comparer: Comparer, margin: float
) -> dict[int, Equivalence]:
    """Row -> its tests against the full cache of the same variant; causal policies with all tasks only."""
    fulls = {s.variant: s for s in systems if s.is_full and set(part.tasks) <= set(s.keys)}
    found = {}
    for i, system in enumerate(systems):
        full = fulls.get(system.variant)
        if full is None or system.is_full or not system.causal or not set(part.tasks) <= set(system.keys):
            continue
        one = len(part.tasks) == 1
        task = part.tasks[0]
        difference = (
            comparer.task(system.keys[task], full.keys[task]) if one else comparer.average(system.keys, full.keys)
        )
        within = comparer.within([system.keys], [full.keys], margin)
        if difference is not None and within is not None:
            worse = within.p_not_worse if part.higher_is_better else within.p_not_better
            found[i] = Equivalence(difference, within, worse)
    return found


def correct(tables: Sequence[Table], tests: Sequence[Tests], correction: Correction) -> list[Table]:
    """The tables with their corrected tests; comparisons with the best are one family, those of equivalence another."""
    rows = [list(table.rows) for table in tables]
    to_best = [(t, *test) for t, of in enumerate(tests) for test in of.to_best]
    places = [(tables[t].model, t) for t, *_ in to_best]
    for (t, i, column, _), test in zip(to_best, correction.adjusted([p for *_, p in to_best], places), strict=True):
        entries = rows[t][i].entries
        rows[t][i] = replace(rows[t][i], entries=entries | {column: replace(entries[column], test=test)})
    to_full = [(t, i, e) for t, of in enumerate(tests) for i, e in of.to_full.items()]
    places = [(tables[t].model, t) for t, *_ in to_full]
    p = [e.within.p_equivalent for *_, e in to_full]
    for (t, i, e), test in zip(to_full, correction.adjusted(p, places), strict=True):
        rows[t][i] = replace(rows[t][i], equivalence=replace(e, test=test))
    return [replace(table, rows=of) for table, of in zip(tables, rows, strict=True)]


def _p_value(comparer: Comparer, a: SystemResults, b: SystemResults, column: str, part: Grid) -> float | None:
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
