"""The error of a setting in the output of one layer, given the queries, keys and values of the full cache.

Many settings, at several budgets, are the rows of one call of the eviction kernel. Each layer is measured alone: it does
not see the errors of earlier layers. `end_to_end` measures all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from a2sf.calibration.capture import Captured
from a2sf.engine import kernels
from a2sf.engine.state import Segments
from a2sf.policies.budget import Budget
from a2sf.policies.rule import Head, Rule
from a2sf.policies.slots import head_slots

OUTPUT_BYTES = 64 << 20
"""How many bytes of outputs are computed at a time."""


@dataclass(frozen=True)
class HeadAtRatio:
    """A setting at a budget.

    Attributes:
        head: the setting.
        ratio: the budget, as a share of the sequence's tokens.
    """

    head: Head
    ratio: float


def errors(layer: Captured, projection: Tensor, tried: Sequence[HeadAtRatio]) -> np.ndarray:
    """Relative squared errors of a layer's output after its output projection.

    The squared difference to the output with the full cache, summed over tokens, divided by the squared full output of the
    layer. A KV head's error counts only its own contribution to the output, divided by the layer's squared output too: if
    the errors of heads are orthogonal, they add up to the layer's error.

    Args:
        layer: activations of one sequence.
        projection: weights, float32 [H * V, hidden].
        tried: the settings to measure.

    Returns:
        float64 [tried, KV heads + 1]; the last column is the layer's error.
    """
    K, T = layer.key.shape[1:3]
    found = np.zeros((len(tried), K + 1))
    weights = projection.view(K, -1, projection.shape[1])
    full = layer.output.float()
    norm = float(_projected(full, weights).sum(0).double().square().sum())
    at_once = max(1, OUTPUT_BYTES // (4 * max(full.numel(), K * T * projection.shape[1])))
    for mean_over_age in (False, True):
        some = [i for i, t in enumerate(tried) if t.head.mean_over_age == mean_over_age]
        for start in range(0, len(some), at_once):
            rows = some[start : start + at_once]
            output = _attend(layer, [tried[i] for i in rows], mean_over_age)
            for i, row in zip(rows, output, strict=True):
                parts = _projected(row[None] - full, weights)
                each = parts.double().square().sum((1, 2))
                found[i, :K], found[i, K] = each.cpu().numpy(), float(parts.sum(0).double().square().sum())
    return found / norm


def _attend(layer: Captured, tried: Sequence[HeadAtRatio], mean_over_age: bool) -> Tensor:
    """The pruned outputs, float32 [tried, H, T, V]."""
    n, T = len(tried), layer.query.shape[2]
    budgets = [Budget(ratio=t.ratio).slots(total=T, context=T, layer=0) for t in tried]
    slots = torch.tensor([head_slots((t.head,), C)[0] for t, C in zip(tried, budgets, strict=True)])
    segments = Segments(
        row=torch.arange(n),
        start=torch.zeros(n, dtype=torch.int64),
        length=torch.full((n,), T),
        parent=torch.full((n,), -1),
        budget=slots[:, 0].contiguous(),
        recent=slots[:, 1].contiguous(),
        sinks=slots[:, 2].contiguous(),
        forgetting_factor=torch.tensor([t.head.forgetting_factor for t in tried], dtype=torch.float64),
        rule=Rule(mean_over_age=mean_over_age),
    )
    query, key, value = (x.expand(n, -1, -1, -1) for x in (layer.query, layer.key, layer.value))
    return kernels.attend(query, key, value, segments, layer.options).output.float()


def _projected(output: Tensor, weights: Tensor) -> Tensor:
    """The contribution of each KV head, [K, T, hidden], from an output [1, H, T, V] and weights [K, G * V, hidden]."""
    K = weights.shape[0]
    grouped = output[0].unflatten(0, (K, -1)).transpose(1, 2).flatten(2)  # [K, T, G * V]
    return grouped @ weights
