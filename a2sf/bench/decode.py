"""Generation with a bounded cache: decoding speed, size of the cache, memory of a long run, and time of a prefill.

Every figure is a ratio to transformers' own cache in the same process; both are timed alternately, because machines are
noisy. Caches are filled with thousands of random keys and values, because the time of a step depends on their number and
not on their values. For the same reason the model may get more positions than it was trained for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from a2sf.bench.measuring import SMOLLM2, Figures, alone, tiny
from a2sf.engine.eviction import EvictionState
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Options
from a2sf.hf.cache.attention_cache import LayerSettings, NewTokens
from a2sf.hf.cache.layer import PrunedLayer
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.loading import load
from a2sf.policies.a2sf import A2SF
from a2sf.policies.base import Retention
from a2sf.policies.budget import Budget

CONTEXTS = {"1k": 1024, "4k": 4096, "16k": 16384}
RATIOS = {"r10": 0.1, "r20": 0.2, "r50": 0.5}
POSITIONS = 32768
TARGETS = {
    "decode_speedup_4k_r20": "≥ 1.3",
    "decode_speedup_16k_r10": "≥ 2.5",
    "cache_bytes_ratio_16k_r10": "≤ 0.105",
    "long_run_memory_growth": "≤ 1.02",
    "prefill_attention_time_ratio_8k_r10": "≤ 1.0",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: models, batches, contexts and numbers of steps."""
    parser.add_argument("--models", nargs="+", choices=["smollm2", "tiny"], default=["smollm2", "tiny"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--contexts", nargs="+", choices=CONTEXTS, default=list(CONTEXTS))
    parser.add_argument("--steps", type=int, default=12, help="timed decoding steps of each cache; the median counts")
    parser.add_argument("--long", type=int, default=20_000, help="tokens of the long run; 0: no long run")


def measure(figures: Figures, options: argparse.Namespace) -> None:
    """Add the ratios, and the speed and size of every cache."""
    rows: list[dict[str, Any]] = []
    for name in options.models:
        model = _smollm2() if name == "smollm2" else tiny()
        for batch in options.batches:
            for context in options.contexts:
                rows += _decode(name, model, batch, context, options.steps)
    figures.details["decode"] = rows
    figures.ratios |= _best(rows)
    figures.ratios["prefill_attention_time_ratio_8k_r10"] = _prefill()
    if options.long:
        figures.ratios["long_run_memory_growth"] = alone("long_run", "--long", options.long)


def _smollm2() -> PreTrainedModel:
    model = load(SMOLLM2).model
    model.config.max_position_embeddings = POSITIONS
    return model


def _sizes(model: PreTrainedModel) -> tuple[int, int, int]:
    """Numbers of layers and KV heads, and the size of a head."""
    c = model.config
    return (
        c.num_hidden_layers,
        c.num_key_value_heads,
        getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
    )


def full_cache(model: PreTrainedModel, batch: int, context: int) -> DynamicCache:
    """transformers' cache with `context` random tokens."""
    layers, K, D = _sizes(model)
    cache = DynamicCache(config=model.config)
    for layer in range(layers):
        cache.update(torch.randn(batch, K, context, D), torch.randn(batch, K, context, D), layer)
    return cache


@torch.inference_mode()
def pruned_cache(model: PreTrainedModel, batch: int, context: int, budget: int) -> PrunedCache:
    """The bounded cache after `context` tokens, with `budget` random tokens in every layer and head."""
    _, K, D = _sizes(model)
    cache = PrunedCache(model, A2SF(), Budget(tokens=budget))
    model(torch.ones(batch, 1, dtype=torch.int64), cache=cache)
    for layer in cache.layers:
        positions = torch.rand(batch, K, context).argsort(-1)[..., :budget].sort(-1).values
        keys, values = torch.randn(2, batch, K, budget, D)
        layer.load(EvictionState(positions, torch.rand(batch, K, budget), keys, values, torch.full((batch,), context)))
    cache.seen, cache.columns = torch.full((batch,), context), context
    return cache


def _decode(name: str, model: PreTrainedModel, batch: int, context: str, steps: int) -> list[dict[str, Any]]:
    """Tokens per second and bytes of the full cache and of the bounded cache at each ratio, timed alternately."""
    tokens = CONTEXTS[context]
    layers, K, D = _sizes(model)
    bytes_full = 8 * batch * layers * K * tokens * D
    if bytes_full > 0.4 * psutil.virtual_memory().available:
        Console().print(
            f"skipped: a batch of {batch} at {context} needs {bytes_full / 2**30:.1f} GiB for the full cache"
        )
        return []
    caches: dict[str, Any] = {"full": full_cache(model, batch, tokens)}
    caches |= {key: pruned_cache(model, batch, tokens, int(ratio * tokens)) for key, ratio in RATIOS.items()}
    seconds: dict[str, list[float]] = {key: [] for key in caches}
    for step in range(steps + 2):
        for key, cache in caches.items():
            elapsed = _step(model, cache, batch)
            if step >= 2:  # without the first steps, which warm up
                seconds[key].append(elapsed)
    rows = []
    for key, cache in caches.items():
        held = cache.nbytes if key != "full" else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        rate = batch / statistics.median(seconds[key])
        rows.append(
            {"model": name, "batch": batch, "context": context, "cache": key, "tokens_per_s": rate, "cache_bytes": held}
        )
    return rows


@torch.inference_mode()
def _step(model: PreTrainedModel, cache: Any, batch: int) -> float:
    ids = torch.ones(batch, 1, dtype=torch.int64)
    begun = time.perf_counter()
    model(ids, cache=cache, use_cache=True)
    return time.perf_counter() - begun


def _best(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Speed-up and share of bytes for each context and ratio, the larger of the batches, of the first model that was run."""
    ratios: dict[str, float] = {}
    first = rows[0]["model"] if rows else ""
    full = {(r["model"], r["batch"], r["context"]): r for r in rows if r["cache"] == "full"}
    for row in rows:
        if row["cache"] == "full" or row["model"] != first:
            continue
        other = full[row["model"], row["batch"], row["context"]]
        end = f"{row['context']}_{row['cache']}"
        speed, held = row["tokens_per_s"] / other["tokens_per_s"], row["cache_bytes"] / other["cache_bytes"]
        ratios[f"decode_speedup_{end}"] = max(speed, ratios.get(f"decode_speedup_{end}", 0.0))
        ratios[f"cache_bytes_ratio_{end}"] = max(held, ratios.get(f"cache_bytes_ratio_{end}", 0.0))
    return ratios


def _prefill(tokens: int = 8192, ratio: float = 0.1, repeats: int = 3) -> float:
    """Time of one layer's attention over a prompt, shaped as SmolLM2's: the bounded cache's over transformers' default."""
    q, k, v = torch.randn(1, 9, tokens, 64), torch.randn(1, 3, tokens, 64), torch.randn(1, 3, tokens, 64)
    ours, theirs = [], []
    for _ in range(repeats):
        begun = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        theirs.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        _read(q, k, v, int(ratio * tokens))
        ours.append(time.perf_counter() - begun)
    return min(ours) / min(theirs)


def _read(q: Tensor, k: Tensor, v: Tensor, budget: int) -> None:
    none, all_ = torch.zeros(1, dtype=torch.int64), torch.tensor([q.shape[2]])
    layer = PrunedLayer(LayerSettings(POSITIONS, "auto", trace=False))
    layer.retention = BatchRetention.of([Retention(budget=budget, forgetting_factor=0.1)])
    layer.attend(q, k, v, NewTokens(none, all_, none, all_, q.shape[2]), Options(q.shape[-1] ** -0.5), None)


def long_run(tokens: int, budget: int = 256) -> float:
    """Resident memory after `tokens` generated tokens divided by that after a tenth of them, at a fixed budget."""
    model, process, early = tiny(), psutil.Process(), tokens // 10
    seen: dict[int, int] = {}

    def note(ids: Tensor, scores: Any, **more: Any) -> Tensor:
        if ids.shape[1] in (early, tokens):
            seen[ids.shape[1]] = process.memory_info().rss
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    cache = PrunedCache(model, A2SF(), Budget(tokens=budget))
    model.generate(  # type: ignore[operator]
        torch.ones(1, 1, dtype=torch.int64),
        cache=cache,
        max_length=tokens,
        do_sample=False,
        eos_token_id=None,
        stopping_criteria=[note],
    )
    return seen[tokens] / seen[early]
