"""Traces: what every layer and KV head evicted at each step of a document, and the attention behind it.

A trace holds one number per position, the step at which it was evicted (`evicted_at` [L, K, T]: L layers, K KV heads, T
tokens), from which the retained positions of every step follow. Traces of a cell's first documents are one `.npz` file.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from a2sf.engine.state import Attended, Options
from a2sf.errors import Notice

CHUNK = 256
"""Queries whose attention is computed at a time."""


@dataclass(frozen=True, eq=False)
class Trace:
    """What was evicted while one document was read.

    Attributes:
        document: its number in the task.
        pieces: the text of each token, [T].
        context: how many of the tokens are the prompt; the rest is a continuation.
        evicted_at: int32 [L, K, T]: the step at which each position was evicted, T if it never was.
        received: float32 [L, K, T], the attention each position got while it was cached (see `attention_mass`).
        lost: float32 [L, K, T], the share of each step's full attention that was on evicted positions.
        tokens: int64 [T + 1], the tokens that were read, and the last one, which was only predicted; None in files of
            earlier versions.
    """

    document: int
    pieces: tuple[str, ...]
    context: int
    evicted_at: np.ndarray
    received: np.ndarray
    lost: np.ndarray
    tokens: np.ndarray | None = None

    def retained(self, step: int = -1) -> np.ndarray:
        """bool [L, K, T]: the positions in the cache after a step (default: the last)."""
        T = self.evicted_at.shape[-1]
        step = range(T)[step]
        return (np.arange(T) <= step) & (self.evicted_at > step)

    def kept(self, step: int = -1) -> np.ndarray:
        """The earlier name of `retained`."""
        warnings.warn(
            "Trace.kept is now called retained; the old name ends with the next version", Notice, stacklevel=2
        )
        return self.retained(step)

    @property
    def gone(self) -> np.ndarray:
        """The earlier name of `evicted_at`."""
        warnings.warn(
            "Trace.gone is now called evicted_at; the old name ends with the next version", Notice, stacklevel=2
        )
        return self.evicted_at

    def first(self, tokens: int) -> Trace:
        """The trace after so many tokens; what positions received from later ones stays in `received`."""
        evicted_at, received, lost = (a[..., :tokens] for a in (self.evicted_at, self.received, self.lost))
        pieces, read = self.pieces[:tokens], None if self.tokens is None else self.tokens[: tokens + 1]
        evicted_at = evicted_at.clip(max=len(pieces))
        return Trace(self.document, pieces, min(tokens, self.context), evicted_at, received, lost, read)

    def ages(self, layer: int) -> np.ndarray:
        """The age of each token that `layer` evicted, in steps at its eviction.

        Those of the first KV head come first, in the order of their evictions, then those of the second, ...
        """
        head, position = self._evicted(layer)
        return self.evicted_at[layer][head, position] - position

    def masses(self, layer: int) -> np.ndarray:
        """The attention that each token had received when `layer` evicted it, in the order of `ages`."""
        return self.received[layer][self._evicted(layer)]

    def _evicted(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Head and position of each token that `layer` evicted, head by head in the order of evictions."""
        of_layer = self.evicted_at[layer]
        head, position = (of_layer < of_layer.shape[-1]).nonzero()
        order = np.lexsort((position, of_layer[head, position], head))
        return head[order], position[order]

    def summary(self) -> pd.DataFrame:
        """One row per layer: evicted tokens per KV head, their mean age and mass, and the mean share of attention lost."""
        rows = []
        for layer, of_layer in enumerate(self.evicted_at):
            ages, masses = self.ages(layer), self.masses(layer)
            rows.append(
                {
                    "evicted": len(ages) / len(of_layer),
                    "age": ages.mean() if len(ages) else np.nan,
                    "mass": masses.mean() if len(ages) else np.nan,
                    "lost": self.lost[layer].mean(),
                }
            )
        return pd.DataFrame(rows).rename_axis("layer")


def steps_of(attended: Attended) -> Tensor:
    """int32 [B, K, T]: the step at which each position was evicted, T if it never was, of traced whole sequences."""
    evicted, cuts = attended.evicted, attended.cuts
    assert evicted is not None
    T = evicted.shape[-1]
    at = torch.arange(T, dtype=torch.int32, device=evicted.device)
    steps = torch.full((*evicted.shape[:2], T + 1), T, dtype=torch.int32, device=evicted.device)
    # the last column takes the steps without an eviction
    steps.scatter_(2, torch.where(evicted >= 0, evicted, T).long(), at.expand_as(evicted).contiguous())
    if cuts is not None:
        row, head, step, position = cuts.to(steps.device).unbind(1)
        steps[row, head, position] = step.int()
    return steps[..., :T]


