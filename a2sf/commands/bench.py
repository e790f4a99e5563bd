"""`a2sf bench`: speed and memory.

Every figure is a ratio of two things that are timed in turns in one run, because timings vary.
kernel: the eviction kernel against full attention and against the per-token loop of published code.
lm_eval: lm-eval's Hugging Face model against ours, with the same weights and documents.
groups: a sweep's cells computed together against one by one.
decode: generation with a bounded cache against transformers' cache.
prompt: memory and time of a separate process that reads a prompt of 8,000 tokens.
process: processor time of the command from its start, also while other processes are busy.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from a2sf.bench import decode, groups, harness, kernels, process, prompt
from a2sf.bench.measuring import SMOLLM2, Figures

PARTS = ("kernel", "lm_eval", "groups", "decode", "prompt", "process")
ON_GPU = ("kernel", "lm_eval", "groups")
TARGETS = harness.TARGETS | groups.TARGETS | kernels.TARGETS | decode.TARGETS | prompt.TARGETS | process.TARGETS
ALONE: dict[str, Callable[[argparse.Namespace], float]] = {
    "lm_eval": lambda options: harness.peak_of_lm_eval(options.batch_size),
    "ours": lambda options: harness.peak_of_ours(),
    "long_run": lambda options: decode.long_run(options.long),
}
"""Measurements in a separate process, because they are about a process's memory."""


def main(arguments: Sequence[str]) -> None:
    """Run the measurements, save each result at once, print the table."""
    parser = argparse.ArgumentParser(
        prog="a2sf bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", choices=PARTS, help="one part instead of all; earlier results of the others are kept in the file"
    )
    parser.add_argument("--repeats", type=int, default=3, help="number of timings, of which the median counts")
    parser.add_argument("--out", type=Path, help="default: runs/bench/bench.json, on a GPU runs/bench/bench-cuda.json")
    parser.add_argument("--device", default="cpu", help=f"cuda, for {', '.join(ON_GPU)}; the targets are for a CPU")
    parser.add_argument("--batch-size", type=int, help="lm-eval's batch size; default: the fastest on this machine")
    decode.add_options(parser)
    parser.add_argument("--alone", choices=ALONE, help="print one figure, the memory of this process, and stop")
    options = parser.parse_args(arguments)
    if options.alone:
        print(ALONE[options.alone](options))
        return
    spec = dataclasses.replace(SMOLLM2, device=options.device)
    spec.check_here()
    beside = "bench.json" if spec.resolved_device == "cpu" else "bench-cuda.json"
    figures = Figures(options.out or Path("runs/bench") / beside, device=spec.resolved_device)
    if options.only:
        figures.read()
    parts = PARTS if figures.on_cpu else ON_GPU
    if options.only and options.only not in parts:
        parser.error(f"--only {options.only} is measured on the CPU; on {options.device} are {', '.join(parts)}")
    for part in [options.only] if options.only else parts:
        if part == "kernel":
            kernels.measure(figures, options.repeats)
        elif part == "lm_eval":
            harness.measure(figures, options)
        elif part == "groups":
            groups.measure(figures, options)
        elif part == "decode":
            decode.measure(figures, options)
        elif part == "prompt":
            prompt.measure(figures)
        else:
            process.measure(figures, options.repeats)
        figures.save()
    title = f"medians of {options.repeats} or more, {torch.get_num_threads()} threads"
    table = Table("ratio", "measured", "target", title=title)
    for key, value in figures.ratios.items():
        table.add_row(key, f"{value:.3f}", TARGETS.get(key, ""))
    Console().print(table)
    if "accuracy" in figures.details:
        Console().print(harness.accuracy_table(figures.details["accuracy"]))
