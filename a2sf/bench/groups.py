"""A group of cells against the same cells one by one and against lm-eval's model; estimated against measured time."""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from a2sf.bench import harness
from a2sf.bench.measuring import SMOLLM2, Figures, alternately
from a2sf.hf.loading import load
from a2sf.policies.a2sf import A2SF
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policy
from a2sf.scoring.lm import PrunedLM
from a2sf.store.runs import write_cell
from a2sf.sweep.cell import Cell
from a2sf.sweep.group import CellGroup, Computed
from a2sf.sweep.planning.estimate import estimate
from a2sf.tasks import spec as tasks

DOCUMENTS = 50
TASKS = ("arc_easy", "piqa")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
FACTORS = tuple(i / 20 for i in range(21))
DEMO = ("arc_easy", "openbookqa", "piqa")
MEASURED_FIRST = 0.2
"""Share of the demo's documents that are measured before the estimate."""
TARGETS = {
    "cells_alone_over_group_paper": "≥ 1.35",
    "cells_alone_over_group_forgetting": "≥ 1.12",
    "lm_eval_full_over_group_cell_1shot": "≥ 4.5",
    "plan_estimate_over_actual": "0.8 to 1.25",
    "first_plan_over_actual": "0.6 to 1.6",
}

System = tuple[Policy, Budget | None]


def paper() -> list[System]:
    """The systems of the 22 cells of one task in the preset `paper`."""
    pruned: list[Policy] = [find_policy("window")(), find_policy("h2o")(), A2SF(forgetting_factor=0.1)]
    return [(find_policy("full")(), None), *((p, Budget(ratio=r)) for p in pruned for r in RATIOS)]


def forgetting() -> list[System]:
    """The systems of the 23 cells of one task in the preset `forgetting`."""
    pruned = [find_policy("h2o")(), *(A2SF(forgetting_factor=a) for a in FACTORS)]
    return [(find_policy("full")(), None), *((p, Budget(ratio=0.2)) for p in pruned)]


def demo() -> list[System]:
    """The systems of the 7 cells of one task in the preset `demo`."""
    return [s for s in paper() if s[1] is None or s[1].ratio in (0.2, 0.4)]


def measure(figures: Figures, options: argparse.Namespace) -> None:
    """Add the ratios. Each takes minutes, so that figures are saved after each."""
    ratios, details = figures.ratios, figures.details
    loaded = load(figures.model)
    lm = PrunedLM(loaded.model, tokenizer=loaded.tokenizer)
    run(lm, paper()[::8], ("piqa",), documents=4)  # warm
    for name, systems in (("paper", paper()), ("forgetting", forgetting())):
        calls: dict[str, Callable[[], Any]] = {
            "alone": partial(one_by_one, lm, systems, TASKS),
            "group": partial(run, lm, systems, TASKS),
        }
        seconds, found = alternately(1, warm=False, **calls)  # takes minutes; warm already
        ratios[f"cells_alone_over_group_{name}"] = seconds["alone"] / seconds["group"]
        computed = sum(c.result["timing"]["computed_tokens"] for c in found["group"] if c.result)
        alone = sum(c.result["timing"]["computed_tokens"] for c in found["alone"] if c.result)
        details[f"group_{name}"] = {"seconds": seconds, "tokens": {"alone": alone, "group": computed}}
        figures.save()
    ratios["plan_estimate_over_actual"], ratios["first_plan_over_actual"] = planned_over_actual(lm)
    figures.save()

    theirs = harness.with_choices(loaded, options.batch_size)
    calls = {
        "lm_eval": partial(harness.evaluate, theirs, 1),
        "group": partial(run, lm, paper(), harness.TASKS, shots=1),
    }
    seconds, _ = alternately(1, warm=False, **calls)
    ratios["lm_eval_full_over_group_cell_1shot"] = seconds["lm_eval"] / (seconds["group"] / len(paper()))
    details["group_1shot"] = seconds
    figures.save()


def run(
    lm: PrunedLM, systems: Sequence[System], of: Sequence[str], *, documents: int = DOCUMENTS, **more: Any
) -> list[Computed]:
    """Compute one group of cells for each task, without storing results; `more`: further fields of the cells."""
    found = []
    for group in _groups(lm, systems, of, documents, **more):
        with tempfile.TemporaryDirectory() as folder:
            found += _computed(lm, group, Path(folder) / "s")
    return found


def one_by_one(
    lm: PrunedLM, systems: Sequence[System], of: Sequence[str], documents: int = DOCUMENTS
) -> list[Computed]:
    """Compute the same cells, each in a group of its own."""
    return [computed for system in systems for computed in run(lm, [system], of, documents=documents)]


def planned_over_actual(lm: PrunedLM) -> tuple[float, float]:
    """Estimated over measured seconds of the demo's cells: with one cell of each task measured on few documents before the
    estimate, and without any.
    """
    full = demo()[:1]
    groups = _groups(lm, demo(), DEMO, DOCUMENTS)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "s"
        first = sum(e.seconds or 0.0 for e in estimate(groups, directory.parent, trial=True))
        for (cell,) in _groups(lm, full, DEMO, round(MEASURED_FIRST * DOCUMENTS)):
            for done in _computed(lm, [cell], directory):
                assert done.result is not None
                assert done.documents is not None
                write_cell(directory / cell.name, done.result, done.documents, "")
        planned = sum(e.seconds or 0.0 for e in estimate(groups, directory.parent))
        started = time.perf_counter()
        for group in groups:
            _computed(lm, group, directory.parent / "other" / "s")  # where nothing can be reused
        actual = time.perf_counter() - started
        return planned / actual, first / actual


def _groups(
    lm: PrunedLM, systems: Sequence[System], of: Sequence[str], documents: int, **more: Any
) -> list[list[Cell]]:
    common: dict[str, Any] = {"model_name": "smollm2-135m", "model": replace(SMOLLM2, device=str(lm.device))}
    common |= {"shots": 0, "limit": documents, "seed": 1234, "data": tasks.DataSpec(source="bundle")} | more
    return [[Cell(policy=p, budget=b, task=t, **common) for p, b in systems] for t in of]


def _computed(lm: PrunedLM, group: Sequence[Cell], directory: Path) -> list[Computed]:
    with contextlib.redirect_stderr(io.StringIO()):  # lm-eval's progress bars
        found = list(CellGroup(group, lm.scorer, directory).compute())
    for computed in found:
        if computed.error is not None:
            raise computed.error
    return found
