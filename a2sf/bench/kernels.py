"""The eviction kernel against full attention and against the per-token loop of published code; policies against A2SF."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from a2sf.bench.measuring import Figures, alternately
from a2sf.engine.eviction import Options, Segments
from a2sf.engine.functional import evicting_attention
from a2sf.engine.kernels import attend
from a2sf.hf.attention import Plan
from a2sf.policies.a2sf import A2SF
from a2sf.policies.base import Policy
from a2sf.policies.find import make_policy

RATIO, FACTOR = 0.2, 0.2
SHAPES = {"T100": (16, 9, 9, 100), "T1024": (1, 9, 3, 1024), "T4096": (1, 9, 3, 4096)}
"""Rows, query heads, KV heads and tokens of a call."""
CALLS = {"T100": 60, "T1024": 30, "T4096": 8}
"""How often each is timed."""
COMPARED = ("mean_attention", "vatp", "key_norm", "random", "tova")
"""Policies with a compiled step, compared with A2SF."""
FUNCTION = "keydiff"
"""A policy with a priority function, which runs in plain torch."""
TARGETS = {
    "loop_over_kernel_T100": "≥ 12",
    "loop_over_kernel_T1024": "≥ 20",
    "loop_over_kernel_T4096": "≥ 30",
    "kernel_over_sdpa_T100": "≤ 0.5",
    "kernel_over_sdpa_T1024": "≤ 1.0",
    "kernel_over_sdpa_T4096": "≤ 0.7",
    "time_per_token_16k_over_1k": "≤ 1.10",
    # A2SF's time over the policy's: at 0.77 the policy takes 1.3 times as long
    **{f"a2sf_over_{name}": "≥ 0.77" for name in COMPARED},
    "own_rule_over_loop_T1024": "≤ 1.0",
}


def measure(figures: Figures, options: argparse.Namespace) -> None:
    """Add the ratios of the kernels."""
    repeats = options.repeats
    ratios, details = figures.ratios, figures.details
    for name, (rows, heads, kv_heads, length) in SHAPES.items():
        q, k, v = tensors(rows, heads, kv_heads, length, figures.device)
        budget = int(RATIO * length)
        kernel = _call(q, k, v, budget, A2SF(forgetting_factor=FACTOR))

        def sdpa(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        fast, _ = alternately(CALLS[name], kernel=kernel, sdpa=sdpa)
        loop = functools.partial(per_token_loop, q, k, v, budget, FACTOR)
        slow, _ = alternately(1 if length > 1000 else repeats, loop=loop)
        ratios[f"loop_over_kernel_{name}"] = slow["loop"] / fast["kernel"]
        ratios[f"kernel_over_sdpa_{name}"] = fast["kernel"] / fast["sdpa"]
        details[f"milliseconds_{name}"] = {n: 1000 * s for n, s in (fast | slow).items()}

    def of_length(length: int) -> Callable[[], Any]:
        q, k, v = tensors(1, 9, 3, length, figures.device)
        return lambda: evicting_attention(q, k, v, budget=256, recent=0, forgetting_factor=FACTOR)

    seconds, _ = alternately(9, short=of_length(1024), long=of_length(16384))
    ratios["time_per_token_16k_over_1k"] = (seconds["long"] / 16) / seconds["short"]
    _policies(figures)
    _priority_function(figures, repeats)


def _policies(figures: Figures) -> None:
    """Add A2SF's time over that of other policies, for one sequence of 1,024 tokens."""
    qkv, budget = tensors(1, 9, 3, 1024, figures.device), int(RATIO * 1024)
    policies = {"a2sf": A2SF(forgetting_factor=FACTOR)} | {name: make_policy(name) for name in COMPARED}
    calls = {name: _call(*qkv, budget, policy) for name, policy in policies.items()}
    seconds, _ = alternately(30, warm=True, **calls)
    for name in COMPARED:
        figures.ratios[f"a2sf_over_{name}"] = seconds["a2sf"] / seconds[name]
    figures.details["milliseconds_policies_T1024"] = {n: 1000 * s for n, s in seconds.items()}


def _priority_function(figures: Figures, repeats: int) -> None:
    """Add the time of a priority function in torch over the loop (which evicts by query head), 16 rows of 1,024 tokens."""
    q, k, v = tensors(16, 9, 3, 1024, figures.device)
    budget = int(RATIO * 1024)
    ours, loop = (
        _call(q, k, v, budget, make_policy(FUNCTION)),
        functools.partial(per_token_loop, q, k, v, budget, FACTOR),
    )
    seconds, _ = alternately(repeats, own=ours, loop=loop)
    figures.ratios["own_rule_over_loop_T1024"] = seconds["own"] / seconds["loop"]
    figures.details["milliseconds_own_rule_T1024"] = {n: 1000 * s for n, s in seconds.items()}


def _call(q: Tensor, k: Tensor, v: Tensor, budget: int, policy: Policy) -> Callable[[], Any]:
    """A call of attention as in a model's layer, without state."""
    segments = segments_of(q, budget, policy)
    return lambda: attend(q, k, v, segments, Options(scale=q.shape[-1] ** -0.5))


def segments_of(q: Tensor, budget: int, policy: Policy) -> Segments:
    """Whole rows of `q` [B, H, T, D], as a model's layer gets them."""
    rows, length = q.shape[0], q.shape[2]
    plan = Plan.of_rows([length] * rows, [0] * rows, lambda segment, layer: policy.keeps(budget, layer), 1)
    return plan.segments(0, None)


def tensors(rows: int, heads: int, kv_heads: int, length: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value, float32, with heads of size 64."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(rows, heads, length, 64, generator=g)
    k, v = (torch.randn(rows, kv_heads, length, 64, generator=g) for _ in range(2))
    return q.to(device), k.to(device), v.to(device)


def per_token_loop(q: Tensor, k: Tensor, v: Tensor, budget: int, factor: float) -> Tensor:
    """Pruned attention as in published code: one step per token on [B, H, T] tensors, keys repeated for GQA."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    alive = torch.zeros(scores.shape[:2] + scores.shape[3:], dtype=torch.bool, device=q.device)
    accumulated = torch.zeros(alive.shape, device=q.device)
    attention = torch.zeros_like(scores)
    for t in range(q.shape[2]):
        alive[:, :, t] = True
        attention[:, :, t] = scores[:, :, t].masked_fill(~alive, -torch.inf).softmax(-1)
        accumulated = factor * accumulated + attention[:, :, t]
        if t >= budget:
            victim = accumulated.masked_fill(~alive, torch.inf).argmin(-1, keepdim=True)
            alive.scatter_(2, victim, False)
    return attention @ v
