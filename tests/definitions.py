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


def roco(varying: float, recent: int) -> Definition:
    def scores(seen: Seen) -> list[float]:
        paid = [np.array(seen.paid(j)).mean(-1) for j in seen.cached]
        places = int(varying * seen.budget)
        newest = [j > seen.now - min(recent, places) for j in seen.cached]
        spread = [np.inf if new else p.std() for new, p in zip(newest, paid, strict=True)]
        most = sorted(range(len(spread)), key=lambda i: -spread[i])[:places]
        return [np.inf if i in most else p.mean() for i, p in enumerate(paid)]

    return scores


def rkv(window: int, mix: float) -> Definition:
    def scores(seen: Seen) -> list[float]:
        past = [j for j in seen.cached if j <= seen.now - window]
        attention = np.zeros(len(past))
        for t in range(max(0, seen.now - window + 1), seen.now + 1):
            logits = (seen.query[:, t] @ seen.key[past].T * seen.key.shape[-1] ** -0.5).max(0)
            attention += softmax(logits) / min(window, seen.now + 1)
        best = [attention[max(0, i - 3) : i + 4].max() for i in range(len(past))]
        keys = seen.key[seen.cached] / np.linalg.norm(seen.key[seen.cached], axis=-1, keepdims=True)
        like = keys @ keys.T
        np.fill_diagonal(like, 0)
        for row in like:
            close = np.flatnonzero(row > 0.5)
            row[close[-1] if len(close) else 0] = 0
        likeness = softmax(like.mean(0))
        return [
            mix * (best[past.index(j)] if j in past else 0) - (1 - mix) * likeness[i] for i, j in enumerate(seen.cached)
        ]

    return scores


def turned(x: np.ndarray, position: float, frequencies: np.ndarray) -> np.ndarray:
    """A vector at a position, its first half paired with its second."""
    a, b = np.split(x, 2, -1)
    cos, sin = np.cos(position * frequencies), np.sin(position * frequencies)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def expected_attention(frequencies: np.ndarray, future: int, covariance: bool, sinks: int, window: int) -> Definition:
    """For keys and queries that are rotated."""

    def scores(seen: Seen) -> list[float]:
        first = max(sinks, seen.now - window + 1)
        weight, size = np.zeros(len(seen.cached)), seen.key.shape[-1]
        eligible = [i for i, j in enumerate(seen.cached) if j >= sinks]
        turn = np.mean([turned(np.eye(size), seen.now + 1 + f, frequencies) for f in range(future)], 0).T
        for head in seen.query:
            plain = np.array([turned(head[t], -t, frequencies) for t in range(first, seen.now + 1)])
            mean, spread = turn @ plain.mean(0), turn @ np.cov(plain.T, bias=True) @ turn.T
            logits = np.array([seen.key[j] @ mean for j in seen.cached]) * size**-0.5
            if covariance:
                logits += np.array([seen.key[j] @ spread @ seen.key[j] for j in seen.cached]) / size / 2
            weight[eligible] += softmax(logits[eligible]) / len(seen.query)
        return list(weight * np.linalg.norm(seen.value[seen.cached], axis=-1))

    return scores
