"""How fast this machine would read tokens with a model that it has not run yet, by a trial of the model's matrix products.

Neither weights nor a network are needed: the sizes follow from the config, and the products are of random numbers.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from functools import cache

import torch
from transformers import AutoModelForCausalLM

from a2sf.hf.loading import DTYPES, ModelSpec, config_here

TOKENS = 256
SECONDS = 0.1
"""Time for each size of matrix, after one product to warm up."""
BESIDE = 1.35
"""Time of a pass over that of its products: attention, scores and all else (docs/speed.md, measured on a CPU)."""


@cache
def seconds_per_token(model: ModelSpec) -> float | None:
    """About how long a token takes in a pass of many; None where the config is not on this machine or tells too little."""
    with suppress(Exception):  # told when the model is loaded
        if model.device_map is None and (config := config_here(model)) is not None:
            sizes = matrices(config, model.trust_remote_code)
            device, dtype = torch.device(model.resolved_device), DTYPES[model.resolved_dtype]
            products = sum(n * _product(size, dtype, device) for size, n in sizes.items())
            return BESIDE * products / TOKENS if products else None
    return None


def matrices(config: object, trust_remote_code: bool = False) -> Counter[tuple[int, int]]:
    """Sizes of the matrices that every token is multiplied with, and how often each occurs; none where that is not so."""
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    outside = {id(m.weight) for m in (made.get_input_embeddings(), made.get_output_embeddings()) if m is not None}
    layers = [p for name, p in made.named_parameters() if id(p) not in outside and "embed" not in name]
    if any(p.ndim > 2 for p in layers):  # experts, of which a token meets some
        return Counter()
    return Counter((p.shape[0], p.shape[1]) for p in layers if p.ndim == 2)


def _product(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a product of `TOKENS` tokens with such a matrix, the best of a few."""
    done = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    tokens = torch.randn(TOKENS, size[1], dtype=dtype, device=device)
    matrix = torch.randn(*size, dtype=dtype, device=device)
    best, begun = float("inf"), 0.0
    with torch.inference_mode():
        torch.nn.functional.linear(tokens, matrix)
        done()
        begun = time.perf_counter()
        while True:
            started = time.perf_counter()
            torch.nn.functional.linear(tokens, matrix)
            done()
            best = min(best, time.perf_counter() - started)
            if time.perf_counter() - begun >= SECONDS:
                return best
