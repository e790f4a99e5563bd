"""How far a sweep is, whoever computes it: a bar on a terminal, lines in a log.

Finished cells and what is kept of unfinished ones (`answer_store`) are seen on disk, the cells in work in this process after
every pass. Each cell counts by the tokens that the plan expects of it.
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
from a2sf.sweep.planning.estimate import Estimate
from a2sf.sweep.prepare.bar import bar, repeating
from a2sf.sweep.reuse import Plan

MINUTE = 60.0
POLL_SECONDS = 1.0
CLOCK_SECONDS = 1.0
"""What times of files may lie behind the clock."""
LEAST = 0.01
"""Share of the work after which its speed tells how long the rest takes, where the plan does not."""
TRUST = 0.05
"""Share of the work after which the speed so far counts as much as the plan's."""


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as people say it."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


class Progress:
    """What is done of a sweep's work, and how long the rest will take.

    Args:
        made: the plan.
        groups: the cells that are to be computed.
        estimates: of each group.
        directory: of the sweep.
        underway: the share of the work on a cell that this process has done, by its name; None if it is not at it.
        clock: seconds since 1970.

    Attributes:
        total: cells of the sweep.
        over: those that were finished, or have failed, since the start.
    """

    def __init__(
        self,
        made: Plan,
        groups: Sequence[Sequence[Cell]],
        estimates: Sequence[Estimate],
        directory: Path,
        underway: Callable[[str], float | None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.total, self.over = len(made.cells), list[str]()
        self._there, self._directory, self._underway = len(made.done), directory, underway
        self._clock, self._started = clock, clock()
        pending = {c.name for c in made.pending}
        self._open = {c.name: c for group in groups for c in group if c.name in pending}
        self._size = {name: n for name, n in sizes(groups, estimates).items() if name in pending}
        seconds = [e.seconds for e in estimates]
        self._planned = None if None in seconds else sum(s or 0.0 for s in seconds)
        self._kept: dict[str, tuple[float, float]] = {}  # when it was written, and what it says
        self._whole = sum(self._size.values()) or 1.0
        self._work = 0.0
        self.look()
        self._before = self.share

    def look(self) -> str:
        """Take in what can be seen now; which cells were finished, or have failed, since the last time, or ""."""
        there, failures = _entries(self._directory), _entries(self._directory / "failures")
        finished = [n for n in self._open if n in there and is_cell(self._directory / n)]
        since = self._started - CLOCK_SECONDS
        failed = [n for n in self._open if failures.get(f"{n}.json", 0.0) >= since and n not in finished]
        for name in (*finished, *failed):
            self.over.append(self._open.pop(name).name)
        kept = _entries(self._directory / answer_store.FOLDER)
        for cell in self._open.values():
            written = kept.get(f"{cell.tail}.json")
            if written is not None and self._kept.get(cell.tail, (0.0, 0.0))[0] != written:
                self._kept[cell.tail] = written, answer_store.share_of(self._directory, cell)
        self._work = sum(self._size[n] for n in self.over)
        self._work += sum(self._size[n] * self._share_of(c) for n, c in self._open.items())
        return "; ".join(
            f"{what} {_first(names)}" for what, names in (("finished", finished), ("failed", failed)) if names
        )

    @property
    def cells(self) -> int:
        """Cells that need no more work, those included that were there before."""
        return self._there + len(self.over)

    @property
    def share(self) -> float:
        """How much of the planned work is done, 0 to 1."""
        return min(1.0, self._work / self._whole)

    @property
    def seconds(self) -> float:
        """How long it has been going on."""
        return max(0.0, self._clock() - self._started)

    @property
    def left(self) -> float | None:
        """About how many seconds are left; None where nothing tells.

        By the plan's time, corrected by what the work so far took against it, the more the more of it is done.
        """
        rest, done = 1 - self.share, self.share - self._before
        if self._planned:
            so_far, counted = self._planned * done, self._planned * TRUST
            # before anything is done, the time for loading is no reason to think that all will take longer
            slower = (self.seconds + counted) / (so_far + counted) if done else 1.0
            return self._planned * rest * slower
        return rest * self.seconds / done if done >= LEAST else None

    def __str__(self) -> str:
        left = self.left if self._open else None
        rest = "" if left is None else f", about {duration(left)} left"
        work = f"{100 * self.share:.0f} % of the work"
        return f"{self.cells} of {self.total} cells, {work}, {duration(self.seconds)} so far{rest}"

    def at(self) -> str:
        """Which cells are in work, as far as it can be seen; "" where none is."""
        return _first([name for name, cell in self._open.items() if 0 < self._share_of(cell) < 1])

    def _share_of(self, cell: Cell) -> float:
        here = self._underway(cell.name)
        return min(1.0, self._kept.get(cell.tail, (0.0, 0.0))[1] if here is None else here)


def sizes(groups: Sequence[Sequence[Cell]], estimates: Sequence[Estimate]) -> dict[str, float]:
    """How much work each cell is, in seconds where all are known, else in tokens; one that is not known is as the others."""
    seconds, tokens = [e.seconds for e in estimates], [e.tokens for e in estimates]
    of_group = tokens if None in seconds else seconds
    each = [None if n is None else n / len(g) for n, g in zip(of_group, groups, strict=True)]
    known = [n for n in each if n]
    usual = fmean(known) if known else 1.0
    return {c.name: usual if n is None else n for n, g in zip(each, groups, strict=True) for c in g}


class _Line(ProgressColumn):
    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(str(self._progress))


@contextmanager
def shown(screen: Console, progress: Progress) -> Iterator[None]:
    """Show it on a terminal as a bar, elsewhere as lines: one per finished cell, and one per minute."""
    if screen.is_terminal:

        def completed() -> float:
            progress.look()
            return progress.share

        with bar(screen, [BarColumn(), _Line(progress)], "cells", 1, completed):
            yield
        return
    said = time.monotonic()

    def say(more: str) -> None:
        screen.print(f"{progress}{more and f'; {more}'}", highlight=False, markup=False, soft_wrap=True)

    def follow() -> None:
        nonlocal said
        over = progress.look()
        if over or time.monotonic() - said >= MINUTE:
            at = progress.at()
            say(over or (at and f"at {at}"))
            said = time.monotonic()

    try:
        with repeating(follow, POLL_SECONDS):
            yield
    finally:
        if over := progress.look():
            say(over)


def _first(names: Sequence[str]) -> str:
    return "" if not names else names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _entries(directory: Path) -> dict[str, float]:
    """Names in a directory, and when each was written, in seconds since 1970; none where there is no such directory."""
    found = {}
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):  # it has just been removed
                found[entry.name] = entry.stat().st_mtime
    return found
