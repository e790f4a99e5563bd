"""A long call through a bounded cache, read in parts: later tokens need nothing of earlier ones but the cache.

Only one part's activations are in memory at a time, and each layer's cache. A prompt that is cut at its end is read at once
up to there: then one layer after the other holds all of it for a short time (every layer, if the policy looks at all of them
before the cut); in parts every layer would hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from a2sf.hf.attention.masks import packs

TOKENS = {"cpu": 1024}
"""Tokens of a part, of all rows, by the kind of device; matrix products of more are hardly faster."""
ELSEWHERE = 8192
LEAST = 256
"""The smallest number of columns of a part, because the cache is moved once per part."""
TENSORS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"}
"""Arguments of a model's call that have one column per token."""
OF_ALL_TOKENS = ("output_hidden_states", "output_attentions", "output_router_logits")


def columns(rows: int, device: torch.device) -> int:
    """The number of columns of a part, for a batch of `rows` rows."""
    return max(LEAST, TOKENS.get(device.type, ELSEWHERE) // max(1, rows))


def bounds(total: int, most: int, first: int = 0) -> list[int]:
    """Where parts of about `most` columns end: the last at `total`, none before `first`; [total]: read it at once."""
    rest = total - first
    if rest <= (most // 2 if first else most + most // 2):
        return [total]
    parts = -(-rest // most)
    return ([first] if first else []) + [first + rest * (i + 1) // parts for i in range(parts)]


def splits(model: PreTrainedModel, named: dict[str, Any]) -> bool:
    """Whether the outputs of a call's parts are enough for its output; `named` are its arguments."""
    config, mask = model.config, named.get("attention_mask")
    if named.get("labels") is not None or not isinstance(named.get("logits_to_keep", 0), int):
        return False
    if not (config.return_dict if named.get("return_dict") is None else named["return_dict"]):
        return False
    if any(getattr(config, n, False) if named.get(n) is None else named[n] for n in OF_ALL_TOKENS):
        return False
    if packs(named):
        return False  # a part does not show where sequences begin
    return {n for n, x in named.items() if isinstance(x, Tensor)} <= TENSORS and (mask is None or mask.ndim == 2)


@dataclass(frozen=True)
class ModelCall:
    """A model's call of `total` columns that `splits`: `run` reads some of the columns, `named` are its arguments."""

    run: Callable[..., Any]
    named: dict[str, Any]
    total: int

    @property
    def wanted(self) -> int:
        """The number of last columns whose logits the caller wants."""
        return self.named.get("logits_to_keep", 0) or self.total

    def part(self, begin: int, end: int) -> dict[str, Any]:
        """The arguments for the columns `[begin, end)`."""
        part = dict(self.named)
        for name in TENSORS & part.keys():
            x = part[name]
            if not isinstance(x, Tensor):
                continue
            if name == "attention_mask":
                part[name] = x[:, : x.shape[1] - self.total + end]
            elif name == "inputs_embeds":
                part[name] = x[:, begin:end]
            else:
                part[name] = x[..., begin:end]
        if "logits_to_keep" in part:
            part["logits_to_keep"] = max(1, end - max(begin, self.total - self.wanted))
        return part

    def read(self, ends: list[int]) -> list[Tensor]:
        """Call the model on all parts but the last; returns what the caller wants of them, in order."""
        found, begin = [], 0
        for end in ends[:-1]:
            output = self.run(**self.part(begin, end))
            if end > self.total - self.wanted:
                found.append(output[_what(output)])
            begin = end
        return found

    def last(self, ends: list[int]) -> Any:
        """The output of the last part, which may be the whole call."""
        return self.run(**(self.part(ends[-2], ends[-1]) if len(ends) > 1 else self.named))


def joined(before: list[Tensor], output: ModelOutput, hidden: Any = None) -> ModelOutput:
    """The output of a call whose last part gave `output`, without `hidden`, a cache that the caller did not give."""
    shown = {name: x for name, x in output.items() if hidden is None or x is not hidden}
    if before:
        name = _what(output)
        shown[name] = torch.cat([*before, output[name]], 1)
    return type(output)(**shown)


def _what(output: ModelOutput) -> str:
    return "logits" if "logits" in output else "last_hidden_state"
