"""What `a2sf run` does with composed configurations: check, plan, run, report."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from a2sf.errors import Notice, UserError, nearest
from a2sf.shipped import shipped
from a2sf.starting import importing, set_environment

if TYPE_CHECKING:
    from a2sf.store.aggregates import Group
    from a2sf.sweep.cell import Cell
    from a2sf.sweep.config.settings import Settings
    from a2sf.sweep.reuse import Plan
    from a2sf.sweep.runner import Outcome, Runner

POLL_SECONDS = 2.0
screen = Console()
_runners: dict[tuple[Any, ...], Runner] = {}
_added: list[Path] = []

Launch = Callable[[list[list[str]]], list[Any]]
"""Runs one job per list of overrides; each job's return value is a list of `Outcome`, one per cell of a group."""


def guard(main: Callable[[], Any]) -> None:
    """Run the app; a user's mistake is one sentence on standard error and exit code 1, never a traceback."""
    set_environment()
    _show_notices()
    # not by way of SIGINT, which a process that a script started in the background ignores
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _fail(_explain(error))
    except ValueError as error:
        if not str(error).startswith("Config group override"):  # policy=3, which Hydra raises as its own fault
            raise
        groups = [a for a in sys.argv[1:] if (shipped("conf") / a.partition("=")[0].lstrip("+")).is_dir() and "=" in a]
        _fail(
            f"{' '.join(groups) or ' '.join(sys.argv[1:])} is not allowed: a config group is set to one of its names."
        )
    except BrokenPipeError:  # who reads our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nor is what is left told at exit
        sys.exit(141)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename} cannot be read or written ({error.strerror}).")
    except KeyboardInterrupt:
        screen.print("Interrupted; what was computed is kept, and the same command goes on from there.")
        sys.exit(130)


def job(composed: DictConfig) -> Any:
    """Hydra's task function: one group of a sweep's cells, or all that a single configuration asks for."""
    if HydraConfig.get().mode == RunMode.RUN:
        try:
            adopt(HydraConfig.get())
            return run_grid([([], composed)], None)
        except UserError as error:  # told here, since Hydra would put a line of its own before it
            _fail(str(error))
    set_environment()  # of a worker on another machine
    adopt(HydraConfig.get())
    quiet()
    from a2sf.sweep.workers import share_cores, take_gpu

    share_cores(HydraConfig.get().launcher)
    take_gpu(HydraConfig.get().launcher)
    settings = _read(composed)
    return _runner(settings).run(settings.cells, settings.planned)


def adopt(hydra: DictConfig) -> None:
    """Look for models, and for modules of the user's own, in the folders that Hydra was told of, and the current one.

    Every worker does so itself, from the configuration that it gets.

    Raises:
        UserError: if a file there hides one of ours, which Hydra would not say, or text in one is read as a number.
    """
    from a2sf.sweep.config import folder as config_dir

    sources = [s for s in hydra.runtime.config_sources if s.schema in ("file", config_dir.SCHEME)]
    added = [Path(s.path) for s in sources if s.provider != "main"]
    for folder in added:
        config_dir.check(folder)
    if config_dir.used() is None:  # a worker
        config_dir.use(next((Path(s.path) for s in sources if s.schema == config_dir.SCHEME), None))
    _added[:] = added
    for place in map(str, [*added, hydra.runtime.cwd]):
        if place not in sys.path:
            sys.path.append(place)  # last: no file of the user's hides a library's


