"""A long prompt: memory of the process and time to the first new token, with the bounded over transformers' own cache.

Each is measured in a process of its own, `python -m a2sf.bench.prompt ours` or `full`, which loads only what it needs.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from a2sf.bench.measuring import SMOLLM2, Figures, peak, printed
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.loading import load, local_checkpoint
from a2sf.policies.a2sf import A2SF
from a2sf.policies.budget import Budget

PROMPT, NEW, RATIO = 8000, 64, 0.1
TARGETS = {
    "prompt_peak_over_full_8k_r10": "≤ 0.7",
    "prompt_time_over_full_8k_r10": "≤ 0.6",
}


def measure(figures: Figures, options: argparse.Namespace) -> None:
    """Add both ratios and their measurements."""
    found = {who: _alone(who) for who in ("ours", "full")}
    for what, name in (("bytes", "peak"), ("seconds", "time")):
        figures.ratios[f"prompt_{name}_over_full_8k_r10"] = found["ours"][what] / found["full"][what]
    figures.details["prompt_8k"] = found


def _alone(who: str) -> dict[str, float]:
    bytes_, seconds = printed("-m", __name__, who)[-2:]
    return {"bytes": float(bytes_), "seconds": float(seconds)}


def main(who: str) -> None:
    """Print the peak of this process's resident memory in bytes, and the seconds to the first new token."""
    settings: dict[str, Any] = {}
    if who == "ours":
        model = load(SMOLLM2).model
        settings["cache"] = PrunedCache(model, A2SF(), Budget(ratio=RATIO, base="context"))
    else:
        model = AutoModelForCausalLM.from_pretrained(local_checkpoint(SMOLLM2), dtype=torch.float32).eval()
    prompt = torch.randint(3, 40_000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    first: list[float] = []

    def note(ids: Tensor, scores: Any, **more: Any) -> Tensor:
        first.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    with torch.inference_mode():
        model(prompt[:, :8])  # the first call loads libraries, which is not measured
    begun = time.perf_counter()
    model.generate(  # type: ignore[operator]
        prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, stopping_criteria=[note], **settings
    )
    print(peak(), first[0] - begun)


if __name__ == "__main__":
    main(sys.argv[1])
