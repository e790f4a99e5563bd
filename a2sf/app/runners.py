"""The runners of this process, one for each way to compute the cells of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from a2sf.sweep.config.settings import Settings
from a2sf.sweep.runner import Runner
from a2sf.tracking.tracker import Tracker

_runners: dict[tuple[Any, ...], Runner] = {}


def directory_of(settings: Settings) -> Path:
    """The directory of a sweep."""
    return Path(settings.runs_dir) / settings.sweep_name


def runner_of(settings: Settings) -> Runner:
    """The runner for cells with these settings; equal settings share one, which keeps its model loaded."""
    directory = directory_of(settings)
    how = settings.batch_size, settings.trace, settings.checkpoint, settings.full_texts
    key = (directory, settings.tracker, *how)
    if key not in _runners:
        tracker = Tracker(settings.tracker, settings.sweep_name, directory)
        _runners[key] = Runner(directory, tracker, *how)
    return _runners[key]


def underway(name: str) -> float | None:
    """The share of the work on a cell that is done, 0 to 1; None if this process is not computing the cell."""
    shares = [r.underway for r in list(_runners.values())]
    return next((s[name] for s in shares if name in s), None)
