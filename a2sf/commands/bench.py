"""`a2sf bench`: measure speed and memory.

Every figure is a ratio of two measurements that alternate in one run, because machines are noisy.
kernel: the eviction kernel against full attention and against the per-token loop of published code.
scan: the same in matrix products and a loop that is easy to read, against the kernel.
lm_eval: lm-eval's own Hugging Face model against ours, with the same weights and documents.
policies: a cell of each policy against one of A2SF (step by step) and of the full cache (one cut after the prompt).
groups: the cells of a sweep computed in groups against one by one.
generation: texts of a group of cells against lm-eval's model, and of a small budget against the full cache.
decode: generation with a bounded cache against transformers' own cache.
prompt: memory and time of a prompt of 8,000 tokens, in a process of its own.
process: processor time of the command itself: of its start, and beside busy processes.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import ChainMap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from a2sf.bench import decode, generation, groups, harness, kernels, policies, process, prompt
from a2sf.bench.measuring import SMOLLM2, Figures
from a2sf.bench.scan import speed
from a2sf.commands.arguments import Parser

PARTS: dict[str, Any] = {
    "kernel": kernels,
    "scan": speed,
    "lm_eval": harness,
    "policies": policies,
    "groups": groups,
    "generation": generation,
    "decode": decode,
    "prompt": prompt,
    "process": process,
}
ON_GPU = ("kernel", "lm_eval", "groups", "generation")
TARGETS: dict[str, str] = dict(ChainMap(*(part.TARGETS for part in PARTS.values())))
ALONE: dict[str, Callable[[argparse.Namespace], float]] = {
    "lm_eval": lambda options: harness.peak_of_lm_eval(options.batch_size),
    "ours": lambda options: harness.peak_of_ours(),
    "long_run": lambda options: decode.long_run(options.long),
}
"""Figures that are measured in a process of their own, because they are about its memory."""


def main(arguments: Sequence[str]) -> None:
    """Measure the parts that `arguments` select, store every figure at once, and print the table."""
    parser = Parser(prog="a2sf bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="measure one part; earlier figures of other parts are kept")
    parser.add_argument("--repeats", type=int, default=3, help="how often each call is timed; the median counts")
    parser.add_argument("--out", type=Path, help="default: runs/bench/bench.json, on a GPU bench-cuda.json beside it")
    parser.add_argument("--device", default="cpu", help=f"cuda, for {', '.join(ON_GPU)}; the targets are for a CPU")
    parser.add_argument("--batch-size", type=int, help="lm-eval's batch size; default: the fastest of a few")
    decode.add_options(parser)
    generation.add_options(parser)
    parser.add_argument("--alone", choices=ALONE, help="print one figure about this process's memory")
    options = parser.parse_args(arguments)
    if options.alone:
        print(ALONE[options.alone](options))
        return
    spec = dataclasses.replace(SMOLLM2, device=options.device)
    spec.check_here()
    name = "bench.json" if spec.resolved_device == "cpu" else "bench-cuda.json"
    figures = Figures(options.out or Path("runs/bench") / name, device=spec.resolved_device)
    if options.only:
        figures.read()
    parts = PARTS if figures.on_cpu else ON_GPU
    if options.only and options.only not in parts:
        parser.error(f"--only {options.only} is for the CPU; on {options.device} give one of {', '.join(parts)}")
    for part in [options.only] if options.only else parts:
        PARTS[part].measure(figures, options)
        figures.save()
    title = f"medians of {options.repeats} or more, {torch.get_num_threads()} threads"
    table = Table("ratio", "measured", "target", title=title)
    for key, value in figures.ratios.items():
        table.add_row(key, f"{value:.3f}", TARGETS.get(key, ""))
    Console().print(table)
    if "accuracy" in figures.details:
        Console().print(harness.accuracy_table(figures.details["accuracy"]))
