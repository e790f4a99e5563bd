"""The projection after the attention of each layer of a model: for policies that weigh values by what it makes of them."""

from __future__ import annotations

import weakref

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from a2sf.hf.attention import UnsupportedModel
from a2sf.hf.layer_check import layers_of
from a2sf.hf.loading.config import kv_heads_of
from a2sf.policies.base import Policy
from a2sf.policies.rotary import Projection

PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""Names of the projection after the attention in transformers' models."""

_found: weakref.WeakKeyDictionary[PreTrainedModel, tuple[Projection, ...]] = weakref.WeakKeyDictionary()


def projections_for(model: PreTrainedModel, policy: Policy) -> tuple[Projection, ...] | None:
    """The output projection of each layer, if the policy needs it; else None.

    Raises:
        UnsupportedModel: if it needs it, and the projection of a layer is not found.
    """
    return projections_of(model) if policy.projected else None


def projections_of(model: PreTrainedModel) -> tuple[Projection, ...]:
    """The output projection of each layer; it is looked for once per model.

    Raises:
        UnsupportedModel: if the projection of a layer is not found.
    """
    if model not in _found:
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        kv_heads = kv_heads_of(model.config) or heads
        weights = projections(model)
        _found[model] = tuple(
            Projection(weights[i].unflatten(0, (kv_heads, heads // kv_heads, -1))) for i in range(len(weights))
        )
    return _found[model]


def projections(model: PreTrainedModel) -> dict[int, Tensor]:
    """The output projection of each layer: index of the layer -> weights, float32 [H * V, hidden].

    Biases are left out, because they cancel in differences.

    Raises:
        UnsupportedModel: if the projection of a layer is not found.
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        named = [getattr(module, name, None) for name in PROJECTIONS]
        weights = [_weight(m) for m in named if isinstance(m, nn.Linear | Conv1D)]
        if isinstance(number, int) and weights and "attention" in type(module).__name__.lower():
            found[number] = weights[0].detach().float()
    if sorted(found) != list(range(layers_of(model))):
        raise UnsupportedModel(
            f"{type(model).__name__} does not have an output projection named {', '.join(PROJECTIONS)} in each layer, "
            "so that nothing after the projection can be measured"
        )
    return found


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(module, Conv1D) else weight.T
