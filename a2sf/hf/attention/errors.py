"""What is refused of a model's attention: what the engine does not compute, and NaN or infinity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from a2sf.errors import UserError

REMEDIES = {
    torch.float16: "float16 ends at 65504, so try model.dtype=bfloat16 or float32",
    torch.bfloat16: "try model.dtype=float32",
}


class UnsupportedModel(UserError):
    """A model whose attention cannot be pruned exactly through AttentionInterface."""


class NonFiniteError(UserError):
    """NaN or infinity in a number that a result depends on.

    Attributes:
        where: what holds it, such as "the key of layer 3".
        dtype: what the model computes in.
        rows: the rows of the batch, or the segments of a packed row, that hold it; empty where they are not known.
        subject: the document, where it is known.
    """

    def __init__(self, where: str, dtype: torch.dtype, rows: Sequence[int] = (), subject: str = "") -> None:
        self.where, self.dtype, self.rows, self.subject = where, dtype, tuple(rows), subject
        name = str(dtype).removeprefix("torch.")
        remedy = REMEDIES.get(dtype, "the weights may be damaged, so load them anew or look at them")
        if rows and not subject:
            where += f" (row {', '.join(map(str, self.rows))} of the batch)"
        super().__init__(
            f"{subject + ': ' if subject else ''}NaN or infinity in {where}, computed in {name}; the result would be "
            f"meaningless, {remedy}"
        )

    def about(self, subject: str) -> NonFiniteError:
        """The same error, with the document that it concerns."""
        return NonFiniteError(self.where, self.dtype, self.rows, subject)


def check_finite(
    layer: int, tokens: tuple[Sequence[int], Sequence[int], Sequence[int]] | None = None, **tensors: Tensor
) -> None:
    """Raise `NonFiniteError` if one of the tensors [B, heads, T, D] of layer `layer` holds NaN or infinity.

    Args:
        tokens: row, first column and number of the tokens that count, per segment; None: all. Padding does not count.
    """
    for name, tensor in tensors.items():
        low, high = tensor.aminmax()
        # NaN and infinity both survive minimum and maximum; one pass, nothing allocated
        if torch.isfinite(high - low if tensor.dtype == torch.float64 else high.double() - low.double()):
            continue
        bad = ~torch.isfinite(tensor).all(-1).all(1).cpu()
        rows = bad.any(1).nonzero()[:, 0].tolist()
        if tokens is not None:
            pieces = enumerate(zip(*tokens, strict=True))
            rows = [i for i, (row, start, n) in pieces if bad[int(row), int(start) : int(start) + int(n)].any()]
        if rows:
            raise NonFiniteError(f"the {name} of layer {layer}", tensor.dtype, rows)
