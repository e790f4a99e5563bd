"""Cells of a group against the same one by one and against lm-eval's full cache; a plan's estimate against the clock."""

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

from a2sf.bench.measuring import SMOLLM2, Figures, alternately
from a2sf.hf.loading import load
from a2sf.policies.a2sf import A2SF
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policy
from a2sf.scoring.lm import PrunedLM
from a2sf.store.runs import write_cell
from a2sf.sweep.cell import Cell
from a2sf.sweep.group import Computed, compute_group
from a2sf.sweep.planning.estimate import estimate
from a2sf.tasks import spec as tasks

DOCUMENTS = 50
TASKS = ("arc_easy", "piqa")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
FACTORS = tuple(i / 20 for i in range(21))
DEMO = ("arc_easy", "openbookqa", "piqa")
MEASURED_FIRST = 0.2
"""Share of the demo's documents that a plan's estimate is made from."""
TARGETS = {
    "cells_alone_over_group_paper": "≥ 1.35",
    "cells_alone_over_group_forgetting": "≥ 1.12",
    "lm_eval_full_over_group_cell_1shot": "≥ 4.5",
    "plan_estimate_over_actual": "0.8 to 1.25",
    "first_plan_over_actual": "0.6 to 1.6",
}

Way = tuple[Policy, Budget | None]


def paper() -> list[Way]:
    """The 22 cells of one task in `paper`."""
    pruned: list[Policy] = [find_policy("window")(), find_policy("h2o")(), A2SF(forgetting_factor=0.1)]
    return [(find_policy("full")(), None), *((p, Budget(ratio=r)) for p in pruned for r in RATIOS)]


def forgetting() -> list[Way]:
    """The 23 cells of one task in `forgetting`."""
    pruned = [find_policy("h2o")(), *(A2SF(forgetting_factor=a) for a in FACTORS)]
    return [(find_policy("full")(), None), *((p, Budget(ratio=0.2)) for p in pruned)]


def demo() -> list[Way]:
    """The 7 cells of one task in `demo`."""
    return [w for w in paper() if w[1] is None or w[1].ratio in (0.2, 0.4)]


def measure(figures: Figures, options: argparse.Namespace) -> None:
    """Add the ratios, saving them as they come: each takes minutes."""
    ratios, details = figures.ratios, figures.details
    loaded = load(figures.model)
    lm = PrunedLM(loaded.model, tokenizer=loaded.tokenizer)
    lm.silent = True
    run(lm, paper()[::8], ("piqa",), documents=4)  # warm
    for name, ways in (("paper", paper()), ("forgetting", forgetting())):
        calls: dict[str, Callable[[], Any]] = {
            "alone": partial(one_by_one, lm, ways, TASKS),
            "group": partial(run, lm, ways, TASKS),
        }
        seconds, found = alternately(1, warm=False, **calls)  # minutes long, and warm
        ratios[f"cells_alone_over_group_{name}"] = seconds["alone"] / seconds["group"]
        computed = sum(c.result["timing"]["computed_tokens"] for c in found["group"] if c.result)
        alone = sum(c.result["timing"]["computed_tokens"] for c in found["alone"] if c.result)
        details[f"group_{name}"] = {"seconds": seconds, "tokens": {"alone": alone, "group": computed}}
        figures.save()
    ratios["plan_estimate_over_actual"], ratios["first_plan_over_actual"] = planned_over_actual(lm)
    figures.save()

    from a2sf.bench import harness  # which needs lm-eval's own model

    theirs = harness.lm_eval_model(loaded, options.batch_size)
    calls = {
        "lm_eval": partial(harness.evaluate, theirs, 1),
        "group": partial(run, lm, paper(), harness.TASKS, shots=1),
    }
    seconds, _ = alternately(1, warm=False, **calls)
    ratios["lm_eval_full_over_group_cell_1shot"] = seconds["lm_eval"] / (seconds["group"] / len(paper()))
    details["group_1shot"] = seconds
    figures.save()


def run(
    lm: PrunedLM, ways: Sequence[Way], of: Sequence[str], *, shots: int = 0, documents: int = DOCUMENTS
) -> list[Computed]:
    """Compute a group of cells for each task, without keeping anything."""
    found = []
    for group in _groups(lm, ways, of, shots, documents):
        with tempfile.TemporaryDirectory() as folder:
            found += _computed(lm, group, Path(folder) / "s")
    return found


def one_by_one(lm: PrunedLM, ways: Sequence[Way], of: Sequence[str], documents: int = DOCUMENTS) -> list[Computed]:
    """The same cells, each as a group of one."""
    return [computed for way in ways for computed in run(lm, [way], of, documents=documents)]


def planned_over_actual(lm: PrunedLM) -> tuple[float, float]:
    """The plan's seconds of the demo's cells over those that they take: with one cell of each task on few documents before
    it, and with nothing.
    """
    full = demo()[:1]
    groups = _groups(lm, demo(), DEMO, 0, DOCUMENTS)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "s"
        first = sum(e.seconds or 0.0 for e in estimate(groups, directory.parent, trial=True))
        for (cell,) in _groups(lm, full, DEMO, 0, round(MEASURED_FIRST * DOCUMENTS)):
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


def _groups(lm: PrunedLM, ways: Sequence[Way], of: Sequence[str], shots: int, documents: int) -> list[list[Cell]]:
    data, model = tasks.DataSpec(source="bundle"), replace(SMOLLM2, device=str(lm.device))
    common = {"model_name": "smollm2-135m", "model": model, "shots": shots, "limit": documents, "seed": 1234}
    return [[Cell(policy=p, budget=b, task=t, data=data, **common) for p, b in ways] for t in of]  # type: ignore[arg-type]


def _computed(lm: PrunedLM, group: Sequence[Cell], directory: Path) -> list[Computed]:
    with contextlib.redirect_stderr(io.StringIO()):  # lm-eval's progress bars
        found = list(compute_group(group, lm, directory))
    for computed in found:
        if computed.error is not None:
            raise computed.error
    return found
