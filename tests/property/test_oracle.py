"""The engine against the independent loops of `tests.oracle`, in float64: every kind of rule, every schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from a2sf import Budget, Schedule, attend, make_policy
from a2sf.engine.invariants import SCHEDULES
from tests.oracle import Method, Token, run
from tests.own_policies import AboveUniform, Apportioned, Divided, Looked, Steady
from tests.policies import label
from tests.tiers import examples

T, K, G, D = 22, 2, 2, 6


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def unlike(cache: list[Token], now: int) -> list[float]:
    mean = np.mean([unit(token.key) for token in cache], axis=0)
    return [-float(unit(token.key) @ unit(mean)) for token in cache]


def steady(cache: list[Token], now: int) -> list[float]:
    means = [float(np.mean(token.seen)) for token in cache]
    variances = [token.squares / len(token.seen) - m**2 for token, m in zip(cache, means, strict=True)]
    most = sorted(variances)[-min(2, len(cache))]
    return [
        np.inf if variance >= most and token.position < now else mean
        for token, mean, variance in zip(cache, means, variances, strict=True)
    ]


def observed(window: int, kernel: int, cache: list[Token], budget: int) -> tuple[dict[int, float], set[int]]:
    """What the prompt's last queries saw of each token before them, pooled; and the window."""
    w = min(window, budget)
    before, end = cache[:-w], {token.position for token in cache[-w:]}
    sums = [sum(token.seen[-w:]) for token in before]
    half = kernel // 2
    padded = [0.0] * half + sums + [0.0] * half
    return {token.position: sum(padded[i : i + kernel]) / kernel for i, token in enumerate(before)}, end


def snap(window: int, kernel: int):
    def cut(caches: list[list[Token]], budget: int) -> list[set[int]]:
        kept = []
        for cache in caches:
            scores, end = observed(window, kernel, cache, budget)
            best = sorted(scores, key=lambda p: (-scores[p], -p))[: budget - len(end)]
            kept.append(end | set(best))
        return kept

    return cut


def across(
    window: int,
    kernel: int,
    floor: str,
    rank: Callable[[Token, float], float] = lambda token, score: score,
    by: Callable[[Token], float] | None = None,
):
    def cut(caches: list[list[Token]], budget: int) -> list[set[int]]:
        ranks, ends = [], []
        for cache in caches:
            scores, end = observed(window, kernel, cache, budget)
            ranks.append({t.position: rank(t, scores[t.position]) for t in cache if t.position in scores})
            ends.append(end)
        equal = budget - len(ends[0])
        shown = ranks
        if by is not None:
            shown = [
                {t.position: by(t) for t in cache if t.position in of} for cache, of in zip(caches, ranks, strict=True)
            ]
        everyone = sorted(((x, p, -head) for head, of in enumerate(shown) for p, x in of.items()), reverse=True)
        won = [-head for _, _, head in everyone[: equal * len(caches)]]
        exact = [(1 - Fraction(floor)) * won.count(head) + Fraction(floor) * equal for head in range(len(caches))]
        shares = [int(x) for x in exact]
        by_rest = sorted(range(len(caches)), key=lambda head: (shares[head] - exact[head], head))
        for head in by_rest[: equal * len(caches) - sum(shares)]:
            shares[head] += 1
        best = [sorted(of, key=lambda p: (-of[p], -p))[:n] for of, n in zip(ranks, shares, strict=True)]
        return [end | set(some) for end, some in zip(ends, best, strict=True)]

    return cut


def accumulated(cache: list[Token], now: int) -> list[float]:
    return [token.A for token in cache]


