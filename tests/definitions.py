"""Methods as their papers define them, on plain float64 arrays and with loops: independent of the engine.

A definition gets what one KV head has seen (`Seen`) and returns a score for each cached token; the smallest is evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Seen:
    """What one KV head has seen, with the token that came last.

    Attributes:
        key, value: [T, D], of all tokens so far.
        query: [G, T, D].
        cached: positions in the cache, ascending.
        past: for each step its position, the positions that were cached, and the attention to them [G, n].
        budget: tokens that the cache may hold.
    """

    key: np.ndarray
    value: np.ndarray
    query: np.ndarray
    cached: list[int]
    past: list[tuple[int, list[int], np.ndarray]] = field(default_factory=list)
    budget: int = 0

    @property
    def now(self) -> int:
        return self.past[-1][0]

    def paid(self, token: int) -> list[np.ndarray]:
        """The attention [G] that a cached token got at each step since it came."""
        return [p[:, there.index(token)] for _, there, p in self.past if token in there]


Definition = Callable[[Seen], Sequence[float]]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def retained(
    definition: Definition,
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    budget: int,
    *,
    recent: int = 0,
    sinks: int = 0,
    prompt: int | None = None,
) -> list[list[int]]:
    """What each KV head holds at the end.

    Args:
        query: [H, T, D].
        key, value: [K, T, D].
        prompt: None: evict after every token; else once, after so many tokens.
    """
    group = len(query) // len(key)
    ends = []
    for head, (k, v) in enumerate(zip(key, value, strict=True)):
        q = query[head * group : (head + 1) * group]
        seen = Seen(k[:0], v[:0], q[:, :0], [], budget=budget)
        for t in range(k.shape[0]):
            seen.key, seen.value, seen.query = k[: t + 1], v[: t + 1], q[:, : t + 1]
            seen.cached = [*seen.cached, t]
            p = softmax(q[:, t] @ k[seen.cached].T * k.shape[-1] ** -0.5)
            seen.past.append((t, list(seen.cached), p))
            evicts = prompt is None or t == prompt - 1
            if evicts and len(seen.cached) > budget:
                order = sorted(zip(definition(seen), seen.cached, strict=True))
                free = [token for _, token in order if sinks <= token <= t - recent]
                out = free[: len(seen.cached) - budget]
                seen.cached = [token for token in seen.cached if token not in out]
        ends.append(seen.cached)
    return ends


def curdkv(window: int) -> Definition:
    def scores(seen: Seen) -> list[float]:
        k, v = (seen.key**2).sum(-1), (seen.value**2).sum(-1)
        near = [[i for i in seen.cached if i // window == j // window] for j in seen.cached]
        return [k[j] / k[n].sum() * v[j] / v[n].sum() for j, n in zip(seen.cached, near, strict=True)]

    return scores


def lagkv(lag: int, sinks: int) -> Definition:
    def scores(seen: Seen) -> list[float]:
        found = dict.fromkeys(seen.cached, 1.0)
        for begin in range(sinks, seen.now + 2 - 2 * lag, lag):
            mine = [j for j in seen.cached if begin <= j < begin + lag]
            following = [j for j in seen.cached if begin + lag <= j < begin + 2 * lag]
            total = np.zeros(len(mine))
            for x in (seen.key, seen.value):
                scaled = np.zeros((len(mine), x.shape[-1]))
                if len(following) > 1:
                    low, high = x[following].min(0), x[following].max(0)
                    scaled = (x[mine] - low) / (high - low)
                if mine:
                    total += softmax(scaled.std(-1, ddof=1))
            for place, i in enumerate(np.argsort(-total, kind="stable")):
                found[mine[i]] = 1 - (place + 1) / lag
        return list(found.values())

    return scores


def scissorhands(window: int) -> Definition:
    def scores(seen: Seen) -> list[float]:
        def low(token: int) -> int:
            last = [(there, p) for t, there, p in seen.past if t > seen.now - window and token in there]
            return sum(p[:, there.index(token)].mean() < 1 / len(there) for there, p in last)

        return [-low(j) for j in seen.cached]

    return scores


def chunks(size: int, of: Definition) -> Definition:
    """Means over chunks, for one head."""

    def scores(seen: Seen) -> list[float]:
        own = np.array(of(seen))
        chunk = np.array(seen.cached) // size
        return [own[chunk == c].mean() for c in chunk]

    return scores


def accumulated(seen: Seen) -> list[float]:
    return [float(np.sum(seen.paid(j))) for j in seen.cached]
