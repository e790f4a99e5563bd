"""The progress of a sweep, whichever processes compute it: a bar on a terminal, lines in a log.

Finished cells, and the saved answers of unfinished ones (`answer_store`), are read from disk; cells that this process
computes are updated after every forward pass. Each cell counts by the work that the plan estimates for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task
from rich.text import Text

from a2sf.store.runs import is_cell
from a2sf.sweep import answer_store
from a2sf.sweep.cell import Cell
from a2sf.sweep.planning.estimate import WorkEstimate
from a2sf.sweep.prepare.bar import bar, repeating
from a2sf.sweep.reuse import SweepPlan

MINUTE = 60.0
POLL_SECONDS = 1.0
CLOCK_SECONDS = 1.0
"""How far the times of files may be behind the clock."""
LEAST = 0.01
"""Share of the work after which the speed so far gives the remaining time, if the plan has no estimate."""
TRUST = 0.05
"""Share of the work after which the speed so far has the same weight as the plan's estimate."""


def duration(seconds: float) -> str:
    """A time as text, in seconds, minutes or hours."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


class Progress:
    """The share of a sweep's work that is done, and the remaining time.

    Args:
        made: the plan.
        groups: the cells that are to be computed.
        estimates: of each group.
        directory: of the sweep.
        underway: cell name -> the share of its work that is done; None if this process does not compute the cell.
        clock: seconds since 1970.

    Attributes:
        total: cells of the sweep.
        ended: names of the cells that finished or failed since the start.
    """

    def __init__(
        self,
        made: SweepPlan,
        groups: Sequence[Sequence[Cell]],
        estimates: Sequence[WorkEstimate],
        directory: Path,
        underway: Callable[[str], float | None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.total, self.ended = len(made.cells), list[str]()
        self._done_before, self._directory, self._underway = len(made.done), directory, underway
        self._clock, self._started = clock, clock()
        pending = {c.name for c in made.pending}
        self._unfinished = {c.name: c for group in groups for c in group if c.name in pending}
        self._size = {name: n for name, n in sizes(groups, estimates).items() if name in pending}
        seconds = [e.seconds for e in estimates]
        self._planned = None if None in seconds else sum(s or 0.0 for s in seconds)
        self._saved: dict[str, tuple[float, float]] = {}  # time of the file, and the share in it
        self._total_work = sum(self._size.values()) or 1.0
        self._work = 0.0
        self.look()
        self._before = self.share

    def look(self) -> str:
        """Update from disk; a text that names the cells that finished or failed since the last call, or ""."""
        entries, failures = _entries(self._directory), _entries(self._directory / "failures")
        finished = [n for n in self._unfinished if n in entries and is_cell(self._directory / n)]
        since = self._started - CLOCK_SECONDS
        failed = [n for n in self._unfinished if failures.get(f"{n}.json", 0.0) >= since and n not in finished]
        for name in (*finished, *failed):
            self.ended.append(self._unfinished.pop(name).name)
        saved = _entries(self._directory / answer_store.FOLDER)
        for cell in self._unfinished.values():
            written = saved.get(f"{cell.tail}.json")
            if written is not None and self._saved.get(cell.tail, (0.0, 0.0))[0] != written:
                self._saved[cell.tail] = written, answer_store.share_of(self._directory, cell)
        self._work = sum(self._size[n] for n in self.ended)
        self._work += sum(self._size[n] * self._share_of(c) for n, c in self._unfinished.items())
        return "; ".join(
            f"{what} {_first(names)}" for what, names in (("finished", finished), ("failed", failed)) if names
        )

    @property
    def cells(self) -> int:
        """Number of cells that need no more work, including those that were finished before the start."""
        return self._done_before + len(self.ended)

    @property
    def share(self) -> float:
        """How much of the planned work is done, 0 to 1."""
        return min(1.0, self._work / self._total_work)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return max(0.0, self._clock() - self._started)

    @property
    def left(self) -> float | None:
        """Estimated seconds that remain; None: not known.

        The plan's estimate is corrected by the time of the work so far; the correction grows with the share that is done.
        """
        rest, done = 1 - self.share, self.share - self._before
        if self._planned:
            so_far, counted = self._planned * done, self._planned * TRUST
            # before any work is done, the time for loading the model does not change the estimate
            slower = (self.seconds + counted) / (so_far + counted) if done else 1.0
            return self._planned * rest * slower
        return rest * self.seconds / done if done >= LEAST else None

    def __str__(self) -> str:
        left, percent = self.left, round(100 * self.share)
        if self._unfinished:  # what follows the answers, such as reading full-cache texts, is in no estimate
            percent = min(99, percent)
        rest = "" if left is None or left < 1 or not self._unfinished else f", about {duration(left)} left"
        work = f"{percent} % of the work"
        return f"{self.cells} of {self.total} cells, {work}, {duration(self.seconds)} so far{rest}"

    def at(self) -> str:
        """The names of the cells that are being computed, as far as this process can see; "" if there are none."""
        return _first([name for name, cell in self._unfinished.items() if 0 < self._share_of(cell) < 1])

    def _share_of(self, cell: Cell) -> float:
        here = self._underway(cell.name)
        return min(1.0, self._saved.get(cell.tail, (0.0, 0.0))[1] if here is None else here)


def sizes(groups: Sequence[Sequence[Cell]], estimates: Sequence[WorkEstimate]) -> dict[str, float]:
    """Work of each cell: seconds if they are known for all cells, else tokens; the average for cells without an estimate."""
    seconds, tokens = [e.seconds for e in estimates], [e.tokens for e in estimates]
    of_group = tokens if None in seconds else seconds
    each = [None if n is None else n / len(g) for n, g in zip(of_group, groups, strict=True)]
    known = [n for n in each if n]
    average = fmean(known) if known else 1.0
    return {c.name: average if n is None else n for n, g in zip(each, groups, strict=True) for c in g}


class _Line(ProgressColumn):
    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(str(self._progress))


@contextmanager
def shown(screen: Console, progress: Progress) -> Iterator[None]:
    """Show the progress while the block runs: a bar on a terminal, else a line per finished cell and per minute."""
    if screen.is_terminal:

        def completed() -> float:
            progress.look()
            return progress.share

        with bar(screen, [BarColumn(), _Line(progress)], "cells", 1, completed):
            yield
        return
    last = time.monotonic()

    def say(more: str) -> None:
        screen.print(f"{progress}{more and f'; {more}'}", highlight=False, markup=False, soft_wrap=True)

    def follow() -> None:
        nonlocal last
        ended = progress.look()
        if ended or time.monotonic() - last >= MINUTE:
            at = progress.at()
            say(ended or (at and f"computing {at}"))
            last = time.monotonic()

    try:
        with repeating(follow, POLL_SECONDS):
            yield
    finally:
        if ended := progress.look():
            say(ended)


def _first(names: Sequence[str]) -> str:
    return "" if not names else names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _entries(directory: Path) -> dict[str, float]:
    """Name -> time of change (seconds since 1970) of a directory's entries; empty if there is no such directory."""
    found = {}
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):  # it has just been removed
                found[entry.name] = entry.stat().st_mtime
    return found