def attention_mass(query: Tensor, key: Tensor, evicted_at: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The attention behind an eviction: what positions received while they were cached, and what was lost with them.

    Args:
        query: [B, H, T, D], of whole sequences without padding.
        key: [B, K, T, D].
        evicted_at: int32 [B, K, T], the step at which each position was evicted, T if it never was.
        options: how the layer computes attention.

    Returns:
        Two float32 [B, K, T]: `received`, the sum of a position's probabilities over the steps it was cached at and the
        query heads of its group; and `lost`, for each step the share of the attention to *all* earlier tokens that would
        be on those already evicted, mean over the group. For a layer with a sliding window of its own this counts what
        its window leaves out.
    """
    B, H, T, _ = query.shape
    K = key.shape[1]
    at = torch.arange(T, device=query.device)
    evicted_at = evicted_at[:, :, None, None]
    received, lost = (torch.zeros(B, K, T, device=query.device) for _ in range(2))
    q, k = query.float().unflatten(1, (K, H // K)), key.float()[:, :, None]
    for start in range(0, T, CHUNK):
        now = at[start : start + CHUNK, None]
        logits = q[..., start : start + CHUNK, :] @ k.transpose(-1, -2) * options.scale  # [B, K, H / K, CHUNK, T]
        later, missing = at > now, evicted_at < now
        lost[..., start : start + CHUNK] = (options.softmax(logits, later) * missing).sum(-1).mean(2)
        received += options.softmax(logits, later | missing).sum((2, 3))
    return received, lost


def cached_by_step(evicted_at: np.ndarray) -> np.ndarray:
    """int64 [L, K, T]: the tokens cached after each step; `evicted_at` as in `Trace`."""
    T = evicted_at.shape[-1]
    evictions = np.apply_along_axis(np.bincount, -1, evicted_at, minlength=T + 1)[..., :T]
    return np.arange(1, T + 1) - evictions.cumsum(-1)


def overlap(a: Trace, b: Trace) -> np.ndarray:
    """How similar two policies' caches were: float [L], the Jaccard index of what they retain, mean over steps and KV heads.

    Raises:
        ValueError: if the traces are not of the same text and model.
    """
    if a.evicted_at.shape != b.evicted_at.shape or a.pieces != b.pieces:
        raise ValueError("only traces of the same document and model can be compared")
    both, either = (cached_by_step(f(a.evicted_at, b.evicted_at)) for f in (np.minimum, np.maximum))
    return (both / either).mean(axis=(1, 2))


def save(path: Path, traces: Sequence[Trace]) -> None:
    """Write traces to one `.npz` file."""
    path.write_bytes(dumps(traces))


def dumps(traces: Sequence[Trace]) -> bytes:
    """The content of that file."""
    arrays: dict[str, Any] = {"documents": np.array([t.document for t in traces], np.int64)}
    for t in traces:
        arrays |= {f"{name}_{t.document}": getattr(t, name) for name in ("evicted_at", "received", "lost")}
        arrays[f"pieces_{t.document}"] = np.array(t.pieces, dtype=np.str_)
        arrays[f"context_{t.document}"] = np.int64(t.context)
        arrays |= {} if t.tokens is None else {f"tokens_{t.document}": t.tokens}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def load(file: Path | BinaryIO) -> list[Trace]:
    """Read what `save` wrote."""
    with np.load(file, allow_pickle=False) as held:
        return [
            Trace(
                int(d),
                tuple(map(str, held[f"pieces_{d}"])),
                int(held[f"context_{d}"]),
                _evicted_at(held, d),
                held[f"received_{d}"],
                held[f"lost_{d}"],
                held.get(f"tokens_{d}"),
            )
            for d in held["documents"]
        ]


def _evicted_at(held: Any, document: int) -> np.ndarray:
    """`Trace.evicted_at` of a file of this version or of an earlier one."""
    for name in ("evicted_at", "gone"):  # the second until 0.2
        if f"{name}_{document}" in held:
            return held[f"{name}_{document}"]
    evicted = held[f"evicted_{document}"]  # before: the position evicted at each step, -1 for none
    L, K, T = evicted.shape
    steps = np.full((L, K, T + 1), T, np.int32)  # the last column takes the steps without an eviction
    np.put_along_axis(steps, np.where(evicted >= 0, evicted, T), np.arange(T, dtype=np.int32), axis=2)
    return steps[..., :T]
