"""Processor time of `a2sf run` as a whole: of its start, and of a sweep beside processes that use the cores.

Each run is a process of its own; its time is what the system charges to it and to the processes that it waited for.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from a2sf.bench.measuring import SMOLLM2, Figures
from a2sf.hf.loading import load_tokenizer

IMPORTS = (
    "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel; "
    "import lm_eval.evaluator, lm_eval.tasks, lm_eval.models.huggingface"
)
"""What any program imports that evaluates a transformers model with lm-eval."""
COMMAND = "from a2sf.cli import main; main()"
TINY = ["policy=h2o", "budget.ratio=0.2", "tasks=[piqa]", "data=bundle", "limit=8"]
SWEEP = ["-m", "policy=full,h2o", "budget.ratio=0.2", "tasks=[piqa]", "data=bundle", "limit=50"]
BUSY = 4
SPINNING = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
"""How threads wait where nobody says how: the libraries' own defaults."""
TARGETS = {
    "start_up_over_imports": "≤ 1.5",
    "processor_time_busy_over_alone": "≤ 1.3",
    "sweep_alone_over_spinning": "≤ 1.05",
}


def measure(figures: Figures, repeats: int) -> None:
    """Add the ratios: processor time of a tiny run over imports', of a sweep beside busy processes over alone; and
    the clock's time of a sweep alone over the same with threads that wait as the libraries have it.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny"
        tiny_model(model)
        tiny = [*TINY, f"model.path={model}"]
        _run(folder, tiny)  # compiles what was never compiled here
        found: dict[str, list[tuple[float, float]]] = {}

        def note(name: str, measured: tuple[float, float]) -> None:
            found.setdefault(name, []).append(measured)

        for _ in range(repeats):
            note("imports", spent(IMPORTS))
            note("tiny", _run(folder, tiny))
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
    runs = tempfile.mkdtemp(dir=folder)  # where nothing can be reused
    return spent(COMMAND, "run", *arguments, f"runs_dir={runs}", **environment)


def spent(code: str, *arguments: str, **environment: str) -> tuple[float, float]:
    """Processor seconds and seconds of a new Python process that runs `code`.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    # what this process, a command itself, has set is no choice of a user's
    ours = {k: v for k, v in os.environ.items() if k not in SPINNING} | environment
    command = [sys.executable, "-P", "-c", code, *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ours)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)  # so that nobody waits for it again
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return used.ru_utime + used.ru_stime, seconds


@contextmanager
def busy(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that use a core each, as far as they get one."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield others
    finally:
        for other in others:
            other.kill()
            other.wait()


def tiny_model(folder: Path) -> None:
    """A random model of two layers, with the tokenizer of the small real one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(SMOLLM2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