def run_grid(
    points: Sequence[tuple[list[str], DictConfig]], launch: Launch | None, *, computes_here: bool = True
) -> None:
    """Check every point, print the plan, run what is to do, print the table.

    Args:
        points: the overrides and the composed configuration of each point of the grid.
        launch: how to run jobs; None: here, one after the other.
        computes_here: whether jobs see this machine's GPUs.

    Raises:
        UserError: for the first value that is not allowed, before anything slow.
    """
    from a2sf.sweep.config import keys

    for _, composed in points:
        keys.check(composed)
    quiet()
    from a2sf.sweep.config.grid import check_schedules
    from a2sf.sweep.config.settings import refuse_idle

    check_schedules([composed for _, composed in points])
    settings = [_read(composed, computes_here) for _, composed in points]
    refuse_idle(settings)
    first = settings[0]
    directory = Path(first.runs_dir) / first.sweep_name
    if any(
        (s.sweep_name, s.runs_dir, s.tracker) != (first.sweep_name, first.runs_dir, first.tracker) for s in settings
    ):
        raise UserError(
            "sweep_name, runs_dir and tracker name where a sweep's results go, so they cannot be swept; several trackers "
            "are a list, tracker=[wandb,tensorboard]"
        )

    from a2sf.store.runs import write_groups
    from a2sf.sweep.group import grouped
    from a2sf.sweep.planning.estimate import estimate
    from a2sf.sweep.planning.progress import Progress, shown
    from a2sf.sweep.planning.table import headline, plan_table
    from a2sf.sweep.prepare import documents, models, texts
    from a2sf.sweep.reuse import plan
    from a2sf.tasks import spec as tasks

    for rule in dict.fromkeys(c.stopping_rule for s in settings for c in s.cells if c.stopping_rule):
        rule.check([c.policy.name for s in settings for c in s.cells if c.stopping_rule == rule])
    documents.check(c for s in settings for c in s.cells)
    settings, unreadable = models.readable(settings, screen)
    models.check_prompting((c for s in settings for c in s.cells), hub=False)
    settings = models.tell_apart(models.pin_all(settings, _model_names(), screen))
    settled = documents.settle([s.cells for s in settings], planned_only=first.plan_only)
    settled.refused.update(unreadable)
    settings = [dataclasses.replace(s, cells=cells) for s, cells in zip(settings, settled.cells, strict=True)]
    made = plan([c for s in settings for c in s.cells], directory)
    hidden = [
        note for include in dict.fromkeys(s.include for s in settings if s.include) for note in tasks.hidden(*include)
    ]
    for note in [*dict.fromkeys(hidden), *settled.notes, *made.notes]:
        screen.print(note, highlight=False, soft_wrap=True)
    groups = grouped(made.pending)
    estimates = estimate(groups, directory.parent, trial=computes_here)
    screen.print(headline(made, groups, estimates, directory), highlight=False, soft_wrap=True)
    if groups:
        screen.print(plan_table(groups, estimates))
    if first.plan_only:
        return
    scored = list(dict.fromkeys(g for s in settings for g in s.groups))
    write_groups(directory, scored)
    broken = models.fetch([c.model for c in made.pending], screen)
    models.check_prompting((c for c in made.pending if c.model not in broken), hub=True)
    made = dataclasses.replace(made, cells=documents.fetch(made.cells, made.pending, settled.refused, screen))
    for note in texts.note_texts(made.cells, made.done, directory):
        screen.print(note, highlight=False, soft_wrap=True)

    if made.pending:
        runner = _runner(first)
        progress = Progress(made, groups, estimates, directory, _underway)
        for cell in (c for c in made.pending if c.model in broken):
            runner.fail(cell, broken[cell.model])
        with shown(screen, progress):
            # one model after the other, so that each is loaded once, and what takes longest first
            size = {c.name: e.tokens or 0 for g, e in zip(groups, estimates, strict=True) for c in g}
            todo = sorted(made.pending, key=lambda c: (c.model_name, -size[c.name], c.task, c.shots))
            _run([c for c in todo if c.model not in broken], settings, points, launch)
    _report(made, directory, settings[0], settled.refused, scored)


def _run(
    todo: list[Cell],
    settings: Sequence[Settings],
    points: Sequence[tuple[list[str], DictConfig]],
    launch: Launch | None,
) -> list[Outcome]:
    from a2sf.sweep.group import grouped

    of = {c.name: (s, point) for s, point in zip(settings, points, strict=True) for c in s.cells}

    def apart(cell: Cell) -> tuple[Any, ...]:
        asked = of[cell.name][0]
        return asked.batch_size, asked.trace, asked.checkpoint

    finished: list[Outcome] = []
    while todo:
        groups = grouped(todo, apart)
        if launch is None:
            outcomes = [o for g in groups for o in _runner(of[g[0].name][0]).run(g)]
        else:
            jobs = [_job([of[c.name][1] for c in g], g) for g in groups]
            outcomes = [o for done in launch(jobs) for o in done.return_value]
        named = {o.name for o in outcomes}
        for cell in [c for c in todo if c.name not in named]:  # a worker reads all files anew, and found another cell
            why = "its task's definition, or its policy's file or code, changed after the sweep began; start it again"
            outcomes.append(_runner(of[cell.name][0]).fail(cell, UserError(why)))
        finished += [o for o in outcomes if o.status != "busy"]
        busy = {o.name for o in outcomes if o.status == "busy"}
        todo = [c for c in todo if c.name in busy]
        if todo:  # another process computes these: wait for it, or take over if it dies
            time.sleep(POLL_SECONDS)
    return finished


