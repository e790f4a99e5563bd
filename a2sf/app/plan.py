"""The second step of a sweep: which of its cells are to be computed, in which groups, and how long that takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from a2sf.app.check import Checked
from a2sf.app.power import power_of
from a2sf.app.process import screen
from a2sf.errors import UserError, counted
from a2sf.hf.loading import ModelSpec
from a2sf.store.runs import StoredCell, write_groups
from a2sf.sweep.cell import Cell
from a2sf.sweep.config.settings import Settings
from a2sf.sweep.full_texts import COLUMNS
from a2sf.sweep.group import grouped
from a2sf.sweep.planning.estimate import WorkEstimate, estimate, measurements_for
from a2sf.sweep.planning.table import headline, plan_table, schedules_note
from a2sf.sweep.prepare import documents, models, texts
from a2sf.sweep.reuse import SweepPlan, plan


@dataclass(frozen=True)
class PlannedSweep:
    """A sweep that can start.

    Attributes:
        plan: its cells, and which of them are done.
        groups: cells that are computed together, as they were planned.
        estimates: tokens and time of each group.
        broken: models that could not be downloaded, and why; filled by `fetch`.
    """

    checked: Checked
    plan: SweepPlan
    groups: Sequence[Sequence[Cell]]
    estimates: Sequence[WorkEstimate]
    broken: dict[ModelSpec, UserError] = dataclasses.field(default_factory=dict)


def make_plan(checked: Checked, computes_here: bool) -> PlannedSweep:
    """Plan a sweep and print the plan.

    Args:
        computes_here: whether this machine computes the cells, so that a trial of its speed gives an estimate.
    """
    made = plan(checked.cells, checked.directory)
    for note in [*checked.notes, *made.notes, *without_effect(made, checked.settings)]:
        screen.print(note, highlight=False, soft_wrap=True)
    groups = grouped(made.pending)
    runs = checked.directory.parent
    measurements = measurements_for(groups, runs)
    estimates = estimate(groups, runs, trial=computes_here, measurements=measurements)
    screen.print(headline(made, groups, estimates, checked.directory), highlight=False, soft_wrap=True)
    if groups:
        screen.print(plan_table(groups, estimates))
        if (schedules := schedules_note(groups)) is not None:
            screen.print(schedules, highlight=False, soft_wrap=True)
        if (power := power_of(made.cells, measurements, checked.settings[0].power)) is not None:
            screen.print(power)
    return PlannedSweep(checked, made, groups, estimates)


def fetch(planned: PlannedSweep) -> PlannedSweep:
    """Download what the plan needs; return the plan without the cells whose documents are not available.

    Raises:
        UserError: if nothing is left to compute, or a task cannot be run with this configuration.
    """
    checked, made = planned.checked, planned.plan
    for policy in dict.fromkeys(c.policy for c in made.pending):
        policy.fetch()
    write_groups(checked.directory, checked.aggregates)
    broken = models.fetch([c.model for c in made.pending], screen)
    models.check_prompting((c for c in made.pending if c.model not in broken), hub=True)
    cells = documents.fetch(made.cells, made.pending, checked.refused, screen)
    for note in texts.record_texts(cells, made.done, checked.directory, checked.fields):
        screen.print(note, highlight=False, soft_wrap=True)
    return dataclasses.replace(planned, plan=dataclasses.replace(made, cells=cells), broken=broken)


def without_effect(made: SweepPlan, settings: Sequence[Settings]) -> list[str]:
    """A sentence for each key that would change how a finished cell is computed or stored, but not which cell it is."""
    keys: dict[str, list[str]] = {}
    for s in settings:
        for cell in s.cells:
            stored = made.stored.get(cell.name)
            if stored is None or stored.stopped:
                continue
            if s.trace and cell.policy.evicts and stored.open_traces() is None:
                keys.setdefault(f"trace={s.trace}", []).append(cell.name)
            if stored.cell["model"] != cell.model_name:
                keys.setdefault(f"model.name={cell.model_name}", []).append(cell.name)
            if s.full_texts and cell.spec.generates and COLUMNS[0] not in stored.documents:
                keys.setdefault("full_texts=true", []).append(cell.name)
            if cell.policy.evicts and not _ran_in(stored, cell.backend):
                keys.setdefault(f"backend={cell.backend}", []).append(cell.name)
    return [
        f"{key} has no effect on {counted(len(set(names)), 'finished cell')} ({names[0]}{', …' * (len(set(names)) > 1)}), "
        "because it is not part of what identifies a cell; to compute them with it, give another runs_dir."
        for key, names in keys.items()
    ]


def _ran_in(stored: StoredCell, backend: str) -> bool:
    """Whether a backend computed a result, as far as that is stored, or would leave it to torch."""
    ran = set(str((stored.result.get("provenance") or {}).get("backend") or "none").split("+"))
    left_to_torch = backend in ("numba", "triton") and ran <= {"torch", "dense"}
    return ran == {"none"} or backend in ("auto", *ran) or left_to_torch
