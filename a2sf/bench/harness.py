"""How fast: every figure is a ratio of two things timed alternately in one run, because machines are noisy.

`kernel` ratios: the eviction kernel against full attention and against the per-token tensor loop of published code.
`lm_eval` ratios: lm-eval's own Hugging Face model against ours, the same weights and documents.
`decode` ratios: generating with a bounded cache against transformers' own cache (`a2sf.bench.decode`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from a2sf import A2SF, Budget, evicting_attention
from a2sf.bench import decode
from a2sf.engine.eviction import Options
from a2sf.engine.kernels import attend
from a2sf.evaluation import tasks
from a2sf.experiments.runs import write_atomically
from a2sf.hf.attention import Plan
from a2sf.hf.loading import LoadedModel, load
from a2sf.policies.base import Policy, Retention
from a2sf.policies.find import find_policy

MODEL = decode.SMOLLM2
TASKS = ("piqa", "openbookqa", "arc_easy", "arc_challenge")
DOCUMENTS, RATIO, FACTOR = 50, 0.2, 0.2
SETTINGS: dict[str, tuple[Policy, Budget | None]] = {
    "full": (find_policy("full")(), None),
    "a2sf": (A2SF(forgetting_factor=FACTOR), Budget(ratio=RATIO)),
}
TARGETS = {
    "lm_eval_full_over_ours_full_1shot": "≥ 2.8",
    "lm_eval_full_over_ours_a2sf_1shot": "≥ 2.0",
    "lm_eval_full_over_ours_full_0shot": "≥ 2.0",
    "lm_eval_full_over_ours_a2sf_0shot": "≥ 1.6",
    "loop_over_kernel_T100": "≥ 12",
    "loop_over_kernel_T1024": "≥ 20",
    "loop_over_kernel_T4096": "≥ 30",
    "kernel_over_sdpa_T100": "≤ 0.5",
    "kernel_over_sdpa_T1024": "≤ 1.0",
    "kernel_over_sdpa_T4096": "≤ 0.7",
    "time_per_token_16k_over_1k": "≤ 1.10",
    "peak_memory_ours_over_lm_eval_1shot": "≤ 0.7",
    "useful_flops_over_peak": "≥ 0.5",
} | decode.TARGETS
PARTS = ("kernel", "lm_eval", "decode")


def main(arguments: Sequence[str]) -> None:
    """Command line: which parts to run, and how often."""
    parser = argparse.ArgumentParser(
        prog="a2sf bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="one part instead of all; what others measured before stays")
    parser.add_argument("--repeats", type=int, default=3, help="how often each thing is timed; the median counts")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/bench.json"))
    parser.add_argument("--batch-size", type=int, help="lm-eval's batch size; default: the fastest here, searched for")
    decode.add_options(parser)
    parser.add_argument("--alone", choices=ALONE, help=argparse.SUPPRESS)  # memory is measured in a process of its own
    options = parser.parse_args(arguments)
    if options.alone:
        print(ALONE[options.alone](options))
        return
    ratios: dict[str, float] = {}
    details: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.only and options.out.exists():
        known = json.loads(options.out.read_text())
        ratios |= known.pop("ratios")
        details |= known

    def save() -> None:
        write_atomically(options.out, json.dumps({"ratios": ratios, **details}, indent=2) + "\n")

    for part in [options.only] if options.only else PARTS:
        if part == "kernel":
            _kernel(ratios, details, options.repeats)
        elif part == "lm_eval":
            _harness(ratios, details, options, save)
        else:
            details["decode"] = decode.measure(ratios, options)
            if options.long:
                ratios["long_run_memory_growth"] = _alone("long_run", "--long", options.long)
        save()
    title = f"medians of {options.repeats} or more, {torch.get_num_threads()} threads"
    table = Table("ratio", "measured", "target", title=title)
    for key, value in ratios.items():
        table.add_row(key, f"{value:.3f}", TARGETS.get(key, ""))
    Console().print(table)
    if "accuracy" in details:
        Console().print(_accuracy_table(details["accuracy"]))


def _accuracy_table(accuracy: dict[str, dict[str, float]]) -> Table:
    table = Table("model", *TASKS, title=f"accuracy, 1 shot, first {DOCUMENTS} documents")
    for name, of_task in accuracy.items():
        table.add_row(name, *(f"{of_task[t]:.2f}" for t in TASKS))
    return table


def _alternately(
    repeats: int, *, warm: bool = True, **calls: Callable[[], Any]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each call, timed in turns, by default after one call each to warm up; and what each returned."""
    for call in calls.values() if warm else ():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results = {}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            results[name] = call()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(s) for name, s in seconds.items()}, results


