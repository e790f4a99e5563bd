"""One forward pass whose sequences follow several policies and schedules: one pass of the model, separate caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from a2sf.engine.state import Options
from a2sf.hf.attention.errors import check_finite
from a2sf.hf.attention.plan import Plan


@dataclass
class MixedPass:
    """A pass over one packed row [1, T] that several plans share, each for some columns of the row.

    A column may belong to several plans: the common beginning of two sequences is read once by the model, and twice by the
    engine where their policies differ.

    Attributes:
        plans: the plans; the segments of each lie in a row of its own, which consists of its `columns`.
        columns: for each plan an int64 tensor, the columns of the row that are its tokens.
        back: int64 [T], for each column of the row the index of its output among the tokens of all plans, end to end.
        segments: row, first column and length of the row's own segments, which errors are counted by.
    """

    plans: Sequence[Plan]
    columns: Sequence[Tensor]
    back: Tensor
    segments: tuple[Sequence[int], Sequence[int], Sequence[int]]
    layers: int
    reached: set[int] = field(default_factory=set)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options, window: int | None
    ) -> Tensor:
        """Attention of one layer, [1, H, T, V]."""
        check_finite(layer, self.segments, query=query, key=key, value=value)
        self.reached.add(layer)
        outputs = []
        for plan, columns in zip(self.plans, self.columns, strict=True):
            q, k, v = (x.index_select(2, columns) for x in (query, key, value))
            outputs.append(plan.attend_finite(layer, q, k, v, options, window))
        return torch.cat(outputs, 2).index_select(2, self.back)
