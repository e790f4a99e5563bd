"""The last step of a sweep: its results on the screen and in trackers, its failures, and what comes next."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.markup import escape

from a2sf.app.check import Checked
from a2sf.app.plan import PlannedSweep
from a2sf.app.process import screen
from a2sf.app.runners import runner_of
from a2sf.errors import counted
from a2sf.report.tables.screen import screen_table
from a2sf.store.notes import notes_of, rounding_note
from a2sf.store.runs import StoredCell, table_of
from a2sf.sweep.prepare.documents import by_reason
from a2sf.sweep.runner import finish, hardly_pruned


def report(planned: PlannedSweep) -> None:
    """Write `results.csv`, show it as a table, log it; exit with 1 if a cell failed or could not be run."""
    checked, directory = planned.checked, planned.checked.directory
    stored, failures = finish(directory, planned.plan.cells)
    if stored:
        screen.print(screen_table(stored, checked.aggregates))
        screen.print(_written(directory, len(stored)), highlight=False, soft_wrap=True)
        for note in filter(None, [hardly_pruned(stored), *notes_of(stored), rounding_note(stored)]):
            screen.print(note, highlight=False, markup=False, soft_wrap=True)
        _track(stored, checked)
    if failures:
        _show_failures(failures, len(planned.plan.cells))
    for why, names in by_reason(checked.refused).items():
        several = f"{len(names)} cells were" if len(names) > 1 else "1 cell was"
        screen.print(f"[bold red]{several} not run[/bold red]: {escape(why)}", highlight=False, soft_wrap=True)
    if stored:
        screen.print(f"Next: a2sf tables {directory}   (tables, plots, report.html)", highlight=False, soft_wrap=True)
    if failures or checked.refused:
        sys.exit(1)


def _written(directory: Path, cells: int) -> str:
    """A sentence: how many results of how many cells `results.csv` holds, `cells` of them from this command."""
    file = directory / "results.csv"
    of_cell = pd.read_csv(file, usecols=["cell"])["cell"]
    total = of_cell.nunique()
    ours = "" if total == cells else f", {cells} of them of this command"
    return f"{counted(len(of_cell), 'result')} (one per metric) of {counted(total, 'cell')} in {file}{ours}"


def _track(stored: Sequence[StoredCell], checked: Checked) -> None:
    """Log all cells, including those that another process computed."""
    tracker = runner_of(checked.settings[0]).tracker
    if tracker:
        for cell in stored:
            tracker.log_cell(cell)
        tracker.log_summary(table_of(stored, checked.aggregates), lambda: _pictures(checked.directory))
        screen.print(tracker.note or "", highlight=False, markup=False, soft_wrap=True)


def _pictures(directory: Path) -> dict[str, Path]:
    from a2sf.report.output import pictures  # its import takes a second

    return pictures(directory)


def _show_failures(failures: Sequence[Mapping[str, Any]], cells: int) -> None:
    """Print each error once, since a model that cannot be loaded fails all its cells."""
    screen.print(f"[bold red]{len(failures)} of {counted(cells, 'cell')} failed[/bold red]; the same command retries")
    names_of: dict[str, list[str]] = {}
    for failure in failures:
        names_of.setdefault(failure["error"], []).append(failure["cell"]["name"])
    for error, names in names_of.items():
        which = names[0] if len(names) == 1 else f"{len(names)} cells, {names[0]} the first"
        screen.print(f"  {which}: {error}", highlight=False, markup=False, soft_wrap=True)
