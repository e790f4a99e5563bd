"""Pruned attention once more, written apart from the engine: plain loops over rows, heads and lists, in float64.

Nothing here is shared with `a2sf`. `N` is accumulated step by step instead of computed, and what is kept is a list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Token:
    """What a KV head knows of a cached token."""

    position: int
    key: np.ndarray
    value: np.ndarray
    A: float = 0.0
    N: float = 0.0
    squares: float = 0.0
    seen: list[float] = field(default_factory=list)
    """Attention of each step since it entered, summed over the group."""


@dataclass
class Method:
    """A policy, spelled out.

    Attributes:
        rank: (tokens of one head, newest position) to priorities.
        recent, sinks: of a budget.
        factor: forgetting.
        above_uniform, shared: as in docs/semantics.md.
        cut: at the prompt's end instead of `rank`: (tokens of every head, budget) to the positions that each head keeps.
    """

    rank: Callable[[list[Token], int], list[float]]
    recent: Callable[[int], int] = lambda budget: 0
    sinks: Callable[[int], int] = lambda budget: 0
    factor: float = 1.0
    above_uniform: bool = False
    shared: bool = False
    cut: Callable[[list[list[Token]], int], list[set[int]]] | None = None


def run(
    method: Method,
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    budget_at: int | Callable[[int], int],
    when: str = "step",
    every: int = 1,
    then: str = "keep",
    prompt: int = 0,
    softcap: float | None = None,
    learned_sinks: np.ndarray | None = None,
) -> tuple[np.ndarray, list[list[int]]]:
    """One sequence: query [H, T, D], key [K, T, D], value [K, T, V] to outputs [H, T, V] and each head's kept positions.

    The budget is a number, or one for each position. A softcap `c` makes a logit `x` `c * tanh(x / c)`; of `learned_sinks`
    [H], each is one more logit of its query head, which takes attention and gives nothing.
    """
    H, T, D = query.shape
    K = key.shape[0]
    G = H // K
    out = np.zeros((H, T, value.shape[-1]))
    caches: list[list[Token]] = [[] for _ in range(K)]
    for t in range(T):
        budget = budget_at if isinstance(budget_at, int) else budget_at(t)
        for head, cache in enumerate(caches):
            cache.append(Token(t, key[head, t], value[head, t]))
            got = np.zeros(len(cache))
            for h in range(head * G, head * G + G):
                logits = np.array([token.key @ query[h, t] for token in cache]) * D**-0.5
                logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
                p = np.exp(logits)
                p /= p.sum() + (0 if learned_sinks is None else np.exp(learned_sinks[h]))
                out[h, t] = sum(x * token.value for x, token in zip(p, cache, strict=True))
                got += (p >= 1 / len(cache)) if method.above_uniform else p
            for token, x in zip(cache, got, strict=True):
                token.A = method.factor * token.A + x
                token.N = method.factor * token.N + 1
                token.squares += x**2
                token.seen.append(x)
        if when == "prompt" and t == prompt - 1 and method.cut is not None:
            if t + 1 > budget:
                for cache, stay in zip(caches, method.cut(caches, budget), strict=True):
                    cache[:] = [token for token in cache if token.position in stay]
            continue
        cached = len(caches[0])
        if when == "step":
            due = cached > budget
        elif when == "every":
            due = cached >= budget + every
        else:
            due = cached > budget and (t == prompt - 1 or (t >= prompt and then == "step"))
            due = due or (then == "every" and t >= prompt and cached >= budget + every)
        if not due:
            continue
        ranks = [method.rank(cache, t) for cache in caches]
        if method.shared:
            ranks = [list(np.mean(ranks, axis=0))] * K
        for head, cache in enumerate(caches):
            free = sorted(
                (rank, token.position)
                for rank, token in zip(ranks[head], cache, strict=True)
                if method.sinks(budget) <= token.position <= t - method.recent(budget)
            )
            evicted = {position for _, position in free[: cached - budget]}
            cache[:] = [token for token in cache if token.position not in evicted]
    return out, [[token.position for token in cache] for cache in caches]
