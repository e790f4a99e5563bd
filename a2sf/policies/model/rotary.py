"""What a policy may see of a layer's weights: its rotary embedding, and the projection after the attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that commands which only list policies do not load torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotary position embedding of one layer.

    Attributes:
        frequencies: float32 [R], the angle by which each pair of numbers turns from one position to the next. Of a head's
            `D` numbers the first `2 R` are rotated.
        scaling: what rotated numbers are multiplied by besides (1 for most models).
        interleaved: which numbers are a pair: neighbours; or (False) those that are `R` apart.

    Source: Su et al., 2021 (RoFormer, arXiv 2104.09864).
    """

    frequencies: Tensor
    scaling: float = 1.0
    interleaved: bool = False

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Keys or queries as they are at `positions`.

        Args:
            x: [..., D], before the rotary embedding.
            positions: whole numbers [...], of a shape that broadcasts with that of `x` without `D`.
        """
        return self._turned(x, self._angles(x, positions), self.scaling)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotated keys or queries `x` [..., D] of `positions` [...], as they were before the rotary embedding."""
        return self._turned(x, -self._angles(x, positions), 1 / self.scaling)

    def _angles(self, x: Tensor, positions: Tensor) -> Tensor:
        return positions[..., None].to(x.dtype) * self.frequencies.to(x)

    def _turned(self, x: Tensor, angles: Tensor, scaling: float) -> Tensor:
        import torch

        R = self.frequencies.shape[0]
        turning, rest = x[..., : 2 * R], x[..., 2 * R :]
        pairs = turning.unflatten(-1, (R, 2)) if self.interleaved else turning.unflatten(-1, (2, R)).transpose(-1, -2)
        a, b = pairs.unbind(-1)
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
        flat = (turned if self.interleaved else turned.transpose(-1, -2)).flatten(-2)
        return torch.cat([flat, rest.expand(*flat.shape[:-1], -1)], -1)


@dataclass(frozen=True, eq=False)
class Projection:
    """The projection after the attention of one layer.

    Attributes:
        weights: [K, G, V, hidden], the part of each query head, in the model's dtype.
    """

    weights: Tensor

    def lengths(self, values: Tensor) -> Tensor:
        """`||v W||_1` of values [B, K, N, V], the mean over the query heads of the group, [B, K, N]."""
        import torch

        heads = []
        for k, group in enumerate(self.weights):  # head by head: the projected values are large
            each = [(values[:, k] @ weights).abs_().sum(-1) for weights in group.to(values)]
            heads.append(sum(each[1:], each[0]) / len(each))
        return torch.stack(heads, 1)
