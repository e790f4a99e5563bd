"""LagKV: retain the tokens whose keys and values vary most relative to the next piece of the text; attention is not used.

Paper: Liang et al., 2025 (arXiv 2504.04704). After the sinks, the sequence is divided into pieces of `lag` tokens. Each
channel of a piece's keys and values is scaled by the minimum and maximum of that channel in the next piece. The score of a
token is the standard deviation of its scaled channels, as a softmax over its piece, that of the key plus that of the value.
Each piece retains its best tokens; the newest tokens, whose next piece is not complete, are retained.
Deviations: a budget instead of a share of each piece, so that the priority is the token's rank within its piece, counted
from the best: all pieces get shorter together (the same at one cut, as in kvpress). Only cached tokens are compared (the
authors' code compresses a piece once, when the next is complete). If the newest tokens alone exceed the budget, the
oldest of them are evicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from a2sf.policies.base import Policy, Retention, check_tokens
from a2sf.policies.ranking import of_columns
from a2sf.policies.rule import Step


@dataclass(frozen=True, kw_only=True)
class LagKV(Policy):
    """Rank within a piece, by the spread of key and value relative to the next piece.

    Attributes:
        lag: number of tokens of a piece.
        sinks: how many of the first tokens are never evicted.
    """

    name: ClassVar[str] = "lagkv"
    label: ClassVar[str] = "LagKV"

    lag: int = 32
    sinks: int = 4

    def __post_init__(self) -> None:
        check_tokens("policy.lag", self.lag, least=1)
        check_tokens("policy.sinks", self.sinks)

    @property
    def min_budget(self) -> int:
        return max(1, self.sinks)

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, sinks=min(self.sinks, budget))

    def priorities(self, step: Step) -> Tensor:
        piece = (step.positions - self.sinks).div(self.lag, rounding_mode="floor")
        inside = step.cached & (piece >= 0)
        scored = inside & ((piece + 2) * self.lag + self.sinks <= step.now + 1)
        # one more piece, for the sinks and for columns without a token
        piece = piece.where(inside, int(piece.max()) + 1 if piece.numel() else 0).clamp(min=0)
        score = _spread(step.keys, step.values, piece, inside)
        return (1 - (_rank(score, piece, step.positions) + 1) / self.lag).where(scored, 1)


def _of_pieces(numbers: Tensor, piece: Tensor, how: str) -> Tensor:
    """The minimum, maximum or sum (`amin`, `amax`, `sum`) of `numbers` [B, K, N, ...] in each piece, [B, K, pieces, ...]."""
    start = {"amin": torch.inf, "amax": -torch.inf, "sum": 0.0}[how]
    made = numbers.new_full((*numbers.shape[:2], int(piece.max()) + 2, *numbers.shape[3:]), start)
    at = piece if numbers.ndim == 3 else piece[..., None].expand_as(numbers)
    return made.scatter_reduce_(2, at, numbers, how)


def _spread(keys: Tensor, values: Tensor, piece: Tensor, inside: Tensor) -> Tensor:
    """The standard deviation over channels, scaled by the next piece, as a softmax over the piece: keys' plus values'."""
    x = torch.cat([keys, values], -1)
    low = of_columns(_of_pieces(x.where(inside[..., None], torch.inf), piece, "amin"), piece + 1)
    high = of_columns(_of_pieces(x.where(inside[..., None], -torch.inf), piece, "amax"), piece + 1)
    scaled = ((x - low) / (high - low)).where(high > low, 0)  # 0 where the next piece has less than two tokens left
    spread = torch.stack([part.std(-1) for part in scaled.split([keys.shape[-1], values.shape[-1]], -1)], -1)
    spread = (spread - of_columns(_of_pieces(spread, piece, "amax"), piece)).exp()
    return (spread / of_columns(_of_pieces(spread, piece, "sum"), piece)).sum(-1)


def _rank(score: Tensor, piece: Tensor, positions: Tensor) -> Tensor:
    """How many tokens of the same piece are better; ties: the oldest first."""
    order = positions.argsort(dim=-1)  # columns are in no particular order
    order = order.gather(-1, score.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    order = order.gather(-1, piece.gather(-1, order).argsort(dim=-1, stable=True))
    place = torch.empty_like(order).scatter_(
        -1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order)
    )
    count = _of_pieces(torch.ones_like(score), piece, "sum").long()
    return place - (count.cumsum(-1) - count).gather(-1, piece)
