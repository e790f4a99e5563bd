"""Speed and memory of lm-eval's own Hugging Face model and of ours, with the same weights and documents in one process."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import time
from collections.abc import Callable
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from rich.table import Table

from a2sf.bench.measuring import SMOLLM2, Figures, alone, alternately, peak
from a2sf.hf.loading import LoadedModel, load
from a2sf.policies.a2sf import A2SF
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policy
from a2sf.scoring.lm import PrunedLM
from a2sf.tasks import spec as tasks

TASKS = ("piqa", "openbookqa", "arc_easy", "arc_challenge")
DOCUMENTS = 50
SETTINGS: dict[str, tuple[Policy, Budget | None]] = {
    "full": (find_policy("full")(), None),
    "a2sf": (A2SF(forgetting_factor=0.2), Budget(ratio=0.2)),
}
PROMPT: tuple[Policy, Budget] = (find_policy("snapkv")(), Budget(ratio=0.2, base="context"))
TARGETS = {
    "lm_eval_full_over_ours_full_1shot": "≥ 2.8",
    "lm_eval_full_over_ours_a2sf_1shot": "≥ 2.0",
    "lm_eval_full_over_ours_full_0shot": "≥ 2.0",
    "lm_eval_full_over_ours_a2sf_0shot": "≥ 1.6",
    "peak_memory_ours_over_lm_eval_1shot": "≤ 0.7",
    "useful_flops_over_peak": "≥ 0.5",
    "prompt_over_full_cell": "≤ 1.25",
}


def measure(figures: Figures, options: argparse.Namespace) -> None:
    """Add the ratios to lm-eval. Each takes minutes, so that figures are saved after each."""
    ratios, details = figures.ratios, figures.details
    loaded = load(figures.model)
    theirs = with_choices(loaded, options.batch_size)
    ours = PrunedLM(loaded.model, tokenizer=loaded.tokenizer)
    evaluate(ours, 1, documents=8)  # warm up, as theirs is
    details["lm_eval_batch_size"] = theirs.batch_size
    accuracy: dict[str, dict[str, float]] = details.setdefault("accuracy", {})
    for shots in (1, 0):
        calls: dict[str, Callable[[], Any]] = {"lm_eval": functools.partial(evaluate, theirs, shots)}
        calls |= {name: _with(ours, setting, shots) for name, setting in SETTINGS.items()}
        if shots == 1:
            calls["prompt"] = _with(ours, PROMPT, shots)
        seconds, results = alternately(options.repeats, warm=False, **calls)  # takes minutes; warm already
        for name in SETTINGS:
            ratios[f"lm_eval_full_over_ours_{name}_{shots}shot"] = seconds["lm_eval"] / seconds[name]
        details[f"seconds_{shots}shot"] = seconds
        if shots == 1:
            accuracy |= {f"{name}, float32": result for name, result in results.items()}
            rate = _matmul_rate(figures.device)
            _with(ours, SETTINGS["full"], shots)()
            useful = _useful_flops(loaded, ours.counts.computed, ours.counts.scored)
            ratios["prompt_over_full_cell"] = seconds["prompt"] / seconds["full"]
            ratios["useful_flops_over_peak"] = useful / seconds["full"] / rate
            details["matmul_gflops"] = rate / 1e9
        figures.save()
    half = load(dataclasses.replace(figures.model, dtype="bfloat16"))
    ours_half = PrunedLM(half.model, tokenizer=half.tokenizer)
    for name, setting in SETTINGS.items():
        calls = {"float32": _with(ours, setting, 1), "bfloat16": _with(ours_half, setting, 1)}
        seconds, results = alternately(1, warm=False, **calls)
        ratios[f"float32_over_bfloat16_{name}_1shot"] = seconds["float32"] / seconds["bfloat16"]
        accuracy[f"{name}, bfloat16"] = results["bfloat16"]
    figures.save()
    if not figures.on_cpu:
        return  # the rest measures the memory of a process
    peaks = {who: alone(who, "--batch-size", theirs.batch_size) for who in ("ours", "lm_eval")}
    ratios["peak_memory_ours_over_lm_eval_1shot"] = peaks["ours"] / peaks["lm_eval"]
    details["peak_mib"] = {who: p / 2**20 for who, p in peaks.items()}


def accuracy_table(accuracy: dict[str, dict[str, float]]) -> Table:
    """A table of the accuracy of each model on each task."""
    table = Table("model", *TASKS, title=f"accuracy, 1 shot, first {DOCUMENTS} documents")
    for name, of_task in accuracy.items():
        table.add_row(name, *(f"{of_task[t]:.2f}" for t in TASKS))
    return table


def _with(lm: Any, setting: tuple[Policy, Budget | None], shots: int) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        lm.use(*setting)
        return evaluate(lm, shots)

    return run


def lm_eval_model(
    loaded: LoadedModel, batch_size: int | None, trials: dict[int, int], evaluate: Callable[[Any, int], Any]
) -> Any:
    """lm-eval's own model with the given batch size, or with the fastest of `trials`: batch size -> documents."""
    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size or 1)
    if batch_size:
        return lm
    seconds = {}
    for size, documents in trials.items():
        lm.batch_size_per_gpu = size
        started = time.perf_counter()
        evaluate(lm, documents)
        seconds[size] = (time.perf_counter() - started) / documents
    lm.batch_size_per_gpu = min(seconds, key=seconds.__getitem__)
    return lm


def with_choices(loaded: LoadedModel, batch_size: int | None) -> Any:
    """lm-eval's own model, for the tasks of this module."""
    return lm_eval_model(
        loaded, batch_size, dict.fromkeys((4, 8, 16, 32), 8), lambda lm, documents: evaluate(lm, 1, documents)
    )


def evaluate(lm: Any, shots: int, documents: int = DOCUMENTS) -> dict[str, float]:
    """Accuracy of each task."""
    bundle = tasks.DataSpec(source="bundle")
    built = {t: tasks.TaskSpec(t, bundle, shots).build(1234) for t in TASKS}
    with contextlib.redirect_stderr(io.StringIO()):  # lm-eval's progress bars
        found = lm_eval.evaluate(lm, task_dict={"tasks": built}, limit=documents, bootstrap_iters=0)
    return {task: found["results"][task]["acc,none"] for task in TASKS}


def _matmul_rate(device: str) -> float:
    """float32 operations per second in a large matrix product, the best of eight."""
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    best = min(alternately(1, warm=False, product=lambda: a @ b)[0]["product"] for _ in range(8))
    return 2 * 2048**3 / best


def _useful_flops(loaded: LoadedModel, computed: float, scored: float) -> float:
    """Operations in the layers' matrix products for `computed` tokens, and in the output head for `scored` positions."""
    head = loaded.model.get_output_embeddings().weight.numel()
    layers = sum(
        p.numel() for n, p in loaded.model.named_parameters() if p.ndim == 2 and "embed" not in n and "head" not in n
    )
    return 2.0 * (layers * computed + head * scored)


def peak_of_lm_eval(batch_size: int | None) -> int:
    """Peak resident bytes of this process after an evaluation of lm-eval's model with 1 shot."""
    loaded = load(SMOLLM2)
    evaluate(HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size), 1)
    return peak()


def peak_of_ours() -> int:
    """Peak resident bytes of this process after an evaluation of our model with 1 shot."""
    loaded = load(SMOLLM2)
    evaluate(PrunedLM(loaded.model, *SETTINGS["a2sf"], tokenizer=loaded.tokenizer), 1)
    return peak()
