"""The second step of a sweep: which of its cells are to be computed, in which groups, and how long that takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from a2sf.app.check import Checked
from a2sf.app.power import power_of
from a2sf.app.process import screen
from a2sf.errors import UserError
from a2sf.hf.loading import ModelSpec
from a2sf.store.runs import write_groups
from a2sf.sweep.cell import Cell
from a2sf.sweep.group import grouped
from a2sf.sweep.planning.estimate import WorkEstimate, estimate, measurements_for
from a2sf.sweep.planning.table import headline, plan_table
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
    for note in [*checked.notes, *made.notes]:
        screen.print(note, highlight=False, soft_wrap=True)
    groups = grouped(made.pending)
    runs = checked.directory.parent
    measurements = measurements_for(groups, runs)
    estimates = estimate(groups, runs, trial=computes_here, measurements=measurements)
    screen.print(headline(made, groups, estimates, checked.directory), highlight=False, soft_wrap=True)
    if groups:
        screen.print(plan_table(groups, estimates))
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
    for note in texts.record_texts(cells, made.done, checked.directory):
        screen.print(note, highlight=False, soft_wrap=True)
    return dataclasses.replace(planned, plan=dataclasses.replace(made, cells=cells), broken=broken)
