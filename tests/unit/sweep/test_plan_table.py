"""A sweep's plan on the screen: one row per model, in 80 columns."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

from rich.console import Console

from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policy
from a2sf.policies.schedule import Schedule
from a2sf.sweep.planning.estimate import WorkEstimate
from a2sf.sweep.planning.table import headline, plan_table, schedules_note
from a2sf.sweep.reuse import SweepPlan
from tests.unit.sweep.test_sweep import cell


def on_screen(groups, estimates, width=80) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as shown:
        console.print(plan_table(groups, estimates))
    return shown.get().splitlines()


def test_one_row_per_model_with_what_is_to_run():
    first = [cell("full"), *(cell("h2o", budget=Budget(ratio=r)) for r in (0.2, 0.4))]
    second = [dataclasses.replace(c, model_name="other") for c in first]
    lines = on_screen([first, second], [WorkEstimate(1e4, 120.0), WorkEstimate()])
    assert next(line.split() for line in lines if line.strip()) == "Model Policies Budgets Tasks Cells Time".split()
    rows = [" ".join(line.split()) for line in lines if "copa" in line]
    assert rows == [f"{first[0].model_name} full, h2o 0.2, 0.4 copa 3 2 min", "other full, h2o 0.2, 0.4 copa 3 unknown"]


def test_what_is_not_the_default_is_named():
    every = Schedule("every", every=4)
    factors = [dataclasses.replace(cell("a2sf"), policy=find_policy("a2sf")(forgetting_factor=f)) for f in (0.1, 0.5)]
    cells = [*factors, cell("a2sf", budget=Budget(tokens=64), schedule=every), cell("full", shots=1)]
    text = "\n".join(on_screen([cells], [WorkEstimate()], width=200))
    for part in ("a2sf, full", "factors 0.1, 0.5", "schedules step, every4", "0.5, 64 tokens", "shots 0, 1"):
        assert part in text
    assert not any(
        word in "\n".join(on_screen([[cell("full")]], [WorkEstimate()])) for word in ("factor", "sched", "shots")
    )


def test_a_large_grid_fits():
    policies = "window h2o a2sf tova snapkv pyramidkv adakv keydiff random".split()
    budgets = [Budget(ratio=i / 20) for i in range(1, 20)]
    groups = [[cell(p, budget=b) for p in policies for b in budgets]]
    lines = on_screen(groups, [WorkEstimate(1e6, 7200.0)])
    assert max(map(len, lines)) <= 80
    assert "(19)" in " ".join(lines)


def test_the_headline_counts_and_estimates():
    cells = [cell("full"), cell("h2o"), cell("window")]
    groups = [[cells[1]], [cells[2]]]
    made = SweepPlan(cells, frozenset({cells[0].name}), [])
    line = headline(made, groups, [WorkEstimate(12345.0, 600.0), WorkEstimate()], Path("runs/[x]"))
    assert line == (
        "[bold]runs/\\[x][/bold]: 3 cells, 1 done, 2 to run, about 12,000 tokens to compute for 1 of them, about 10 min at "
        "the speed measured here, without the start and the loading of models; for 1 of them there is no measurement to "
        "estimate from"
    )


def test_policies_that_evict_at_other_times_are_named():
    """snapkv cuts once after the prompt, h2o evicts at every step; the full cache never does."""
    cells = [cell(p) for p in ("full", "h2o", "snapkv", "a2sf")]
    assert schedules_note([cells[:1], cells[1:]]) == "Schedules differ: step (h2o, a2sf); prompt (snapkv)."
    prompt = [cell(p, schedule=Schedule("prompt")) for p in ("h2o", "a2sf")]
    assert schedules_note([[cells[0], cells[2], *prompt]]) is None
    assert schedules_note([[cells[1], prompt[0]]]) is None  # of one policy: the table says it
    assert schedules_note([[*cells, *prompt]]) == "Schedules differ: prompt and step (h2o, a2sf); prompt (snapkv)."


def test_one_cell_is_not_cells():
    one = cell("h2o")
    line = headline(SweepPlan([one], frozenset(), []), [[one]], [WorkEstimate(None, None)], Path("runs/s"))
    assert "1 cell, 0 done, 1 to run" in line
