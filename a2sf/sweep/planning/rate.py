"""The speed of this machine with a model that it has not run yet, from the time of the model's matrix products.

Neither weights nor a network are needed: the sizes of the matrices follow from the config, and their values are random.
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
"""Time spent on each size of matrix, after one product to warm up."""
OVERHEAD = 1.35
"""Time of a forward pass divided by that of its matrix products (docs/speed-details.md, measured on a CPU)."""


def seconds_per_token(model: ModelSpec) -> float | None:
    """Estimated seconds per token in a long pass; None if the config lacks the sizes, or is not here."""
    return seconds_per_row(model, TOKENS)


@cache
def seconds_per_row(model: ModelSpec, rows: int) -> float | None:
    """The same for `rows` tokens at a time: a pass that decodes takes one of each of its rows."""
    with suppress(Exception):  # a model's code may raise anything; reported when the model is loaded
        if model.device_map is None and (config := config_here(model)) is not None:
            sizes = matrices(config, model.trust_remote_code)
            device, dtype = torch.device(model.resolved_device), DTYPES[model.resolved_dtype]
            products = sum(n * _product(size, dtype, device, rows) for size, n in sizes.items())
            return OVERHEAD * products / rows if products else None
    return None


def matrices(config: object, trust_remote_code: bool = False) -> Counter[tuple[int, int]]:
    """Sizes of the matrices that each token is multiplied with -> their number; empty for a mixture of experts."""
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    outside = {id(m.weight) for m in (made.get_input_embeddings(), made.get_output_embeddings()) if m is not None}
    layers = [p for name, p in made.named_parameters() if id(p) not in outside and "embed" not in name]
    if any(p.ndim > 2 for p in layers):  # experts: a token is multiplied with some of them
        return Counter()
    return Counter((p.shape[0], p.shape[1]) for p in layers if p.ndim == 2)


def _product(size: tuple[int, int], dtype: torch.dtype, device: torch.device, rows: int) -> float:
    """Seconds for the product of `rows` tokens with a matrix of that size, the shortest of several."""
    done = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    tokens = torch.randn(rows, size[1], dtype=dtype, device=device)
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
