"""Logging of cells to trackers, in addition to the disk. An error of a tracker never loses a result."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from a2sf.errors import ConfigError, first_line, nearest
from a2sf.store.runs import StoredCell
from a2sf.tracking import content
from a2sf.tracking.content import Destination
from a2sf.tracking.marks import Marks, digest_of
from a2sf.tracking.tensorboard_files import TensorBoardFiles
from a2sf.tracking.wandb_runs import WandbRuns

log = logging.getLogger(__name__)
NONE = "none"
SUMMARY = "summary"
PATIENCE = 2
"""Number of errors in a row after which a tracker is not used any more; a single run may fail because it was deleted."""


@dataclass(frozen=True)
class TrackerSpec:
    """The trackers of a sweep.

    Attributes:
        kinds: of the trackers, each in `KINDS`.
        project, entity: of W&B.
        directory: of TensorBoard's files, with a folder for each sweep; None: `tensorboard/` in the sweep's directory.

    Raises:
        ConfigError: if a kind is unknown, given twice or not installed.
    """

    kinds: tuple[str, ...] = ()
    project: str = "a2sf"
    entity: str | None = None
    directory: str | None = None

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                allowed = f"give one of {', '.join((NONE, *KINDS))}, or a list of them{nearest(kind, KINDS)}"
                raise ConfigError("tracker", kind, allowed)
            if self.kinds.count(kind) > 1:
                raise ConfigError(
                    "tracker", f"[{', '.join(self.kinds)}]", f"it holds {kind} twice; give each kind once"
                )
            if importlib.util.find_spec(kind) is None:
                raise ConfigError("tracker", kind, f'{kind} is not installed; pip install "a2sf[{kind}]"')

    @classmethod
    def chosen(cls, kinds: Mapping[str, str], **settings: str | None) -> TrackerSpec:
        """The trackers of the chosen files of `conf/tracker/`.

        Args:
            kinds: name of a file -> its kind.

        Raises:
            ConfigError: as above; or if `none` is one of several, or two are of one kind.
        """
        given, names = list(kinds.values()), f"[{', '.join(kinds)}]"
        if NONE in given and len(given) > 1:
            raise ConfigError("tracker", names, "none cannot be one of several")
        if twice := next((k for k in given if given.count(k) > 1), None):
            raise ConfigError("tracker", names, f"two of them are of one kind ({twice}); give one of each kind")
        return cls(kinds=tuple(k for k in given if k != NONE), **settings)  # type: ignore[arg-type]


def _wandb(spec: TrackerSpec, sweep: str, directory: Path) -> Destination:
    return WandbRuns(sweep, directory, spec.project, spec.entity)


def _tensorboard(spec: TrackerSpec, sweep: str, directory: Path) -> Destination:
    return TensorBoardFiles(Path(spec.directory) / sweep if spec.directory else directory / "tensorboard")


KINDS: dict[str, Callable[[TrackerSpec, str, Path], Destination]] = {"wandb": _wandb, "tensorboard": _tensorboard}
"""Kind, which is also the name of the package it needs -> a function that makes the tracker of a sweep."""


class Tracker:
    """Logs the finished cells of a sweep, and a summary at the end, once to each tracker of a `TrackerSpec`.

    Args:
        again: whether to log also what was logged before.

    Attributes:
        failed: label -> error of trackers that failed `PATIENCE` times in a row; they are not used any more.
        logged: number of cells that this object has logged, counted for each tracker.
    """

    def __init__(self, spec: TrackerSpec, sweep: str, directory: Path, *, again: bool = False) -> None:
        self.sweep, self.directory = sweep, directory
        self.failed: dict[str, str] = {}
        self.logged = 0
        self._lost: dict[str, dict[str, str]] = {}
        self._errors_in_a_row: Counter[str] = Counter()
        self._known: Counter[str] = Counter()
        self._drawing_error: str | None = None
        self._destinations = [KINDS[kind](spec, sweep, directory) for kind in spec.kinds]
        self._marks = {to.label: Marks(to.marks) for to in self._destinations if to.marks is not None}
        self._again = again

    def __bool__(self) -> bool:
        """Whether there is a tracker."""
        return bool(self._destinations)

    @property
    def complete(self) -> bool:
        """Whether every tracker logged everything without an error."""
        return not self.failed and not any(self._lost.values())

    @property
    def note(self) -> str | None:
        """A line for each tracker: where the runs are, and how to see or send them; or what failed."""
        notes = [line for to in self._destinations for line in self._notes_of(to)]
        notes += [f"The trackers have no plots: {self._drawing_error}"] if self._drawing_error else []
        return "\n".join(notes) or None

    def _notes_of(self, to: Destination) -> Iterator[str]:
        later = f"results on disk are complete, and `a2sf track {self.directory}` logs what is missing"
        lost = self._lost.get(to.label, {})
        if to.label in self.failed:
            yield f"{to.label} failed ({self.failed[to.label]}); {later}."
            return
        if lost:
            name, why = next(iter(lost.items()))
            yield f"{to.label} failed for {len(lost)} of its runs ({name}: {why}); {later}."
        elif self._known[to.label] and not self.logged:
            yield f"{to.label} has these cells already; `a2sf track {self.directory} --again` logs them again."
        try:
            if note := to.note:
                yield note
        except Exception as error:  # a tracker may raise anything, and never ends a sweep
            yield f"{to.label} failed ({first_line(error)}); {later}."

    def log_cell(self, stored: StoredCell) -> None:
        """Log a cell's columns, and metrics such as `acc/piqa/0shot`, unless they were logged before."""
        digest = digest_of(stored.result.get("checksums") or stored.result)
        for to in self._missing(stored.path.name, digest):
            if self._log(to, stored.path.name, digest, lambda to: to.log_cell(content.of_cell(stored, self.sweep))):
                self.logged += 1

    def log_summary(self, table: pd.DataFrame, draw: Callable[[], Mapping[str, Path]]) -> None:
        """Log the results table of the sweep, and its plots, unless the same table was logged before.

        Args:
            draw: makes the plots; name -> PNG file. Its errors become a note.
        """
        digest = digest_of("" if table is None else table.to_csv(index=False))
        if not (missing := self._missing(SUMMARY, digest)):
            return
        pictures: Mapping[str, Path] = {}
        try:
            pictures = draw()
        except Exception as error:  # drawing never ends a sweep
            self._drawing_error = first_line(error)
            log.debug("no plots for the trackers", exc_info=True)
        for to in missing:
            self._log(to, SUMMARY, digest, lambda to: to.log_summary(content.of_sweep(table, pictures)))

    def _missing(self, name: str, digest: str) -> list[Destination]:
        """The trackers that have not logged this yet."""
        missing = []
        for to in self._destinations:
            marks = None if self._again else self._marks.get(to.label)
            if marks is not None and marks.has(name, digest):
                self._known[to.label] += 1
            elif to.label not in self.failed:
                missing.append(to)
        return missing

    def _log(self, to: Destination, name: str, digest: str, do: Callable[[Destination], None]) -> bool:
        """Whether a tracker logged it without an error."""
        lost = self._lost.setdefault(to.label, {})
        try:
            do(to)
            if to.label in self._marks:
                self._marks[to.label].add(name, digest)
        except Exception as error:  # a tracker may raise anything, and never ends a sweep
            lost[name] = first_line(error)
            self._errors_in_a_row[to.label] += 1
            if self._errors_in_a_row[to.label] >= PATIENCE:
                self.failed[to.label] = lost[name]
            log.debug("%s failed", to.label, exc_info=True)
            return False
        lost.pop(name, None)
        self._errors_in_a_row[to.label] = 0
        return True