def _job(points: Sequence[tuple[list[str], DictConfig]], cells: Sequence[Cell]) -> list[str]:
    """A worker's overrides: those of the first cell's point, what was settled since, and the group's other cells."""
    from a2sf.sweep.config.overrides import quote
    from a2sf.sweep.config.settings import as_group

    (overrides, _), *others = points
    cell = cells[0]
    settled = {"tasks": f"[{quote(cell.task)}]", "shots": str(cell.shots), "plan_only": "false"}
    settled |= {"model.name": quote(cell.model_name)}
    if cell.model.source.kind == "hub":  # quoted, since a commit may look like a number
        settled |= {"model.path": quote(cell.model.path), "model.revision": quote(cell.model.revision)}
    settled |= {"model.adapter": quote(cell.model.adapter)} if cell.model.adapter else {}
    settled |= {"model.device": cell.model.device} if cell.model.device != "auto" else {}
    settled |= {"data.content": quote(cell.data.content)} if cell.data.content else {}
    settled |= {"task_args": quote(cell.data.task_args) if cell.data.task_args else "null"}
    settled |= {"group": quote(as_group([composed for _, composed in others], [c.name for c in cells]))}

    def told(override: str) -> bool:
        key = override.partition("=")[0].lstrip("+")
        return key in settled or key.startswith("task_args.")

    left = [o for o in overrides if not told(o)]
    return [*left, *(f"{key}={value}" for key, value in settled.items())]


def _read(composed: DictConfig, computes_here: bool = True) -> Settings:
    from a2sf.sweep.config.settings import read

    return read(composed, _model_names(), here=computes_here)


def _runner(settings: Settings) -> Runner:
    from a2sf.sweep.runner import Runner
    from a2sf.tracking.tracker import Tracker

    directory = Path(settings.runs_dir) / settings.sweep_name
    key = (directory, settings.tracker, settings.batch_size, settings.trace, settings.checkpoint)
    if key not in _runners:
        tracker = Tracker(settings.tracker, settings.sweep_name, directory)
        _runners[key] = Runner(directory, tracker, settings.batch_size, settings.trace, settings.checkpoint)
    return _runners[key]


def _model_names() -> dict[str, str]:
    """Path -> name of the models under conf/model/ and in the user's own folders, whose names win."""
    return {path: name for folder in [shipped("conf"), *reversed(_added)] for path, name in _names_in(folder / "model")}


@cache
def _names_in(folder: Path) -> list[tuple[str, str]]:
    known = {f.stem: yaml.safe_load(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("*.yaml"))}
    return [(model["path"], name) for name, model in known.items() if isinstance(model, dict) and model.get("path")]


def _underway(name: str) -> float | None:
    """How much of the work on a cell is done, where this process is at it."""
    return next((r.underway[name] for r in list(_runners.values()) if name in r.underway), None)


