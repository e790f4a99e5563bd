"""The tokens that a cache has read, so that another text is noticed where a conversation is given again."""

from __future__ import annotations

import torch
from torch import Tensor

from a2sf.errors import UserError

PARTS = 64
"""Calls whose tokens lie apart, at most."""


class ReadTokens:
    """The columns of a cache's calls as token ids, padding included.

    They may not all be known, where embeddings were read or states were loaded; then nothing is compared.
    """

    def __init__(self, known: Tensor | None = None) -> None:
        self._parts = [] if known is None else [known]
        self._known = True

    def add(self, tokens: Tensor) -> None:
        """Note what a call has read: ids [B, T], or embeddings, which no text is compared with."""
        self._known &= not tokens.is_floating_point()
        self._parts = [*self._parts, tokens.detach().clone()] if self._known else []
        if len(self._parts) > PARTS:
            self._parts = [torch.cat(self._parts, 1)]

    def select(self, rows: Tensor) -> None:
        """Keep the rows `rows`, in that order."""
        if self._parts:
            every = torch.cat(self._parts, 1)
            self._parts = [every[rows.to(every.device)]]

    def ids(self, rows: int, columns: int) -> Tensor | None:
        """[rows, columns], what was read; None where that is not known."""
        every = torch.cat(self._parts, 1) if self._parts else None
        return every if every is not None and every.shape == (rows, columns) else None

    def check(self, given: Tensor, mask: Tensor | None, columns: int) -> None:
        """Refuse a text that does not begin with the `columns` that were read.

        Args:
            given: the ids of the whole text, [B, columns or more].
            mask: of the same shape, 0 where a token is padding; None: nowhere.

        Raises:
            UserError: naming the first token that is another one.
        """
        read = self.ids(len(given), columns)
        if read is None:
            return
        again = given[:, :columns].to(read.device)
        other = again != read
        if mask is not None:
            other &= mask[:, :columns].to(read.device).bool()
        if bool(other.any()):
            row, column = other.nonzero()[0].tolist()
            raise UserError(
                f"the text that generate was given does not begin with the {columns} tokens that this cache has read: token "
                f"{column} of row {row} is {int(again[row, column])} and was {int(read[row, column])}; give the tokens that "
                "were read and generated as they are, with the new ones behind them, or a new cache"
            )
