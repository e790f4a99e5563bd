"""What a policy's cell costs: under `step` over A2SF's, if a kernel knows its rule; under `prompt` over the full cache's."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from rich.console import Console

from a2sf.bench.harness import evaluate
from a2sf.bench.measuring import Figures, alternately
from a2sf.hf.loading import load
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget
from a2sf.policies.find import built_in
from a2sf.policies.schedule import STEP, Schedule
from a2sf.scoring.lm import PrunedLM

DOCUMENTS = 12
RATIO = 0.2
PROMPT = Schedule(when="prompt")


def measurable() -> dict[str, Policy]:
    """The policies that evict within a budget and need no file, with their default settings."""
    found = {}
    for name, cls in sorted(built_in().items()):
        policy = cls()
        if policy.evicts and policy.uses_budget and not hasattr(policy, "file"):
            found[name] = policy
    return found


def _as_data(policy: Policy) -> bool:
    """Whether a rule says its ranking, so that a kernel evicts step by step."""
    return "step" in policy.schedules and not policy.keeps(64).rule.calls


TARGETS = {f"{n}_step_cell_over_a2sf": "≤ 1.5" for n, p in measurable().items() if _as_data(p) and n != "a2sf"} | {
    # a second reading of the prompt is part of what a policy is that does not only look at it
    f"{n}_prompt_cell_over_full": "≤ 1.25"
    for n, p in measurable().items()
    if "prompt" in p.schedules and (p.looks or not p.prepares)
}


def measure(figures: Figures, options: argparse.Namespace) -> None:
    """Add the ratios, each policy beside the system that it is compared with, in one run."""
    loaded = load(figures.model)
    lm = PrunedLM(loaded.model, tokenizer=loaded.tokenizer)
    evaluate(lm, 1, documents=8)
    seconds: dict[str, Any] = figures.details.setdefault("seconds_of_policies", {})
    full, a2sf = built_in()["full"](), built_in()["a2sf"]()
    for name, policy in measurable().items():
        for schedule, other, key in (
            (STEP, (a2sf, Budget(ratio=RATIO), STEP), f"{name}_step_cell_over_a2sf"),
            (PROMPT, (full, None, STEP), f"{name}_prompt_cell_over_full"),
        ):
            if schedule.when not in policy.schedules or (schedule is STEP and (name == "a2sf" or not _as_data(policy))):
                continue  # a function of every step takes as long as it takes
            Console(stderr=True).print(f"{name}, {schedule.when}")
            budget = Budget(ratio=RATIO, base="context" if schedule.prompt else "total")
            each = {"policy": (policy, budget, schedule), "other": other}
            calls = {what: partial(_cell, lm, *system) for what, system in each.items()}
            seconds[key], _ = alternately(options.repeats, warm=False, **calls)
            figures.ratios[key] = seconds[key]["policy"] / seconds[key]["other"]
        figures.save()


def _cell(lm: PrunedLM, policy: Policy, budget: Budget | None, schedule: Schedule) -> None:
    lm.use(policy, budget, schedule)
    evaluate(lm, 1, documents=DOCUMENTS)