def _report(
    made: Plan,
    directory: Path,
    settings: Settings,
    refused: dict[str, list[str]],
    groups: list[Group],
) -> None:
    from a2sf.report.tables.screen import screen_table
    from a2sf.store.notes import notes_of
    from a2sf.store.runs import table_of
    from a2sf.sweep.runner import finish, hardly_pruned

    stored, failures = finish(directory, made.cells)
    if stored:
        screen.print(screen_table(stored, groups))
        screen.print(_written(directory, len(stored)), highlight=False, soft_wrap=True)
        for note in filter(None, [hardly_pruned(stored), *notes_of(stored)]):
            screen.print(note, highlight=False, markup=False, soft_wrap=True)
    tracker = _runner(settings).tracker
    if stored and tracker:
        for cell in stored:  # whoever computed it
            tracker.log_cell(cell)
        tracker.log_summary(table_of(stored, groups), lambda: _pictures(directory))
        screen.print(tracker.note or "", highlight=False, markup=False, soft_wrap=True)
    if failures:
        screen.print(
            f"[bold red]{len(failures)} of {len(made.cells)} cells failed[/bold red]; the same command retries"
        )
        alike: dict[str, list[str]] = {}
        for failure in failures:
            alike.setdefault(failure["error"], []).append(failure["cell"]["name"])
        for error, names in alike.items():  # a model that cannot be loaded fails all its cells
            which = names[0] if len(names) == 1 else f"{len(names)} cells, {names[0]} the first"
            screen.print(f"  {which}: {error}", highlight=False, markup=False, soft_wrap=True)
    for told, names in refused.items():
        several = f"{len(names)} cells were" if len(names) > 1 else "1 cell was"
        screen.print(f"[bold red]{several} not run[/bold red]: {escape(told)}", highlight=False, soft_wrap=True)
    if stored:
        screen.print(f"Next: a2sf tables {directory}   (tables, plots, report.html)", highlight=False, soft_wrap=True)
    if failures or refused:
        sys.exit(1)


def _written(directory: Path, cells: int) -> str:
    """How much `results.csv` holds: the results of this command's `cells` cells and of the sweep's earlier ones."""
    import pandas as pd

    file = directory / "results.csv"
    of_cell = pd.read_csv(file, usecols=["cell"])["cell"]
    total = of_cell.nunique()
    ours = "" if total == cells else f", {cells} of them of this command"
    return f"{len(of_cell)} results (one per metric) of {total} cells in {file}{ours}"


def _pictures(directory: Path) -> dict[str, Path]:
    from a2sf.report.output import pictures  # which takes a second to import

    return pictures(directory)


def quiet() -> None:
    """Libraries keep to themselves; what the user needs to know, we say, warnings about a cell's numbers with its result."""
    import logging

    warnings.filterwarnings("ignore")
    _show_notices()
    for name in ("lm_eval", "transformers", "datasets", "wandb", "httpx", "accelerate", "huggingface_hub", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _import_libraries()
    import datasets
    import huggingface_hub
    import transformers

    huggingface_hub.utils.disable_progress_bars()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@cache
def _import_libraries() -> None:
    """Once, since what is there by then counts as needed until the process ends."""
    with importing():
        import datasets  # noqa: F401
        import transformers.modeling_utils  # noqa: F401

        from a2sf.sweep import runner  # noqa: F401
        from a2sf.sweep.config import settings  # noqa: F401


def _show_notices() -> None:
    warnings.filterwarnings("default", category=Notice)
    warnings.showwarning = _show


def _show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """A warning as a sentence, without the line of code that it was raised in."""
    sys.stderr.write(f"{message}\n")


def _explain(error: Exception) -> str:
    from a2sf.sweep.config.keys import explain
    from a2sf.sweep.config.overrides import explain_override

    if isinstance(error, HydraException) and (told := explain_override(error)):
        return told
    if isinstance(error, MissingConfigException) and (asked := re.match(r"In 'hydra/launcher/(\w+)'", str(error))):
        told = (shipped("conf") / "hydra/launcher" / f"{asked[1]}.yaml").read_text(
            encoding="utf-8"
        )  # which says how to install it
        extra = re.search(r"pip install \"a2sf\[\w+\]\"", told)
        return f"hydra/launcher={asked[1]} is not installed: {extra[0] if extra else error}."
    if isinstance(error, MissingConfigException):
        group, _, value = str(error.missing_cfg_file).rpartition("/")
        # of a list, tracker=[a,b], Hydra does not say what there is
        options = sorted(error.options or [f.stem for f in (shipped("conf") / group).glob("*.yaml") if group])
        if options:
            return f"{group}={value} is not allowed: give one of {', '.join(options)}{nearest(value, options)}."
    cause = error
    while cause.__cause__ is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__  # type: ignore[assignment]
    return explain(cause if isinstance(cause, OmegaConfBaseException) else error)


def _fail(sentence: str) -> None:
    Console(stderr=True).print(sentence, highlight=False, markup=False, soft_wrap=True)
    sys.exit(1)
