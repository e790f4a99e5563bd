"""Cells of a small random model and a task of one's own, and what computes them."""

from __future__ import annotations

from pathlib import Path

from a2sf.hf.loading import ModelSpec
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policies
from a2sf.sweep.cell import Cell
from a2sf.sweep.runner import Runner
from a2sf.tasks.prompting import Prompting
from a2sf.tasks.spec import DataSpec
from a2sf.tracking.tracker import Tracker, TrackerSpec


def cell(model: str, task: str, policy: str = "h2o", limit: int | None = None, **prompting) -> Cell:
    """At half of the tokens; `model` is a folder, `task` a definition's file."""
    chosen = find_policies()[policy]()
    budget = Budget(ratio=0.5) if chosen.uses_budget else None
    spec = ModelSpec(model, device="cpu")
    return Cell("small", spec, chosen, budget, task, 0, limit, 1234, DataSpec(), prompting=Prompting(**prompting))


def runner(folder: Path, batch_size: int = 5) -> Runner:
    return Runner(folder / "s", Tracker(TrackerSpec(), "s", folder / "s"), batch_size=batch_size)
