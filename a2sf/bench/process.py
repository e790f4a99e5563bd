"""Processor time of the command `a2sf run`: of its start, and of a sweep beside processes that use all cores.

Each run is a process of its own; its time is that of the process and of its finished children.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from a2sf.bench.measuring import SMOLLM2, Figures, tiny
from a2sf.hf.loading import load_tokenizer

IMPORTS = (
    "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel; "
    "import lm_eval.evaluator, lm_eval.tasks, lm_eval.models.huggingface"
)
"""The imports of any program that evaluates a transformers model with lm-eval."""
COMMAND = "from a2sf.cli import main; main()"
TINY = ["policy=h2o", "budget.ratio=0.2", "tasks=[piqa]", "data=bundle", "limit=8"]
SWEEP = ["-m", "policy=full,h2o", "budget.ratio=0.2", "tasks=[piqa]", "data=bundle", "limit=50"]
BUSY = 4
SPINNING = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
"""The libraries' own defaults for how long threads wait actively."""
TARGETS = {
    "start_up_over_imports": "≤ 1.5",
    "processor_time_busy_over_alone": "≤ 1.3",
    "sweep_alone_over_spinning": "≤ 1.05",
}


def measure(figures: Figures, options: argparse.Namespace) -> None:
    """Add the ratios: processor time of a tiny run over that of the imports, and of a sweep beside busy processes over that
    of a sweep alone; elapsed time of a sweep over that with the libraries' own settings for waiting threads.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny"
        tiny_model(model)
        small = [*TINY, f"model.path={model}"]
        _run(folder, small)  # compiles the kernels, if they are not compiled yet
        found: dict[str, list[tuple[float, float]]] = {}

        def note(name: str, measured: tuple[float, float]) -> None:
            found.setdefault(name, []).append(measured)

        for _ in range(options.repeats):
            note("imports", spent(IMPORTS))
            note("tiny", _run(folder, small))
            note("alone", _run(folder, SWEEP))
            note("spinning", _run(folder, SWEEP, **SPINNING))
            with busy(BUSY):
                note("busy", _run(folder, SWEEP))
    processor, clock = ({n: statistics.median(m[i] for m in of) for n, of in found.items()} for i in (0, 1))
    figures.ratios |= {
        "start_up_over_imports": processor["tiny"] / processor["imports"],
        "processor_time_busy_over_alone": processor["busy"] / processor["alone"],
        "sweep_alone_over_spinning": clock["alone"] / clock["spinning"],
    }
    figures.details["process"] = {"processor_seconds": processor, "seconds": clock}


def _run(folder: str, arguments: Sequence[str], **environment: str) -> tuple[float, float]:
    runs = tempfile.mkdtemp(dir=folder)  # without results that could be reused
    return spent(COMMAND, "run", *arguments, f"runs_dir={runs}", **environment)


def spent(code: str, *arguments: str, **environment: str) -> tuple[float, float]:
    """Processor seconds and elapsed seconds of a new Python process that runs `code`.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    # without the settings that this command itself has made
    ours = {k: v for k, v in os.environ.items() if k not in SPINNING} | environment
    command = [sys.executable, "-P", "-c", code, *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ours)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)  # because os.wait4 has collected the process
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return used.ru_utime + used.ru_stime, seconds


@contextmanager
def busy(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`count` processes that each use a core."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield others
    finally:
        for other in others:
            other.kill()
            other.wait()


def tiny_model(folder: Path) -> None:
    """Save a tiny random model with the tokenizer of SmolLM2."""
    tokenizer = load_tokenizer(SMOLLM2)
    tiny(len(tokenizer), positions=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
