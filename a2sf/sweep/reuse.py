"""Which cells of a sweep have a result already, in this sweep or in another one.

The name of a result's directory ends with the first digits of a hash, which two cells may share. So the name only says where
to look; the identity that is stored in the result decides whether it belongs to a cell.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a2sf.store.names import EARLIER_DIGITS
from a2sf.store.runs import (
    CorruptCell,
    StoredCell,
    as_stored,
    is_cell,
    link_cell,
    read_cell,
    recover_cells,
    set_aside,
    tail_of,
)
from a2sf.sweep.cell import Cell


def matches(stored: dict[str, Any], cell: Cell) -> bool:
    """Whether a `cell` entry of `result.json` is this cell's: the same identity, limit and stopping rule."""
    return not differing(stored, cell)


def differing(stored: dict[str, Any], cell: Cell) -> list[str]:
    """The keys in which a `cell` entry of `result.json` differs from a cell, including those inside `identity`."""
    wanted = as_stored(cell.describe())
    if "identity" not in stored:  # then compare its other entries
        keys = set(stored) & set(wanted) - {"id", "name", "policy_label"}
        return sorted(k for k in keys if stored[k] != wanted[k])
    found = _differing(stored["identity"], wanted["identity"])
    return found + [k for k in ("limit", "until") if stored.get(k) != wanted.get(k)]


def _differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    missing = object()
    return sorted(k for k in {*a, *b} if a.get(k, missing) != b.get(k, missing))


class Finished:
    """Directories of finished cells, found by a cell's name.

    Args:
        paths: directories; those without a finished cell are left out.
        wanted: the cells whose results are looked for.
    """

    def __init__(self, paths: Iterable[Path], wanted: Iterable[Cell]) -> None:
        tails = {_place(c.tail) for c in wanted}
        self._of: dict[str, list[Path]] = {}
        for path in paths:
            if (place := _place(tail_of(path))) in tails and is_cell(path):
                self._of.setdefault(place, []).append(path)

    def named(self, cell: Cell) -> list[Path]:
        """Directories whose names end like this cell's name, which may have fewer digits of the hash."""
        found = self._of.get(_place(cell.tail), ())
        return [p for p in found if cell.tail.startswith(tail_of(p))]

    def has(self, cell: Cell) -> bool:
        """Whether there is a valid result of this cell."""
        for path in self.named(cell):
            with suppress(CorruptCell):
                if matches(read_cell(path).cell, cell):
                    return True
        return False


def _place(tail: str) -> str:
    """The part of a tail that all names of one cell share, including names with eight digits, from before version 0.2.0."""
    documents, _, digits = tail.rpartition("__")
    return f"{documents}__{digits[:EARLIER_DIGITS]}"


def results_of(cells: Iterable[Cell], stored: Iterable[StoredCell]) -> dict[str, StoredCell]:
    """Cell name -> its result among the stored ones; cells without a result are left out."""
    among: dict[str, list[StoredCell]] = {}
    for one in stored:
        among.setdefault(_place(tail_of(one.path)), []).append(one)
    found: dict[str, StoredCell] = {}
    for cell in cells:
        for one in among.get(_place(cell.tail), ()):
            if matches(one.cell, cell):
                found.setdefault(cell.name, one)
    return found


@dataclass(frozen=True)
class SweepPlan:
    """The cells of a sweep, each once.

    Attributes:
        cells: all of them, finished or not.
        done: names of the cells that have a result.
        notes: what the user should know (corrupt results, or results of other cells).
        stored: the results of the cells that are done, by their names.
    """

    cells: list[Cell]
    done: frozenset[str]
    notes: list[str]
    stored: dict[str, StoredCell] = field(default_factory=dict)

    @property
    def pending(self) -> list[Cell]:
        return [c for c in self.cells if c.name not in self.done]


def plan(cells: Iterable[Cell], directory: Path) -> SweepPlan:
    """Find equal cells, and results of this sweep or another one; another sweep's results are linked into `directory`."""
    recover_cells(directory)
    unique = {c.name: c for c in {c.tail: c for c in cells}.values()}
    finished = Finished(sorted(directory.parent.glob("*/*__*")), unique.values())
    stored: dict[str, StoredCell] = {}
    notes: list[str] = []
    for name, cell in unique.items():
        named = finished.named(cell)
        here = [p for p in named if p.parent == directory]
        elsewhere = [p for p in named if p.parent != directory]
        if (own := _own_result(cell, here, notes)) is not None:
            stored[name] = own
        elif (found := _first_result(cell, elsewhere, notes)) is not None:
            link_cell(found.path, directory / name)
            stored[name] = found
    return SweepPlan(list(unique.values()), frozenset(stored), notes, stored)


def _own_result(cell: Cell, paths: Iterable[Path], notes: list[str]) -> StoredCell | None:
    """The cell's result in the sweep's directories; a corrupt or wrong result is moved away."""
    for path in paths:
        try:
            stored = read_cell(path)
        except CorruptCell as error:
            notes.append(f"{error}; moved to {set_aside(path).name}, it will be computed again.")
            continue
        if not (different := differing(stored.cell, cell)):
            return stored
        where = "" if path.name != cell.name else f", moved to {set_aside(path, 'other').name}"
        notes.append(_not_reused(path, different, where))
    return None


def _first_result(cell: Cell, paths: Iterable[Path], notes: list[str]) -> StoredCell | None:
    for path in paths:
        with suppress(CorruptCell):
            stored = read_cell(path)
            if not (different := differing(stored.cell, cell)):
                return stored
            notes.append(_not_reused(path, different))
    return None


def _not_reused(path: Path, different: list[str], moved: str = "") -> str:
    return (
        f"{path} is not reused{moved}: its name ends like that of a cell of this sweep, but it is the result of another "
        f"cell (different: {', '.join(different)})."
    )


def find_extendable(runs: Path, cells: Iterable[Cell]) -> dict[str, StoredCell]:
    """Cell name -> the result with its identity and the most documents, in any sweep under `runs`."""
    wanted: dict[str, list[Cell]] = {}
    for cell in cells:
        wanted.setdefault(cell.id[:EARLIER_DIGITS], []).append(cell)
    best: dict[str, StoredCell] = {}
    for path in sorted(runs.glob("*/*__*")):  # one listing, however many cells are wanted
        digits = path.name.rpartition("__")[2]
        candidates = [c for c in wanted.get(digits[:EARLIER_DIGITS], ()) if c.id.startswith(digits)]
        if not candidates or not is_cell(path):
            continue
        with suppress(CorruptCell):
            stored = read_cell(path)
            n = stored.result["documents"]["n"]
            for cell in candidates:
                identical = as_stored(cell.identity) == stored.cell.get("identity", cell.identity)
                if identical and (cell.name not in best or n > best[cell.name].result["documents"]["n"]):
                    best[cell.name] = stored
    return best
