"""Synthetic run directories, written through `a2sf.store.runs.write_cell`: answers worsen as the cache shrinks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from a2sf.store.runs import StoredCell, write_cell, write_table

LABELS = {"full": "Full cache", "window": "Window", "streaming": "StreamingLLM", "h2o": "H2O", "a2sf": "A2SF"}
NOISE = {"full": 0.0, "window": 4.0, "streaming": 3.0, "h2o": 2.0, "a2sf": 1.0}
"""How strongly a policy disturbs the log-likelihoods; scaled by what its budget leaves out."""


@dataclass(frozen=True)
class Plan:
    """What a synthetic sweep holds.

    Attributes:
        documents: task -> number of documents.
        noise: policy -> disturbance, see `NOISE`.
        extra: replaces keys of `cell` in every result.
        schedule: the pruned cells' schedule; None: cells from before there were any.
    """

    policies: Sequence[str] = ("full", "window", "h2o", "a2sf")
    budgets: Sequence[float] = (0.2, 0.5)
    factors: Sequence[float] = (0.1,)
    documents: dict[str, int] = field(default_factory=lambda: {"arc_easy": 120, "piqa": 150})
    shots: Sequence[int] = (0,)
    model: str = "tiny"
    noise: dict[str, float] = field(default_factory=lambda: NOISE)
    extra: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    schedule: str | None = None


def write_sweep(directory: Path, plan: Plan | None = None) -> list[StoredCell]:
    """Write a whole sweep with its results.csv; the same plan always gives the same numbers."""
    plan = plan or Plan()
    cells = []
    for task in plan.documents:
        for shots in plan.shots:
            for policy in plan.policies:
                for budget in [None] if policy == "full" else plan.budgets:
                    for factor in plan.factors if policy == "a2sf" else [None]:
                        cells.append(write_one(directory, plan, task, shots, policy, budget, factor))
    write_table(directory, cells)
    return cells


def write_one(
    directory: Path, plan: Plan, task: str, shots: int, policy: str, budget: float | None, factor: float | None
) -> StoredCell:
    """One cell of a plan."""
    spread = plan.noise[policy] * (1 - (budget or 1.0))
    if factor is not None:
        spread *= 1 + 2 * abs(factor - 0.2)  # the best factor is 0.2
    documents = documents_of(task, plan.documents[task], spread, f"{plan.seed}{policy}{shots}")
    schedule = None if policy == "full" else plan.schedule
    name = "-".join(str(x) for x in (plan.model, policy, budget, schedule, factor, task, shots) if x is not None)
    cell = {
        "id": hashlib.sha256(f"{name}{plan.extra}{plan.seed}".encode()).hexdigest()[:12],
        "model": plan.model,
        "model_path": plan.model,
        "dtype": "float32",
        "policy": policy,
        "policy_label": LABELS.get(policy, policy),
        "policy_settings": {} if factor is None else {"forgetting_factor": factor},
        "budget": None if budget is None else {"ratio": budget, "tokens": None, "base": "total"},
        "forgetting_factor": factor,
        "task": task,
        "shots": shots,
        "limit": None,
        "seed": 1234,
        **({"policy_causal": False} if policy == "future" else {}),
        **({"schedule": schedule} if schedule else {}),
    } | plan.extra
    metrics = {}
    for metric in ("acc", "acc_norm"):
        values = documents[f"metric/{metric}"]
        metrics[metric] = {
            "value": float(values.mean()),
            "stderr": float(values.sem()),
            "n": len(values),
            "higher_is_better": True,
        }
    share = budget or 1.0
    result = {
        "cell": cell,
        "metrics": metrics,
        "documents": {
            "n": len(documents),
            "split": "test",
            "fewshot_split": "validation",
            "dataset_path": task,
            "dataset_name": None,
            "fingerprint": "f",
            "task_version": 1.0,
        },
        "timing": {
            "seconds": 10.0,
            "tokens": 50_000,
            "computed_tokens": 30_000,
            "tokens_per_second": 5_000.0 * (2.2 - share) / (1.3 if policy == "h2o" else 1.0),
            "kept_tokens_mean": 60 * share,
            "cache_share": share,
            "started": "2026-01-01T00:00:00+00:00",
            "finished": "2026-01-01T00:00:10+00:00",
        },
        "provenance": {
            "git": {"commit": "0" * 40, "dirty": False},
            "versions": {"python": "3.11"},
            "machine": {"cpu": "test"},
            "engine": {"version": "1", "backend": "reference"},
            "command": "evaluate.py -m +sweep=test",
        },
    }
    return write_cell(directory / name, result, documents, f"policy: {policy}\n")


def documents_of(task: str, n: int, spread: float, salt: str) -> pd.DataFrame:
    """Documents with two choices; the margins are the task's, disturbed by `spread` nats."""
    base = np.random.default_rng(len(task))
    margin = base.normal(1.0, 2.0, n)  # gold minus the wrong choice, at the full cache
    gold = base.integers(0, 2, n)
    gold_ll = -20 + base.normal(0, 2, n)
    noise = np.random.default_rng(sum(salt.encode()) + len(task))
    margin = margin + spread * (noise.normal(-0.3, 1, n))
    gold_ll = gold_ll - 0.5 * spread * noise.random(n)
    wrong_ll = gold_ll - margin
    logs = np.where(gold[:, None] == np.arange(2), gold_ll[:, None], wrong_ll[:, None])
    prediction = logs.argmax(axis=1)
    right = (prediction == gold).astype(float)
    return pd.DataFrame(
        {
            "doc_id": range(n),
            "doc_hash": [f"{task}{i:04d}" for i in range(n)],
            "prompt_hash": [f"p{task}{i:04d}" for i in range(n)],
            "context": [f"Question {i} of {task}: which <one> & why?\nAnswer:" for i in range(n)],
            "choices": [[f" the first answer to {i}", f" another answer to {i}"] for i in range(n)],
            "gold": gold,
            "prediction": prediction,
            "loglikelihoods": list(logs),
            "is_greedy": [[False, False]] * n,
            "continuation_tokens": [[4, 5]] * n,
            "context_tokens": [[50, 50]] * n,
            "metric/acc": right,
            "metric/acc_norm": right,
        }
    )