METHODS = {
    "a2sf": (
        make_policy("a2sf", forgetting_factor=0.6, recent_share=0.3, sinks=1),
        Method(accumulated, factor=0.6, sinks=lambda c: 1, recent=lambda c: min(c * 3 // 10, c - 1)),
    ),
    "mean": (
        make_policy("mean_attention", forgetting_factor=0.8),
        Method(lambda cache, now: [x.A / x.N for x in cache], factor=0.8, recent=lambda c: c // 4),
    ),
    "plain mean": (
        make_policy("mean_attention"),
        Method(lambda cache, now: [float(np.mean(x.seen)) for x in cache], recent=lambda c: c // 4),
    ),
    "last query": (make_policy("tova"), Method(lambda cache, now: [x.seen[-1] for x in cache], shared=True)),
    "value norm": (
        make_policy("vatp", sinks=2),
        Method(
            lambda cache, now: [x.A * np.abs(x.value).sum() for x in cache],
            sinks=lambda c: min(2, c),
            recent=lambda c: min(c // 2, c - min(2, c)),
        ),
    ),
    "key norm": (make_policy("key_norm"), Method(lambda cache, now: [-np.linalg.norm(x.key) for x in cache])),
    "keys": (make_policy("keydiff"), Method(unlike)),
    "memory": (Steady(), Method(steady)),
    "above_uniform": (
        AboveUniform(),
        Method(
            lambda cache, now: [(1 + abs(x.value[0])) * x.A / x.N + x.key[0] / 10 for x in cache],
            factor=0.8,
            above_uniform=True,
            shared=True,
            recent=lambda c: c // 3,
        ),
    ),
}
CUTS = {
    "snapkv": (make_policy("snapkv", window=3, kernel=3), Method(accumulated, cut=snap(3, 3))),
    "wide": (make_policy("snapkv", window=2, kernel=7), Method(accumulated, cut=snap(2, 7))),
    "adakv": (make_policy("adakv", window=3, kernel=3, floor=0.4), Method(accumulated, cut=across(3, 3, "0.4"))),
    "all won": (make_policy("adakv", window=2, kernel=3, floor=0.0), Method(accumulated, cut=across(2, 3, "0"))),
    "all equal": (make_policy("adakv", window=3, kernel=3, floor=1.0), Method(accumulated, cut=snap(3, 3))),
    "weight and bias": (
        Divided(),
        Method(accumulated, cut=across(3, 3, "0.3", lambda x, score: (1 + abs(x.value[0])) * score + x.key[0] / 10)),
    ),
    "bias alone": (Divided(scored=False), Method(accumulated, cut=across(3, 3, "0.3", lambda x, score: x.key[0]))),
    "another division": (
        Apportioned(),
        Method(
            accumulated,
            cut=across(3, 3, "0.2", by=lambda x: x.seen[-1] * abs(x.value[0])),
        ),
    ),
    "a function": (Looked(), Method(accumulated, cut=across(3, 3, "0.3", lambda x, score: score * -x.value[1]))),
}
CASES = [(name, schedule) for name in METHODS for schedule in SCHEDULES] + [(name, Schedule("prompt")) for name in CUTS]
BUDGETS = st.one_of(st.integers(2, 12), st.sampled_from(["0.07", "0.2", "0.29", "0.5", "0.83", "1.0"]))
"""A number of tokens, or a share of those seen."""
SOFTMAXES = [{"softcap": 1.0}, {"sinks": True}, {"softcap": 2.0, "sinks": True}]


def growing(ratio: str) -> Callable[[int], int]:
    """`C` at the step of the token at a position."""
    return lambda t: max(1, math.floor(Fraction(ratio) * (t + 1)))


@pytest.mark.parametrize(("name", "schedule"), CASES, ids=label)
@settings(max_examples=examples(6), deadline=None)
@given(seed=st.integers(0, 10_000), budget=BUDGETS, prompt=st.integers(1, T + 2))
def test_the_engine_is_the_oracle(name, schedule, seed, budget, prompt):
    check_oracle(name, schedule, seed, budget, prompt)


@pytest.mark.parametrize(("name", "schedule"), CASES, ids=label)
@settings(max_examples=examples(2), deadline=None)
@given(seed=st.integers(0, 10_000), budget=BUDGETS, prompt=st.integers(1, T + 2), softmax=st.sampled_from(SOFTMAXES))
def test_it_is_with_a_softcap_and_learned_sinks(name, schedule, seed, budget, prompt, softmax):
    check_oracle(name, schedule, seed, budget, prompt, **softmax)


def check_oracle(
    name: str,
    schedule: Schedule,
    seed: int,
    budget: int | str,
    prompt: int,
    softcap: float | None = None,
    sinks: bool = False,
) -> None:
    """Compare the engine with the loops on one sequence of random numbers, once with each kind of implementation."""
    policy, method = (METHODS | CUTS)[name]
    if name == "keys" and isinstance(budget, str):
        # two keys are equally like their mean, so that rounding decides which one a budget of one token retains
        assume(growing(budget)(max(1, prompt - 1) if schedule.prompt else 1) > 1)
    g = np.random.default_rng(seed)
    q, k, v = 2 * g.normal(size=(K * G, T, D)), g.normal(size=(K, T, D)), g.normal(size=(K, T, D))
    budget_at = growing(budget) if isinstance(budget, str) else budget
    budget = Budget(ratio=float(budget), base="seen") if isinstance(budget, str) else budget
    learned = 3 * g.normal(size=K * G) if sinks else None
    softmax: dict[str, Any] = {"softcap": softcap, "learned_sinks": learned}
    want, kept = run(method, q, k, v, budget_at, schedule.when, schedule.every, schedule.then, prompt, **softmax)
    given: dict[str, Any] = {"budget": budget, "schedule": schedule, "prompt": prompt, "softcap": softcap}
    given["learned_sinks"] = None if learned is None else torch.from_numpy(learned)
    tensors = [torch.from_numpy(x)[None] for x in (q, k, v)]
    for backend in ("reference", "torch"):
        out, state = attend(policy, *tensors, **given, backend=backend)
        assert [[p for p in head if p >= 0] for head in state.positions[0].tolist()] == kept
        np.testing.assert_allclose(out[0].numpy(), want, atol=1e-10)
    single, its = attend(policy, *(x.float() for x in tensors), **given)
    assume([[p for p in head if p >= 0] for head in its.positions[0].tolist()] == kept)  # near ties in float32
    np.testing.assert_allclose(single[0].numpy(), want, atol=1e-5)
