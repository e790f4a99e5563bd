"""What `a2sf run` does with composed configurations: check, plan, run, report; and the jobs that compute groups."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from a2sf.app import process
from a2sf.app.folders import adopt, model_names
from a2sf.errors import ConfigError, UserError
from a2sf.starting import set_environment

if TYPE_CHECKING:
    from a2sf.app.check import Points
    from a2sf.app.compute import Launch
    from a2sf.sweep.runner import Outcome


def run_grid(points: Points, launch: Launch | None, *, computes_here: bool = True) -> None:
    """Run a sweep.

    Args:
        points: the overrides and the composed configuration of each point of the grid.
        launch: how to run jobs; None: in this process, one after the other.
        computes_here: whether jobs use this machine's GPUs.

    Raises:
        UserError: for the first value that is not allowed, before anything slow.
    """
    from a2sf.sweep.config import keys

    for _, composed in points:
        keys.check(composed)
    process.quiet()  # it takes seconds, which a mistyped key need not wait for
    from a2sf.app.check import check
    from a2sf.app.compute import compute
    from a2sf.app.outcome import report
    from a2sf.app.plan import fetch, make_plan

    checked = check(points, computes_here)
    planned = make_plan(checked, computes_here)
    if checked.settings[0].plan_only:
        return
    check_folder(checked.settings[0].runs_dir, checked.directory)
    process.saves_in(checked.directory)
    fetched = fetch(planned)
    compute(fetched, launch)
    report(fetched)


def check_folder(runs_dir: str, directory: Path) -> None:
    """Refuse a folder in which results could not be stored.

    Raises:
        ConfigError: naming the key.
    """
    from a2sf.store.runs import DiskError
    from a2sf.sweep.runner import check_disk

    try:
        check_disk(directory)
    except DiskError as error:
        raise ConfigError("runs_dir", runs_dir, str(error)) from error


def run_single(composed: DictConfig) -> None:
    """Run the sweep of a single configuration, which Hydra's command without `--multirun` composes.

    The command ends with a message if the user has to correct something.
    """
    try:
        adopt(HydraConfig.get())
        run_grid([(list(HydraConfig.get().overrides.task), composed)], None)
    except UserError as error:  # Hydra would print a line of its own before it
        process.fail(str(error))


def run_job(composed: DictConfig) -> list[Outcome]:
    """Compute the cells of one group of a grid: a job of Hydra's launcher, perhaps on another machine.

    Returns:
        What became of each cell.

    Raises:
        UserError: if a value is not allowed.
    """
    hydra = HydraConfig.get()
    set_environment()  # it may be another machine's
    adopt(hydra)
    process.quiet()
    from a2sf.app.runners import runner_of
    from a2sf.sweep.config.settings import read
    from a2sf.sweep.workers import share_cores, take_gpu

    share_cores(hydra.launcher)
    take_gpu(hydra.launcher)
    settings = read(composed, model_names())
    return runner_of(settings).run(settings.cells, settings.planned)
