"""What `scripts/evaluate.py` does with composed configurations: check, plan, run, report."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from a2sf.errors import UserError, nearest

if TYPE_CHECKING:
    from a2sf.experiments.cell import Cell
    from a2sf.experiments.config import Settings
    from a2sf.experiments.sweep import Outcome, Plan, Runner

CONF = Path(__file__).parents[1] / "conf"
LISTED = 20
POLL_SECONDS = 2.0
screen = Console()
_runners: dict[tuple[Any, ...], Runner] = {}

Launch = Callable[[list[list[str]]], list[Any]]
"""Runs one job per list of overrides; each job's return value is an `Outcome`."""


def guard(main: Callable[[], Any]) -> None:
    """Run the app; a user's mistake is one sentence on standard error and exit code 1, never a traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that Hydra raises what we explain
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # workers that a launcher starts must find the sweeper, too
    scripts = str(Path(sys.argv[0]).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [scripts, os.environ.get("PYTHONPATH")]))
    # not by way of SIGINT, which a process that a script started in the background ignores
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if any(a.startswith("+sweep=") for a in sys.argv) and not {"-m", "--multirun"} & set(sys.argv):
        sys.argv.append("--multirun")  # a preset is a grid
    try:
        from a2sf.experiments.config import register

        register()
        main()
    except UserError as error:
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _fail(_explain(error))
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename} cannot be read or written ({error.strerror}).")
    except KeyboardInterrupt:
        screen.print("Interrupted; finished cells are kept, and the same command goes on from there.")
        sys.exit(130)


def job(composed: DictConfig) -> Any:
    """Hydra's task function: one cell of a sweep, or all that a single configuration asks for."""
    if HydraConfig.get().mode == RunMode.RUN:
        try:
            return run_grid([([], composed)], None)
        except UserError as error:  # told here, since Hydra would put a line of its own before it
            _fail(str(error))
    quiet()
    _share_cores()
    settings = _read(composed)
    (cell,) = settings.cells
    return _runner(settings).run(cell)


def run_grid(points: Sequence[tuple[list[str], DictConfig]], launch: Launch | None) -> None:
    """Check every point, print the plan, run what is to do, print the table.

    Args:
        points: the overrides and the composed configuration of each point of the grid.
        launch: how to run jobs; None: here, one after the other.

    Raises:
        UserError: for the first value that is not allowed, before anything slow.
    """
    quiet()
    settings = [_read(composed) for _, composed in points]
    first = settings[0]
    directory = Path(first.runs_dir) / first.sweep_name
    if any(
        (s.sweep_name, s.runs_dir, s.tracker) != (first.sweep_name, first.runs_dir, first.tracker) for s in settings
    ):
        raise UserError("sweep_name, runs_dir and tracker name where a sweep's results go, so they cannot be swept")

    from a2sf.evaluation import tasks
    from a2sf.experiments import fetching, sweep

    settings = fetching.pin_models(settings, _model_names(), screen)
    made = sweep.plan([c for s in settings for c in s.cells], directory)
    for note in made.notes:
        screen.print(note)
    _print_plan(made, sweep.estimate_seconds(made.pending, directory.parent), directory)
    for spec, shots, task in sorted({(c.data, c.shots, c.task) for c in made.cells}, key=str):
        tasks.check(task, spec, shots)
    if first.plan_only:
        return
    broken = fetching.prepare_models([c.model for c in made.pending], screen)
    for task, spec, shots, seed in sorted({(c.task, c.data, c.shots, c.seed) for c in made.pending}, key=str):
        tasks.build(task, spec, shots=shots, seed=seed)  # now, so that a missing one is told before the model loads

    outcomes: list[Outcome] = []
    if made.pending:
        runner = _runner(first)
        outcomes = [runner.fail(c, broken[c.model]) for c in made.pending if c.model in broken]
        with _progress(made, directory):
            outcomes += _run([c for c in made.pending if c.model not in broken], settings, points, launch)
    _report(made, directory, settings[0], outcomes)


def _run(
    todo: list[Cell],
    settings: Sequence[Settings],
    points: Sequence[tuple[list[str], DictConfig]],
    launch: Launch | None,
) -> list[Outcome]:
    of = {c.name: (s, overrides, c) for s, (overrides, _) in zip(settings, points, strict=True) for c in s.cells}
    # one model after the other, so that each is loaded once
    todo = sorted(todo, key=lambda c: (c.model_name, c.task, c.shots))
    finished: list[Outcome] = []
    while todo:
        if launch is None:
            outcomes = [_runner(of[c.name][0]).run(c) for c in todo]
        else:
            outcomes = [r.return_value for r in launch([_job(of[c.name][1], c) for c in todo])]
        finished += [o for o in outcomes if o.status != "busy"]
        busy = {o.name for o in outcomes if o.status == "busy"}
        todo = [c for c in todo if c.name in busy]
        if todo:  # another process computes these: wait for it, or take over if it dies
            time.sleep(POLL_SECONDS)
    return finished


