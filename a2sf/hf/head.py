"""Logits of many columns, some at a time: the layers run once, the head as often as it takes.

A vocabulary is the widest thing in a model; the logits of a pass of 1,024 tokens would often be larger than all else in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from a2sf.hf.calls import logits_at
from a2sf.hf.devices import is_spread

ROWS = 128
"""Columns whose logits are in memory at a time."""


def logits_in_parts(model: PreTrainedModel, index: Tensor, **inputs: Any) -> Iterator[Tensor]:
    """The logits [B, n, vocabulary] at the columns `index` (int64), at most `ROWS` columns at a time; as `logits_at`.

    What the model does after its layers is done once per part, by the model itself.

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
        rest = []  # its layers are run in another way, so they must run again for what else is asked
        if len(first) < len(index):
            logits = logits_at(model, index, **inputs)
    yield logits
    del logits
    for part in rest:
        with _gives(base, ran[0]):
            yield logits_at(model, part, **inputs)


@contextmanager
def _gives(module: nn.Module, output: Any) -> Iterator[None]:
    """Calls of one module give `output` for a while."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
