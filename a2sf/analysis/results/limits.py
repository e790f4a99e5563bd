"""Results of a sweep whose `limit` was raised: those of the largest limit have all documents of the smaller ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from a2sf.analysis.results.variants import place_of
from a2sf.errors import counted
from a2sf.store.runs import StoredCell, id_of


def limit_label(limit: Any) -> str:
    """A limit as `--limit` takes it: a number, or `all`."""
    return "all" if limit is None or limit != limit else f"{limit:.0f}"


def drop_smaller(cells: Sequence[StoredCell], notes: list[str]) -> list[StoredCell]:
    """Leave out the results of a limit if a larger limit of the same sweep has all of them, with more documents.

    Cells with one id differ in nothing but the limit, whose documents are the first ones. Cells of early stopping stay. If
    only some systems were computed with the larger limit, none are left out: the others would have no results to compare.

    Args:
        cells: of one sweep.
        notes: for the reader; one is added for each limit that is left out.
    """
    places: dict[tuple[Any, ...], dict[float, set[str]]] = {}
    for c in cells:
        if not c.cell.get("until"):
            places.setdefault(place_of(c), {}).setdefault(_size(c), set()).add(id_of(c.cell))
    smaller = {
        (place, size)
        for place, of in places.items()
        for size, ids in of.items()
        if ids <= set().union(*(more for larger, more in of.items() if larger > size))
    }
    left = [c for c in cells if not c.cell.get("until") and (place_of(c), _size(c)) in smaller]
    for size in sorted({_size(c) for c in left}):
        old = [c for c in left if _size(c) == size]
        label, tasks = limit_label(old[0].cell["limit"]), ", ".join(sorted({c.cell["task"] for c in old}))
        notes.append(
            f"{tasks}: {counted(len(old), 'cell')} with limit={label} "
            f"{'are' if len(old) > 1 else 'is'} left out, because a larger limit has all their documents; "
            f"--limit {label} shows them."
        )
    paths = {c.path for c in left}
    return [c for c in cells if c.path not in paths]


def _size(stored: StoredCell) -> float:
    return math.inf if stored.cell["limit"] is None else stored.cell["limit"]
