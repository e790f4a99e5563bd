"""Checks of a call's tensors, states and segments; the kernel of the CPU reads and writes memory unchecked.

They look at sizes and at numbers per row or segment, once per call, and never at single tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from a2sf.engine.state import EvictionState
from a2sf.policies.rule import Rule


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise `ValueError` unless they are [B, H, T, D], [B, K, T, D] and [B, K, T, V], `H` a multiple of `K`."""
    fits = query.ndim == key.ndim == value.ndim == 4 and key.shape[:3] == value.shape[:3]
    fits = fits and len(key) == len(query) and key.shape[2:] == query.shape[2:]
    if not fits or not key.shape[1] or query.shape[1] % key.shape[1]:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
        raise ValueError(
            f"{shapes} do not fit together as [B, H, T, D], [B, K, T, D] and [B, K, T, V], H a multiple of K"
        )


def check_fits(query: Tensor, key: Tensor, value: Tensor, rows: int, heads: int, group: int, D: int, V: int) -> None:
    """Raise `ValueError` unless they are tokens of a cache with such sizes, `group` query heads for each KV head."""
    check_tensors(query, key, value)
    if (len(query), key.shape[1], query.shape[1], *key.shape[3:], *value.shape[3:]) != (
        rows,
        heads,
        heads * group,
        D,
        V,
    ):
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
        raise ValueError(
            f"{shapes} are not of this cache: {rows} rows, {heads} KV heads for {group} query heads each, keys of {D} and "
            f"values of {V}"
        )


def check_segments(
    row: Sequence[int], first: Sequence[int], length: Sequence[int], parent: Sequence[int], budget: Sequence[int]
) -> tuple[int, int]:
    """How many rows and columns segments need.

    Raises:
        ValueError: if they are not of one number, one begins before its row, a parent comes after its child, or a budget is
            less than a token.
    """
    if not len(row) == len(first) == len(length) == len(parent) == len(budget):
        raise ValueError("the segments' numbers are of several lengths")
    if min((*row, *first, *length), default=0) < 0:
        raise ValueError("a segment begins before its row, or has less than no token")
    if any(not -1 <= p < i for i, p in enumerate(parent)):
        raise ValueError("a segment's parent must come before it")
    if min(budget, default=1) < 1:
        raise ValueError("a segment's budget is less than a token")
    return max(row, default=-1) + 1, max((a + n for a, n in zip(first, length, strict=True)), default=0)


def check_state(state: EvictionState, rows: int, heads: int, D: int, V: int, rule: Rule) -> None:
    """Raise `ValueError` unless a state has such sizes, and the same tokens in all heads where the rule shares them."""
    N = state.positions.shape[-1]
    shapes = [tuple(x.shape) for x in (state.positions, state.scores, state.keys, state.values, state.seen)]
    if shapes != [(rows, heads, N), (rows, heads, N), (rows, heads, N, D), (rows, heads, N, V), (rows,)]:
        raise ValueError(
            f"a state of shapes {shapes} is not one of {rows} rows, {heads} KV heads, keys of {D} and values of {V}"
        )
    if rule.shared and not bool((state.positions == state.positions[:, :1]).all()):
        raise ValueError("the policy retains one set of tokens per layer, and the state's heads hold different ones")


def check_lengths(length: np.ndarray, budget: np.ndarray, tokens: int) -> None:
    """Raise `ValueError` unless each row's new tokens are among the call's, and its budget is at least one token."""
    if length.min() < 0 or length.max() > tokens:
        raise ValueError(
            f"rows of {length.min()} to {length.max()} new tokens are not among the {tokens} that were given"
        )
    if budget.min() < 1:
        raise ValueError(f"a budget of {budget.min()} tokens is less than one")
