"""Inputs and outputs of every attention layer in a pass with the full cache, and the output projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from a2sf.engine.kernels import attend
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Options, Segments
from a2sf.hf.attention import UnsupportedModel, attached, check_finite, mixes_windows, rope_switch, running
from a2sf.hf.calls.logits import logits_at
from a2sf.hf.layer_check import layers_of
from a2sf.hf.projection import projections as projections
from a2sf.policies.base import UNLIMITED, Retention


@dataclass(frozen=True)
class Captured:
    """Inputs and output of one layer's attention for one sequence.

    Attributes:
        number: index of the layer, from 0.
        query: [1, H, T, D].
        key: [1, K, T, D].
        value: [1, K, T, V].
        options: how the layer computes its attention.
        output: [1, H, T, V], before the output projection.
    """

    number: int
    query: Tensor
    key: Tensor
    value: Tensor
    options: Options
    output: Tensor


@dataclass
class Capture:
    """A pass with the full cache that gives each layer to `callback` (see `a2sf.hf.attention.Pass`)."""

    layers: int
    callback: Callable[[Captured], None]
    reached: set[int] = field(default_factory=set)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options, window: int | None
    ) -> Tensor:
        """Full causal attention of one layer, [1, H, T, V].

        Raises:
            UnsupportedModel: if the layer has a window shorter than the sequence, or several attentions.
        """
        if window is not None and query.shape[2] > window:
            raise UnsupportedModel(f"layer {layer} has a sliding window of {window} tokens; give shorter --lengths")
        if layer in self.reached:
            raise UnsupportedModel(f"layer {layer} calls its attention several times, which cannot be calibrated")
        check_finite(layer, query=query, key=key, value=value)
        output = _full_attention(query, key, value, options)
        self.reached.add(layer)
        self.callback(Captured(layer, query, key, value, options, output))
        return output


def _full_attention(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """Causal attention of one sequence, [1, H, T, V]."""
    if not options.softmax.plain:
        everything = BatchRetention.of([Retention(budget=UNLIMITED)])
        segments = Segments.of_rows(everything, torch.tensor([query.shape[2]]))
        return attend(query, key, value, segments, options).output
    return nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=options.scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def capture(model: PreTrainedModel, ids: Sequence[int], callback: Callable[[Captured], None], last: int = 1) -> Tensor:
    """Run one sequence through the model with the full cache, and call `callback` with each layer's inputs and output.

    Args:
        model: a transformers model.
        ids: token ids of the sequence.
        callback: called once for each layer, in order.
        last: for how many tokens at the end logits are computed.

    Returns:
        The logits [last, vocabulary].

    Raises:
        UnsupportedModel: if the layers' attention cannot be captured.
    """
    with torch.inference_mode(), attached(model), running(Capture(layers_of(model), callback)):
        index = torch.arange(len(ids) - last, len(ids), device=model.device)
        return logits_at(model, index, input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)[0]


def check_model(model: PreTrainedModel, longest: int) -> None:
    """Refuse a model that cannot be calibrated on passages of up to `longest` tokens.

    Raises:
        UnsupportedModel: if some layers have a sliding window and others have none, or if the rotary embedding changes
            within `longest` tokens.
    """
    if mixes_windows(model.config):
        raise UnsupportedModel("the model mixes full attention with sliding windows, which cannot be calibrated")
    if longest > rope_switch(model.config):
        raise UnsupportedModel("the model's rotary embedding changes within --lengths; give shorter ones")
