"""One forward pass whose sequences follow several policies and schedules: the model's matrices once, the caches apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from a2sf.hf.attention.errors import check_finite
from a2sf.hf.attention.plan import Plan


@dataclass
class Mixed:
    """A pass over one packed row [1, T] of several parts, each a `Plan` on columns of the row.

    A column may be in several parts: two sequences that begin alike are one to the model and two to the engine, where they
    are scored or forgotten differently.

    Attributes:
        plans: of each part; its segments lie in the part's own row, which is the row's `columns`.
        columns: int64 tensors, where in the row the tokens of each part's row are.
        back: int64 [T], for each column of the row, where among the parts' tokens, laid end to end, its output is.
        segments: row, first column and length of the row's own segments, which errors count by.
    """

    plans: Sequence[Plan]
    columns: Sequence[Tensor]
    back: Tensor
    segments: tuple[Sequence[int], Sequence[int], Sequence[int]]
    layers: int
    reached: set[int] = field(default_factory=set)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of one layer, [1, H, T, V]."""
        check_finite(layer, self.segments, query=query, key=key, value=value)
        self.reached.add(layer)
        outputs = []
        for plan, columns in zip(self.plans, self.columns, strict=True):
            q, k, v = (x.index_select(2, columns) for x in (query, key, value))
            outputs.append(plan.checked(layer, q, k, v, scale, window))
        return torch.cat(outputs, 2).index_select(2, self.back)
