"""The third step of a sweep: its groups are computed, here or by a launcher's workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from a2sf.app.check import Points
from a2sf.app.plan import PlannedSweep
from a2sf.app.process import screen
from a2sf.app.runners import runner_of, underway
from a2sf.errors import UserError
from a2sf.sweep.cell import Cell
from a2sf.sweep.config.overrides import quote
from a2sf.sweep.config.settings import as_group
from a2sf.sweep.group import grouped
from a2sf.sweep.planning.progress import Progress, shown

POLL_SECONDS = 2.0

Launch = Callable[[list[list[str]]], list[Any]]
"""Runs one job per list of overrides; each job's return value is a list of `Outcome`, one per cell of a group."""


def compute(planned: PlannedSweep, launch: Launch | None) -> None:
    """Compute every cell that is not done, and show the progress.

    Args:
        launch: how to run jobs; None: in this process, one after the other.
    """
    checked, plan = planned.checked, planned.plan
    if not plan.pending:
        return
    progress = Progress(plan, planned.groups, planned.estimates, checked.directory, underway)
    for cell in (c for c in plan.pending if c.model in planned.broken):
        runner_of(checked.settings[0]).fail(cell, planned.broken[cell.model])
    # one model after the other, so that each is loaded once; of a model the longest groups first
    size = {c.name: e.tokens or 0 for g, e in zip(planned.groups, planned.estimates, strict=True) for c in g}
    todo = sorted(plan.pending, key=lambda c: (c.model_name, -size[c.name], c.task, c.shots))
    with shown(screen, progress):
        _run([c for c in todo if c.model not in planned.broken], planned, launch)


def _run(todo: list[Cell], planned: PlannedSweep, launch: Launch | None) -> None:
    """Compute cells, those of a group together, until each is done, failed, or stored by another process."""
    checked = planned.checked
    settings = {c.name: s for s in checked.settings for c in s.cells}
    points = {c.name: point for s, point in zip(checked.settings, checked.points, strict=True) for c in s.cells}

    def computed_with(cell: Cell) -> tuple[Any, ...]:
        s = settings[cell.name]
        return s.batch_size, s.trace, s.checkpoint, s.full_texts

    while todo:
        groups = grouped(todo, computed_with)
        if launch is None:
            outcomes = [o for g in groups for o in runner_of(settings[g[0].name]).run(g)]
        else:
            jobs = [overrides_of_job([points[c.name] for c in g], g) for g in groups]
            outcomes = [o for done in launch(jobs) for o in done.return_value]
        named = {o.name for o in outcomes}
        for cell in [c for c in todo if c.name not in named]:
            # a worker reads all files itself; it found a cell of another name
            why = "its task's definition, or its policy's file or code, changed after the sweep began; start it again"
            runner_of(settings[cell.name]).fail(cell, UserError(why))
        busy = {o.name for o in outcomes if o.status == "busy"}
        todo = [c for c in todo if c.name in busy]
        if todo:  # another process computes these: wait for its results, or compute them if it ends without
            time.sleep(POLL_SECONDS)


def overrides_of_job(points: Points, cells: Sequence[Cell]) -> list[str]:
    """The overrides of a worker: those of the first cell's point, what the sweep has found out, and the other cells.

    Args:
        points: of each cell.
    """
    (overrides, _), *others = points
    cell = cells[0]
    fixed = {"tasks": f"[{quote(cell.task)}]", "shots": str(cell.shots), "plan_only": "false"}
    fixed |= {"model.name": quote(cell.model_name)}
    if cell.model.source.kind == "hub":  # quoted, since a commit may look like a number
        fixed |= {"model.path": quote(cell.model.path), "model.revision": quote(cell.model.revision)}
    fixed |= {"model.adapter": quote(cell.model.adapter)} if cell.model.adapter else {}
    fixed |= {"model.device": cell.model.device} if cell.model.device != "auto" else {}
    fixed |= {"data.content": quote(cell.data.content)} if cell.data.content else {}
    fixed |= {"task_args": quote(cell.data.task_args) if cell.data.task_args else "null"}
    fixed |= {"group": quote(as_group([composed for _, composed in others], [c.name for c in cells]))}

    def is_fixed(override: str) -> bool:
        key = override.partition("=")[0].lstrip("+")
        return key in fixed or key.startswith("task_args.")

    return [*(o for o in overrides if not is_fixed(o)), *(f"{key}={value}" for key, value in fixed.items())]
