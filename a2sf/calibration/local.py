"""The error that a setting makes in one layer's output, given the queries, keys and values of the full cache.

Many settings, at several budgets, are rows of one call of the eviction kernel. Errors of earlier layers do not reach later
ones here; what they do together, `end_to_end` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from a2sf.calibration.capture import Layer
from a2sf.engine import kernels
from a2sf.engine.state import Options, Segments
from a2sf.policies.budget import Budget
from a2sf.policies.rule import Head, Rule
from a2sf.policies.slots import head_slots

ROWS_BYTES = 64 << 20
"""Of outputs computed at a time."""


@dataclass(frozen=True)
class Trial:
    """A setting at a budget, which is a share of the sequence's tokens."""

    head: Head
    ratio: float


def errors(layer: Layer, projection: Tensor, trials: Sequence[Trial]) -> np.ndarray:
    """Relative squared error of a layer's output after its projection, float64 [trials, KV heads + 1].

    The sum over all tokens of the squared difference to the full cache's output, over that output's own. The last column is
    the layer's; a head's is of its own contribution to the output alone, over the layer's own as well, so that the columns
    of the heads add up to the layer's where their errors have nothing in common.

    Args:
        layer: one sequence, [1, ...].
        projection: float32 [H * V, hidden].
    """
    K, T = layer.key.shape[1:3]
    found = np.zeros((len(trials), K + 1))
    weights = projection.view(K, -1, projection.shape[1])
    full = layer.output.float()
    own = float(_projected(full, weights).sum(0).double().square().sum())
    at_once = max(1, ROWS_BYTES // (4 * max(full.numel(), K * T * projection.shape[1])))
    for mean_over_age in (False, True):
        some = [i for i, t in enumerate(trials) if t.head.mean_over_age == mean_over_age]
        for start in range(0, len(some), at_once):
            rows = some[start : start + at_once]
            output = _attend(layer, [trials[i] for i in rows], mean_over_age)
            for i, row in zip(rows, output, strict=True):
                parts = _projected(row[None] - full, weights)
                each = parts.double().square().sum((1, 2))
                found[i, :K], found[i, K] = each.cpu().numpy(), float(parts.sum(0).double().square().sum())
    return found / own


def _attend(layer: Layer, trials: Sequence[Trial], mean_over_age: bool) -> Tensor:
    """[trials, H, T, V], float32."""
    n, T = len(trials), layer.query.shape[2]
    budgets = [Budget(ratio=t.ratio).slots(total=T, context=T, layer=0) for t in trials]
    slots = torch.tensor([head_slots((t.head,), C)[0] for t, C in zip(trials, budgets, strict=True)])
    segments = Segments(
        row=torch.arange(n),
        start=torch.zeros(n, dtype=torch.int64),
        length=torch.full((n,), T),
        parent=torch.full((n,), -1),
        budget=slots[:, 0].contiguous(),
        recent=slots[:, 1].contiguous(),
        sinks=slots[:, 2].contiguous(),
        forgetting_factor=torch.tensor([t.head.forgetting_factor for t in trials], dtype=torch.float64),
        rule=Rule(mean_over_age=mean_over_age),
    )
    query, key, value = (x.expand(n, -1, -1, -1) for x in (layer.query, layer.key, layer.value))
    return kernels.attend(query, key, value, segments, Options(scale=layer.scale)).output.float()


def _projected(output: Tensor, weights: Tensor) -> Tensor:
    """[1, H, T, V] by [K, G * V, hidden] -> each KV head's contribution, [K, T, hidden]."""
    K = weights.shape[0]
    grouped = output[0].unflatten(0, (K, -1)).transpose(1, 2).flatten(2)  # [K, T, G * V]
    return grouped @ weights
