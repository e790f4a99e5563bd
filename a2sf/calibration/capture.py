"""A pass under the full cache, with a look at every layer's queries, keys and values, and its output projection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from a2sf.hf.attention import UnsupportedModel, attached, check_finite, mixes_windows, rope_switch, running
from a2sf.hf.calls.logits import logits_at
from a2sf.hf.layer_check import layers_of

PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""What transformers' models call the projection after an attention."""


@dataclass(frozen=True)
class Layer:
    """What one layer's attention of one sequence was given, and what it gave: [1, H or K, T, D or V]."""

    number: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    output: Tensor


@dataclass
class Look:
    """A pass that prunes nothing and shows each layer to `see` (`a2sf.hf.attention.Pass`)."""

    layers: int
    see: Callable[[Layer], None]
    reached: set[int] = field(default_factory=set)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Full causal attention of one layer, [1, H, T, V].

        Raises:
            UnsupportedModel: if the layer has a window that is shorter than the sequence, or several attentions.
        """
        if window is not None and query.shape[2] > window:
            raise UnsupportedModel(f"layer {layer} has a window of {window} tokens of its own; give shorter --lengths")
        if layer in self.reached:
            raise UnsupportedModel(f"layer {layer} calls its attention several times, which cannot be calibrated")
        check_finite(layer, query=query, key=key, value=value)
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        self.reached.add(layer)
        self.see(Layer(layer, query, key, value, scale, output))
        return output


def look(model: PreTrainedModel, ids: Sequence[int], see: Callable[[Layer], None], last: int = 1) -> Tensor:
    """Read one sequence under the full cache and show each layer to `see`; the logits [last, vocabulary] of its end.

    Raises:
        UnsupportedModel: if the model cannot be looked at so.
    """
    with torch.inference_mode(), attached(model), running(Look(layers_of(model), see)):
        index = torch.arange(len(ids) - last, len(ids), device=model.device)
        return logits_at(model, index, input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)[0]


def check_model(model: PreTrainedModel, longest: int) -> None:
    """Refuse a model that settings of each layer mean nothing to, or that reads such passages otherwise than its others.

    Raises:
        UnsupportedModel: if it is one.
    """
    if mixes_windows(model.config):
        raise UnsupportedModel("the model mixes global layers with windows of its own, which cannot be calibrated")
    if longest > rope_switch(model.config):
        raise UnsupportedModel("--lengths go beyond where the model's rotary embedding changes; give shorter ones")


def projections(model: PreTrainedModel) -> dict[int, Tensor]:
    """Layer -> weights float32 [H * V, hidden] of the projection after its attention; biases cancel in differences.

    Raises:
        UnsupportedModel: if a layer's is not found.
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        named = [getattr(module, name, None) for name in PROJECTIONS]
        weights = [_weight(m) for m in named if isinstance(m, nn.Linear | Conv1D)]
        if isinstance(number, int) and weights and "attention" in type(module).__name__.lower():
            found[number] = weights[0].detach().float()
    if sorted(found) != list(range(layers_of(model))):
        told = f"{type(model).__name__} has no output projection of one of the names {', '.join(PROJECTIONS)} in each layer"
        raise UnsupportedModel(f"{told}, so that errors cannot be measured after it")
    return found


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(module, Conv1D) else weight.T