def _kernel(ratios: dict[str, float], details: dict[str, Any], repeats: int) -> None:
    shapes = {"T100": (16, 9, 9, 100), "T1024": (1, 9, 3, 1024), "T4096": (1, 9, 3, 4096)}
    for name, (rows, heads, kv_heads, length) in shapes.items():
        q, k, v = _tensors(rows, heads, kv_heads, length)
        budget = int(RATIO * length)
        many = {"T100": 60, "T1024": 30, "T4096": 8}[name]

        # as in a model: the same rows in every layer, no state wanted
        plan = Plan.of_rows(
            [length] * rows, [0] * rows, lambda s, i, b=budget: Retention(budget=b, forgetting_factor=FACTOR), 1
        )
        segments = plan.segments(0, None)

        def kernel(q=q, k=k, v=v, segments=segments):
            return attend(q, k, v, segments, Options(scale=64**-0.5))

        def sdpa(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        fast, _ = _alternately(many, kernel=kernel, sdpa=sdpa)
        loop = functools.partial(per_token_loop, q, k, v, budget, FACTOR)
        slow, _ = _alternately(1 if length > 1000 else repeats, loop=loop)
        ratios[f"loop_over_kernel_{name}"] = slow["loop"] / fast["kernel"]
        ratios[f"kernel_over_sdpa_{name}"] = fast["kernel"] / fast["sdpa"]
        details[f"milliseconds_{name}"] = {n: 1000 * s for n, s in (fast | slow).items()}

    def of_length(length: int) -> Callable[[], Any]:
        q, k, v = _tensors(1, 9, 3, length)
        return lambda: evicting_attention(q, k, v, budget=256, recent=0, forgetting_factor=FACTOR)

    seconds, _ = _alternately(9, short=of_length(1024), long=of_length(16384))
    ratios["time_per_token_16k_over_1k"] = (seconds["long"] / 16) / seconds["short"]


def _tensors(rows: int, heads: int, kv_heads: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(rows, heads, length, 64, generator=g)
    k, v = (torch.randn(rows, kv_heads, length, 64, generator=g) for _ in range(2))
    return q, k, v


def per_token_loop(q: Tensor, k: Tensor, v: Tensor, budget: int, factor: float) -> Tensor:
    """Pruned attention as published code does it: one step per token on [B, H, T] tensors, keys repeated for GQA."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    alive = torch.zeros(scores.shape[:2] + scores.shape[3:], dtype=torch.bool)
    accumulated = torch.zeros(alive.shape)
    attention = torch.zeros_like(scores)
    for t in range(q.shape[2]):
        alive[:, :, t] = True
        attention[:, :, t] = scores[:, :, t].masked_fill(~alive, -torch.inf).softmax(-1)
        accumulated = factor * accumulated + attention[:, :, t]
        if t >= budget:
            victim = accumulated.masked_fill(~alive, torch.inf).argmin(-1, keepdim=True)
            alive.scatter_(2, victim, False)
    return attention @ v


def _harness(
    ratios: dict[str, float], details: dict[str, Any], options: argparse.Namespace, save: Callable[[], None]
) -> None:
    from a2sf.evaluation.lm import PrunedLM

    loaded = load(MODEL)
    theirs = _lm_eval_model(loaded, options.batch_size)
    ours = PrunedLM(loaded.model, tokenizer=loaded.tokenizer)
    ours.silent = True
    _evaluate(ours, 1, documents=8)  # warm, as theirs is
    details["lm_eval_batch_size"] = theirs.batch_size
    accuracy: dict[str, dict[str, float]] = details.setdefault("accuracy", {})
    for shots in (1, 0):
        calls: dict[str, Callable[[], Any]] = {"lm_eval": functools.partial(_evaluate, theirs, shots)}
        calls |= {name: _with(ours, setting, shots) for name, setting in SETTINGS.items()}
        seconds, results = _alternately(options.repeats, warm=False, **calls)  # minutes long, and warm
        for name in SETTINGS:
            ratios[f"lm_eval_full_over_ours_{name}_{shots}shot"] = seconds["lm_eval"] / seconds[name]
        details[f"seconds_{shots}shot"] = seconds
        if shots == 1:
            accuracy |= {f"{name}, float32": result for name, result in results.items()}
            rate = _matmul_rate()
            _with(ours, SETTINGS["full"], shots)()
            useful = _useful_flops(loaded, ours.counts.computed, ours.counts.scored)
            ratios["useful_flops_over_peak"] = useful / seconds["full"] / rate
            details["matmul_gflops"] = rate / 1e9
        save()
    half = load(dataclasses.replace(MODEL, dtype="bfloat16"))
    ours_half = PrunedLM(half.model, tokenizer=half.tokenizer)
    ours_half.silent = True
    for name, setting in SETTINGS.items():
        calls = {"float32": _with(ours, setting, 1), "bfloat16": _with(ours_half, setting, 1)}
        seconds, results = _alternately(1, warm=False, **calls)
        ratios[f"float32_over_bfloat16_{name}_1shot"] = seconds["float32"] / seconds["bfloat16"]
        accuracy[f"{name}, bfloat16"] = results["bfloat16"]
    save()
    peaks = {who: _alone(who, "--batch-size", theirs.batch_size) for who in ("ours", "lm_eval")}
    ratios["peak_memory_ours_over_lm_eval_1shot"] = peaks["ours"] / peaks["lm_eval"]
    details["peak_mib"] = {who: p / 2**20 for who, p in peaks.items()}


def _with(lm: Any, setting: tuple[Policy, Budget | None], shots: int) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        lm.use(*setting)
        return _evaluate(lm, shots)

    return run


def _lm_eval_model(loaded: LoadedModel, batch_size: int | None) -> Any:
    """lm-eval's own model at the given batch size, or the one that is fastest here."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size or 1)
    if batch_size:
        return lm
    seconds = {}
    for size in (4, 8, 16, 32):
        lm.batch_size_per_gpu = size
        started = time.perf_counter()
        _evaluate(lm, 1, documents=8)
        seconds[size] = time.perf_counter() - started
    lm.batch_size_per_gpu = min(seconds, key=seconds.__getitem__)
    return lm


def _evaluate(lm: Any, shots: int, documents: int = DOCUMENTS) -> dict[str, float]:
    """Accuracy of each task."""
    import lm_eval

    bundle = tasks.DataSpec(source="bundle")
    built = {t: tasks.build(t, bundle, shots=shots, seed=1234) for t in TASKS}
    with contextlib.redirect_stderr(io.StringIO()):  # lm-eval's progress bars
        found = lm_eval.evaluate(lm, task_dict={"tasks": built}, limit=documents, bootstrap_iters=0)
    return {task: found["results"][task]["acc,none"] for task in TASKS}


def _matmul_rate() -> float:
    """float32 operations per second of a large matrix product, the best of a few."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


def _useful_flops(loaded: LoadedModel, computed: int, scored: int) -> float:
    """Multiplications and additions of the layers' matrices for `computed` tokens and of the head for `scored` positions."""
    head = loaded.model.get_output_embeddings().weight.numel()
    layers = sum(
        p.numel() for n, p in loaded.model.named_parameters() if p.ndim == 2 and "embed" not in n and "head" not in n
    )
    return 2.0 * (layers * computed + head * scored)


def _alone(what: str, *arguments: Any) -> float:
    command = [sys.executable, "-P", "-m", "a2sf.cli", "bench", "--alone", what, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _peak_of_lm_eval(options: argparse.Namespace) -> int:
    """Peak resident bytes of this process after an evaluation at 1 shot."""
    from lm_eval.models.huggingface import HFLM

    loaded = load(MODEL)
    _evaluate(HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=options.batch_size), 1)
    return _peak()


def _peak_of_ours(_: argparse.Namespace) -> int:
    from a2sf.evaluation.lm import PrunedLM

    loaded = load(MODEL)
    _evaluate(PrunedLM(loaded.model, *SETTINGS["a2sf"], tokenizer=loaded.tokenizer), 1)
    return _peak()


def _peak() -> int:
    # not getrusage: what started this process counts there, too
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


ALONE: dict[str, Callable[[argparse.Namespace], float]] = {
    "lm_eval": _peak_of_lm_eval,
    "ours": _peak_of_ours,
    "long_run": lambda options: decode.long_run(options.long),
}
