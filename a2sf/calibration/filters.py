"""The main direction of each head's queries on plain text, which the policy `qfilter` ranks keys by.

Source: Godey et al., 2025 (Q-Filters, arXiv 2503.02812).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from a2sf.calibration.capture import Captured, capture


class Queries:
    """Sums over the queries of every layer and head, in float64: of `q q'` and of `q`."""

    def __init__(self) -> None:
        self.products: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        self.kv_heads: dict[int, int] = {}

    def add(self, layer: Captured) -> None:
        """Count one layer's queries of one text."""
        query = layer.query[0].double().cpu()  # [H, T, D]
        zero = query.new_zeros(())
        self.products[layer.number] = self.products.get(layer.number, zero) + query.transpose(-1, -2) @ query
        self.sums[layer.number] = self.sums.get(layer.number, zero) + query.sum(1)
        self.kv_heads[layer.number] = layer.key.shape[1]

    def directions(self) -> Tensor:
        """float32 [L, K, D]: the first right singular vector of each head's queries, on the side of their mean, averaged
        over the query heads of the group.
        """
        found = []
        for number in sorted(self.products):
            main = torch.linalg.eigh(self.products[number]).eigenvectors[..., -1]  # [H, D]; eigenvalues ascend
            side = (main * self.sums[number]).sum(-1, keepdim=True).sign()
            found.append((main * side).unflatten(0, (self.kv_heads[number], -1)).mean(1))
        return torch.stack(found).float()


def directions(model: PreTrainedModel, passages: Iterable[Sequence[int]]) -> Tensor:
    """The main direction of the queries of each layer and key/value head, float32 [L, K, D], over some passages of tokens.

    Raises:
        UnsupportedModel: if the layers' attention cannot be captured.
    """
    queries = Queries()
    for ids in passages:
        capture(model, ids, queries.add)
    return queries.directions()


def content(found: Tensor, name: str, about: dict[str, Any]) -> dict[str, Any]:
    """The content of the file that `qfilter` reads: numbers as base64 of little-endian float32, in the order of `shape`."""
    numbers = base64.b64encode(found.numpy().astype("<f4").tobytes()).decode()
    return {"name": name, "shape": list(found.shape), "filters": numbers, "made": about}
