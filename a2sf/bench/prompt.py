"""A long prompt: memory of the process and time to the first new token, with the bounded over transformers' own cache.

Each is measured in a process of its own, `python -m a2sf.bench.prompt NAME`, which loads only what it needs. `full` is
transformers' own cache, the other names are in `CACHES`.
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
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policy
from a2sf.policies.schedule import STEP, Schedule

PROMPT, NEW, RATIO = 8000, 64, 0.1
CACHES = {"a2sf": STEP, "snapkv": Schedule("prompt"), "h2o": Schedule("prompt")}
"""The policies that are measured, each with its schedule."""
TARGETS = {
    "prompt_peak_over_full_8k_r10": "≤ 0.7",
    "prompt_time_over_full_8k_r10": "≤ 0.6",
    "snapkv_prompt_over_full_8k": "≤ 1.10",
    "h2o_prompt_over_full_8k": "≤ 1.35",
}


def measure(figures: Figures, options: argparse.Namespace) -> None:
    """Add the ratios and their measurements."""
    found = {who: _alone(who) for who in (*CACHES, "full")}
    for what, name in (("bytes", "peak"), ("seconds", "time")):
        figures.ratios[f"prompt_{name}_over_full_8k_r10"] = found["a2sf"][what] / found["full"][what]
    for who in ("snapkv", "h2o"):
        figures.ratios[f"{who}_prompt_over_full_8k"] = found[who]["seconds"] / found["full"]["seconds"]
    figures.details["prompt_8k"] = found


def _alone(who: str) -> dict[str, float]:
    bytes_, seconds = printed("-m", __name__, who)[-2:]
    return {"bytes": float(bytes_), "seconds": float(seconds)}


def main(who: str) -> None:
    """Print the peak of this process's resident memory in bytes, and the seconds to the first new token."""
    settings: dict[str, Any] = {}
    if who in CACHES:
        model = load(SMOLLM2).model
        budget = Budget(ratio=RATIO, base="context")
        settings["cache"] = PrunedCache(model, find_policy(who)(), budget, schedule=CACHES[who])
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