def _job(overrides: list[str], cell: Cell) -> list[str]:
    """A worker's overrides: those of the grid's point, and what was settled about this one cell since."""
    settled = {"tasks": f"[{cell.task}]", "plan_only": "false"}
    if cell.model.source.kind == "hub":  # quoted, since a commit may look like a number
        path = cell.model.path.replace("'", "\\'")
        settled |= {"model.path": f"'{path}'", "model.revision": f"'{cell.model.revision}'"}
    others = [o for o in overrides if o.partition("=")[0].lstrip("+") not in settled]
    return [*others, *(f"{key}={value}" for key, value in settled.items())]


def _read(composed: DictConfig) -> Settings:
    from a2sf.experiments.config import read

    return read(composed, _model_names())


def _runner(settings: Settings) -> Runner:
    from a2sf.experiments.sweep import Runner
    from a2sf.experiments.tracking import Tracker

    directory = Path(settings.runs_dir) / settings.sweep_name
    key = (directory, settings.tracker, settings.batch_size, settings.trace)
    if key not in _runners:
        tracker = Tracker(settings.tracker, settings.sweep_name, directory)
        _runners[key] = Runner(directory, tracker, settings.batch_size, settings.trace)
    return _runners[key]


@cache
def _model_names() -> dict[str, str]:
    """Path -> name of the models under conf/model/."""
    known = {f.stem: yaml.safe_load(f.read_text()).get("path") for f in sorted((CONF / "model").glob("*.yaml"))}
    return {path: name for name, path in known.items() if path}


def _print_plan(made: Plan, estimate: tuple[float, int], directory: Path) -> None:
    pending, (seconds, known) = made.pending, estimate
    some = "" if known == len(pending) else f"; {len(pending) - known} of them are not like any that was measured"
    about = f", about {_duration(seconds)} at the speed measured here{some}" if known else ""
    screen.print(
        f"[bold]{directory}[/bold]: {len(made.cells)} cells, {len(made.done)} done, {len(pending)} to run{about}",
        highlight=False,
    )
    for cell in pending[:LISTED]:
        screen.print(f"  {cell.name}", highlight=False, style="dim", soft_wrap=True)
    if len(pending) > LISTED:
        screen.print(f"  … and {len(pending) - LISTED} more", style="dim")


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


@contextmanager
def _progress(made: Plan, directory: Path) -> Iterator[None]:
    """A bar that follows the finished cells on disk, whoever computes them."""
    from a2sf.experiments.fetching import bar
    from a2sf.experiments.runs import is_cell
    from a2sf.experiments.sweep import failure_file

    started = time.time()

    def finished() -> int:
        def failed(name: str) -> bool:
            file = failure_file(directory, name)
            return file.exists() and file.stat().st_mtime >= started

        return len(made.done) + sum(is_cell(directory / c.name) or failed(c.name) for c in made.pending)

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()]
    with bar(screen, columns, "cells", len(made.cells), finished):
        yield


def _report(made: Plan, directory: Path, settings: Settings, outcomes: list[Outcome]) -> None:
    from a2sf.experiments.runs import results_frame
    from a2sf.experiments.sweep import finish
    from a2sf.report.tables import screen_table

    stored, failures = finish(directory, made.cells)
    if stored:
        screen.print(screen_table(stored))
        screen.print(f"{len(stored)} cells in {directory}/results.csv", highlight=False)
    tracker = _runner(settings).tracker
    if outcomes and stored:
        pictures = {p.stem: p for p in sorted((directory / "plots").glob("*.png"))}
        tracker.log_summary(results_frame(stored), pictures)
    if tracker.note and outcomes:
        screen.print(tracker.note, highlight=False, soft_wrap=True)
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
        sys.exit(1)


def quiet() -> None:
    """Libraries keep to themselves; what the user needs to know, we say."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("lm_eval", "transformers", "datasets", "wandb", "httpx", "accelerate", "huggingface_hub", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import huggingface_hub
    import transformers

    huggingface_hub.utils.disable_progress_bars()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _share_cores() -> None:
    """Workers side by side on one machine share its cores instead of each taking all."""
    launcher = HydraConfig.get().launcher
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = launcher.get("n_jobs") or 1
    per_worker = cores // (cores if workers < 0 else workers)  # joblib
    per_worker = launcher.get("cpus_per_task") or per_worker  # submitit
    per_worker = OmegaConf.select(launcher, "ray.remote.num_cpus") or per_worker  # ray
    if per_worker < cores:
        import torch

        torch.set_num_threads(max(1, int(per_worker)))


def _explain(error: Exception) -> str:
    from a2sf.experiments.config import explain

    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, value = str(error.missing_cfg_file).rpartition("/")
        options = sorted(error.options)
        return f"{group}={value} is not allowed: give one of {', '.join(options)}{nearest(value, options)}."
    cause = error
    while cause.__cause__ is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__  # type: ignore[assignment]
    return explain(cause if isinstance(cause, OmegaConfBaseException) else error)


def _fail(sentence: str) -> None:
    Console(stderr=True).print(sentence, highlight=False, markup=False, soft_wrap=True)
    sys.exit(1)
