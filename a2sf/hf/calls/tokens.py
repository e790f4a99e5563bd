"""Where a call's new tokens are, among its padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from a2sf.errors import UserError


def tokens_of(named: dict[str, Any]) -> Tensor:
    tokens: Tensor = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
    return tokens


def check_positions(given: Tensor, past: Tensor, shape: tuple[int, int]) -> None:
    """Refuse positions that count earlier padding, as transformers makes them without a mask, or that were read before.

    Raises:
        UserError: if they do.
    """
    if len(set(past.tolist())) == 1:
        first, read = int(given[..., 0].min()), int(past[0])
        if given.ndim == 2 and first < read:
            raise UserError(
                f"position_ids begin at {first} and this cache has read {read} tokens; give generate a text that begins "
                "with all of them and goes on, without use_cache=False, or a new cache"
            )
        return
    expected = past[:, None] + torch.arange(shape[1])
    if given.shape[-1] == shape[1] and given.shape[0] in (1, len(expected)) and (given.cpu() != expected).any():
        raise UserError("earlier tokens of this batch were padding; give attention_mask, which says where it was")


def new_tokens(shape: tuple[int, int], past: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each row's new tokens are among `shape` = (B, T) columns: first column and number of tokens, int64 [B] each.

    Raises:
        UserError: if the mask has another size, or a gap within a row's new tokens.
    """
    start, length, order = ragged_tokens(shape, past, mask)
    if order is not None:
        raise UserError("attention_mask has a gap inside a row's new tokens; pad at the beginning or at the end")
    return start, length


def ragged_tokens(shape: tuple[int, int], past: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `new_tokens`; if a row has a gap, also an order of the columns, int64 [B, T], that brings its tokens together.

    Raises:
        UserError: if the mask has another size.
    """
    B, T = shape
    every = torch.zeros(B, dtype=torch.int64), torch.full((B,), T), None
    if mask is None:
        return every
    if mask.shape != (B, past + T):
        raise UserError(
            f"attention_mask has shape {tuple(mask.shape)} and must cover the {past} tokens read so far and the {T} new "
            f"ones of {B} rows"
        )
    real = mask[:, past:].bool().cpu()
    if bool(real.all()):
        return every
    length = real.sum(1)
    start = real.int().argmax(1)
    column = torch.arange(T)
    if torch.equal(real, (column >= start[:, None]) & (column < (start + length)[:, None])):
        return start, length, None
    return torch.zeros_like(start), length, (~real).int().argsort(dim=1, stable=True)
