"""Logits of many columns, some at a time: the layers run once, the output head as often as needed.

The logits of a pass of 1,024 tokens would often take more memory than anything else in the pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from a2sf.compat.transformers import is_spread
from a2sf.hf.attention.errors import NonFiniteError, UnsupportedModel

ROWS = 128
"""Columns whose logits are in memory at a time."""


def logits_in_parts(model: PreTrainedModel, index: Tensor, **inputs: Any) -> Generator[Tensor, None, None]:
    """The logits [B, n, vocabulary] at the columns `index` (int64), at most `ROWS` columns at a time; as `logits_at`.

    The model itself computes what follows its layers, once per part.

    Raises:
        UnsupportedModel: as `logits_at`.
    """
    base = model.base_model
    able = "logits_to_keep" in inspect.signature(model.forward).parameters and base is not model
    first, *rest = index.split(ROWS) if able and not is_spread(model) else (index,)
    ran: list[Any] = []
    hook = base.register_forward_hook(lambda module, given, output: ran.append(output))
    try:
        logits = logits_at(model, first, **inputs)
    finally:
        hook.remove()
    if len(ran) != 1:
        rest = []  # its layers run in another way, so that all logits need another call
        if len(first) < len(index):
            logits = logits_at(model, index, **inputs)
    yield logits
    del logits
    for part in rest:
        with _returning(base, ran[0]):
            yield logits_at(model, part, **inputs)


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Calls of a module return `output` inside the block."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def check_output(output: Any, real: Tensor | None) -> None:
    """Refuse a model's output that is NaN or infinity where a token counts.

    Some entries of a vocabulary may be -infinity, as models mark those that no token uses, but not all.

    Args:
        output: of the model, with logits [B, columns, vocabulary] of at least the last columns.
        real: bool [B, T], False for padding; None: every token counts.

    Raises:
        NonFiniteError: if it is, with the rows.
    """
    found = (getattr(output, "logits", None), getattr(output, "last_hidden_state", None))
    values = next((x for x in found if x is not None), output[0] if isinstance(output, tuple) else None)
    if not isinstance(values, Tensor) or values.ndim != 3:
        return
    largest = values.detach().amax(-1)  # NaN wins, so do +infinity, and -infinity where nothing else is
    if bool(torch.isfinite(largest).all()):
        return
    bad = ~torch.isfinite(largest)
    if real is not None and real.shape[1] >= bad.shape[1]:
        bad &= real[:, real.shape[1] - bad.shape[1] :].to(bad.device)
    if rows := bad.any(1).nonzero()[:, 0].tolist():
        where = "the logits" if found[0] is not None else "the hidden states"
        raise NonFiniteError(where, values.dtype, rows)


def logits_at(model: PreTrainedModel, index: Tensor, call: Callable[..., Any] | None = None, **inputs: Any) -> Tensor:
    """The model's logits [B, len(index), vocabulary] at the columns `index` (int64) of its input.

    Only those are computed, if the model can do that. `call` is called instead of the model.

    Raises:
        UnsupportedModel: if the model gives logits of other columns.
    """
    columns = inputs["input_ids"].shape[1]
    selects = "logits_to_keep" in inspect.signature(model.forward).parameters
    # accelerate would move a tensor to the first device, not to that of the last layer
    at = index.tolist() if is_spread(model) else index
    logits = (call or model)(**inputs, **({"logits_to_keep": at} if selects else {})).logits
    if logits.shape[1] == columns != len(index):
        return logits[:, index]
    if logits.shape[1] != len(index):
        raise UnsupportedModel(
            f"{type(model).__name__} should give the logits of {len(index)} of {columns} tokens and gave "
            f"{logits.shape[1]}; choose another model"
        )
    return logits
