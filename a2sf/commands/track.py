"""`a2sf track runs/<sweep> tracker=wandb`: log a finished sweep to trackers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console

from a2sf.commands.arguments import Parser
from a2sf.errors import UserError, counted
from a2sf.report.output import pictures
from a2sf.shipped import shipped
from a2sf.store.runs import load_sweep, read_groups, table_of
from a2sf.sweep.config import schema
from a2sf.sweep.config.overrides import check_trackers
from a2sf.tracking.tracker import Tracker, TrackerSpec


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="a2sf track",
        description="Log the finished cells of sweeps, and a summary, to trackers, unless they were logged before.",
    )
    p.add_argument(
        "arguments",
        nargs="+",
        metavar="RUN | tracker=...",
        help="sweeps' directories, such as runs/demo, and trackers as a2sf run takes them: "
        "tracker=wandb tracker.project=mine, tracker=[wandb,tensorboard], tracker.directory=boards",
    )
    p.add_argument("--config-dir", type=Path, help="your folder with trackers: DIR/tracker/NAME.yaml")
    p.add_argument("--again", action="store_true", help="log also what was logged before")
    return p


def main(arguments: Sequence[str]) -> None:
    """Log the sweeps in `arguments`.

    Raises:
        UserError: if no sweep or no tracker is named, or a directory holds no sweep.
    """
    args = parser().parse_args(arguments)
    overrides = [a for a in args.arguments if a.partition("=")[0].partition(".")[0] == "tracker"]
    runs = [Path(a) for a in args.arguments if a not in overrides]
    if not runs:
        raise UserError("a2sf track needs the directory of a sweep, such as runs/demo.")
    spec = _spec(overrides, args.config_dir)
    if not spec.kinds:
        raise UserError("a2sf track needs a tracker: give tracker=wandb, tracker=tensorboard or a list of them.")
    failed = False
    for directory in runs:
        failed |= not _track(directory, spec, args.again)
    if failed:
        sys.exit(1)


def _spec(overrides: Sequence[str], folder: Path | None) -> TrackerSpec:
    for override in overrides:
        check_trackers(override)
    schema.register()
    searchpath = [f"hydra.searchpath=[file://{folder.absolute()}]"] if folder else []
    with initialize_config_dir(str(shipped("conf")), version_base="1.3"):
        composed = compose("config", [*overrides, *searchpath])
    return TrackerSpec.chosen(**composed.tracker)


def _track(directory: Path, spec: TrackerSpec, again: bool) -> bool:
    """Log a sweep and print how many cells were logged; True if no tracker failed."""
    console = Console()
    cells = load_sweep(directory)
    tracker = Tracker(spec, directory.absolute().name, directory, again=again)
    for stored in cells:
        tracker.log_cell(stored)
    tracker.log_summary(table_of(cells, read_groups(directory)), lambda: pictures(directory))
    summary = f"{directory}: {counted(len(cells), 'cell')}, {tracker.logged} logged now"
    for line in (summary, *(tracker.note or "").splitlines()):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return tracker.complete
