"""Logging cells besides the disk, to one tracker or several; a tracker that fails never costs a result."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from a2sf.errors import ConfigError, nearest
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
"""Runs in a row that a tracker may refuse; one may have a reason of its own, such as that it was deleted there."""


@dataclass(frozen=True)
class TrackerSpec:
    """Where results are logged besides the disk.

    Attributes:
        kinds: of the trackers, each in `KINDS`.
        project, entity: as W&B names them.
        directory: where TensorBoard's files go, in a folder for each sweep; None: `tensorboard/` in the sweep's own.

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
                told = f"give one of {', '.join((NONE, *KINDS))}, or a list of them{nearest(kind, KINDS)}"
                raise ConfigError("tracker", kind, told)
            if self.kinds.count(kind) > 1:
                raise ConfigError(
                    "tracker", f"[{', '.join(self.kinds)}]", f"it holds {kind} twice; give each kind once"
                )
            if importlib.util.find_spec(kind) is None:
                raise ConfigError("tracker", kind, f'{kind} is not installed; pip install "a2sf[{kind}]"')

    @classmethod
    def chosen(cls, kinds: Mapping[str, str], **settings: str | None) -> TrackerSpec:
        """What the chosen files of `conf/tracker/` come to: `kinds` says of each, by its name, what it is.

        Raises:
            ConfigError: as above; or if `none` stands beside others, or two are of one kind.
        """
        among, names = list(kinds.values()), f"[{', '.join(kinds)}]"
        if NONE in among and len(among) > 1:
            raise ConfigError("tracker", names, "none goes with no other")
        if twice := next((k for k in among if among.count(k) > 1), None):
            raise ConfigError("tracker", names, f"two of them are of one kind ({twice}); give one of each kind")
        return cls(kinds=tuple(k for k in among if k != NONE), **settings)  # type: ignore[arg-type]


def _wandb(spec: TrackerSpec, sweep: str, directory: Path) -> Destination:
    return WandbRuns(sweep, directory, spec.project, spec.entity)


def _tensorboard(spec: TrackerSpec, sweep: str, directory: Path) -> Destination:
    return TensorBoardFiles(Path(spec.directory) / sweep if spec.directory else directory / "tensorboard")


KINDS: dict[str, Callable[[TrackerSpec, str, Path], Destination]] = {"wandb": _wandb, "tensorboard": _tensorboard}
"""Kind, which is also the package it needs -> what makes one for a sweep in its directory."""


class Tracker:
    """Logs finished cells of one sweep, and a summary at the end, to every tracker of a `TrackerSpec`, each once.

    Args:
        again: log also what was logged before.

    Attributes:
        failed: label -> why, of trackers that failed `PATIENCE` times in a row; they are left alone from then on, the
            others go on.
        logged: how many cells were logged by this object, each once for every tracker.
    """

    def __init__(self, spec: TrackerSpec, sweep: str, directory: Path, *, again: bool = False) -> None:
        self.sweep, self.directory = sweep, directory
        self.failed: dict[str, str] = {}
        self.logged = 0
        self._lost: dict[str, dict[str, str]] = {}
        self._in_a_row: Counter[str] = Counter()
        self._known: Counter[str] = Counter()
        self._undrawn: str | None = None
        self._destinations = [KINDS[kind](spec, sweep, directory) for kind in spec.kinds]
        self._marks = {to.label: Marks(to.marks) for to in self._destinations if to.marks is not None}
        self._again = again

    def __bool__(self) -> bool:
        """Whether anything is logged anywhere."""
        return bool(self._destinations)

    @property
    def complete(self) -> bool:
        """Whether every tracker took all that it was given."""
        return not self.failed and not any(self._lost.values())

    @property
    def note(self) -> str | None:
        """For the screen, a line for each: where the runs went, and how to see or send them; or what failed."""
        notes = [line for to in self._destinations for line in self._notes_of(to)]
        notes += [f"The trackers have no plots: {self._undrawn}"] if self._undrawn else []
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
            yield f"{to.label} has these cells already; `a2sf track {self.directory} --again` logs them anew."
        try:
            if told := to.note:
                yield told
        except Exception as error:
            yield f"{to.label} failed ({_first_line(error)}); {later}."

    def log_cell(self, stored: StoredCell) -> None:
        """A cell's columns, and metrics such as `acc/piqa/0shot`; nothing where they were logged before."""
        digest = digest_of(stored.result.get("checksums") or stored.result)
        for to in self._missing(stored.path.name, digest):
            if self._give(to, stored.path.name, digest, lambda to: to.log_cell(content.of_cell(stored, self.sweep))):
                self.logged += 1

    def log_summary(self, table: pd.DataFrame, draw: Callable[[], Mapping[str, Path]]) -> None:
        """The results table of the sweep, and its plots; nothing where the same table was logged before.

        Args:
            draw: makes the plots; name -> PNG. What it raises is a note.
        """
        digest = digest_of("" if table is None else table.to_csv(index=False))
        if not (missing := self._missing(SUMMARY, digest)):
            return
        pictures: Mapping[str, Path] = {}
        try:
            pictures = draw()
        except Exception as error:
            self._undrawn = _first_line(error)
            log.debug("no plots for the trackers", exc_info=True)
        for to in missing:
            self._give(to, SUMMARY, digest, lambda to: to.log_summary(content.of_sweep(table, pictures)))

    def _missing(self, name: str, digest: str) -> list[Destination]:
        """The trackers that were not given this yet."""
        missing = []
        for to in self._destinations:
            marks = None if self._again else self._marks.get(to.label)
            if marks is not None and marks.has(name, digest):
                self._known[to.label] += 1
            elif to.label not in self.failed:
                missing.append(to)
        return missing

    def _give(self, to: Destination, name: str, digest: str, do: Callable[[Destination], None]) -> bool:
        """Whether a tracker took it."""
        lost = self._lost.setdefault(to.label, {})
        try:
            do(to)
            if to.label in self._marks:
                self._marks[to.label].add(name, digest)
        except Exception as error:
            lost[name] = _first_line(error)
            self._in_a_row[to.label] += 1
            if self._in_a_row[to.label] >= PATIENCE:
                self.failed[to.label] = lost[name]
            log.debug("%s failed", to.label, exc_info=True)
            return False
        lost.pop(name, None)
        self._in_a_row[to.label] = 0
        return True


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
