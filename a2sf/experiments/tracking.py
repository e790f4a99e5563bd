"""Logging cells besides the disk, to one tracker or several; a tracker that fails never costs a result."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from a2sf.errors import ConfigError, nearest
from a2sf.experiments.runs import StoredCell
from a2sf.experiments.trackers import content
from a2sf.experiments.trackers.content import Destination
from a2sf.experiments.trackers.tensorboard_files import TensorBoardFiles
from a2sf.experiments.trackers.wandb_runs import WandbRuns

log = logging.getLogger(__name__)
NONE = "none"


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
    """Logs finished cells of one sweep, and a summary at the end, to every tracker of a `TrackerSpec`.

    Attributes:
        failed: label -> why, of trackers that failed; they are left alone from then on, the others go on.
    """

    def __init__(self, spec: TrackerSpec, sweep: str, directory: Path) -> None:
        self.sweep = sweep
        self.failed: dict[str, str] = {}
        self._undrawn: str | None = None
        self._destinations = [KINDS[kind](spec, sweep, directory) for kind in spec.kinds]

    def __bool__(self) -> bool:
        """Whether anything is logged anywhere."""
        return bool(self._destinations)

    @property
    def note(self) -> str | None:
        """For the screen, a line for each: where the runs went, and how to see or send them; or what failed."""
        notes = [f"{label} failed ({why}); results on disk are complete." for label, why in self.failed.items()]
        self._each(lambda to: notes.append(to.note) if to.note else None)
        notes += [f"The trackers have no plots: {self._undrawn}"] if self._undrawn else []
        return "\n".join(notes) or None

    def log_cell(self, stored: StoredCell) -> None:
        """A cell's columns, and metrics such as `acc/piqa/0shot`."""
        self._each(lambda to: to.log_cell(content.of_cell(stored, self.sweep)))

    def log_summary(self, table: pd.DataFrame, draw: Callable[[], Mapping[str, Path]]) -> None:
        """The results table of the sweep, and its plots.

        Args:
            draw: makes the plots; name -> PNG. What it raises is a note.
        """
        if not self:
            return
        pictures: Mapping[str, Path] = {}
        try:
            pictures = draw()
        except Exception as error:
            self._undrawn = _first_line(error)
            log.debug("no plots for the trackers", exc_info=True)
        self._each(lambda to: to.log_summary(content.of_sweep(table, pictures)))

    def _each(self, do: Callable[[Destination], None]) -> None:
        for to in self._destinations:
            if to.label not in self.failed:
                try:
                    do(to)
                except Exception as error:
                    self.failed[to.label] = _first_line(error)
                    log.debug("%s failed", to.label, exc_info=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
