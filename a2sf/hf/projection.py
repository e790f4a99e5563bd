"""The projection after the attention of each layer of a model: for policies that weigh values by what it makes of them.

A short computation shows that it is the right one: its input are the outputs of the layer's heads, one after the other, and
its output is that of its weights. A model with a gate or a norm between the two, or with other weights, is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from a2sf.engine.state import Options
from a2sf.hf.attention import UnsupportedModel
from a2sf.hf.attention.function import attached, running
from a2sf.hf.attention.plan import Plan
from a2sf.hf.calls.around import bare, idle
from a2sf.hf.devices import input_device
from a2sf.hf.exactness import length_for, reported, tokens_of
from a2sf.hf.found import Part
from a2sf.hf.layer_check import layers_of, unpruned
from a2sf.policies.base import Policy
from a2sf.policies.model.rotary import Projection

PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""Names of the projection after the attention in transformers' models."""
TOKENS = 4
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""How much what the weights give may differ from what the model computes, relative to its size; elsewhere `LOOSE`."""
LOOSE = 0.03

_found: weakref.WeakKeyDictionary[PreTrainedModel, tuple[list[Part], tuple[Projection, ...]]] = (
    weakref.WeakKeyDictionary()
)


def projections_for(model: PreTrainedModel, policy: Policy) -> tuple[Projection, ...] | None:
    """The output projection of each layer, if the policy needs it; else None.

    Raises:
        UnsupportedModel: if it needs it, and the projection of a layer is not found.
    """
    return projections_of(model) if policy.projected else None


def projections_of(model: PreTrainedModel) -> tuple[Projection, ...]:
    """The output projection of each layer; it is looked for once per model, and again where the model was changed.

    The weights are the model's own, not a copy, so that they are right also while it is trained.

    Raises:
        UnsupportedModel: if the projection of a layer is not found.
    """
    known = _found.get(model)
    if known is None or any(part.changed for part in known[0]):
        seen = _found_in(model)
        heads = ((at.kv_heads, at.heads // at.kv_heads, -1) for at in seen)
        given = tuple(Projection(at.own.unflatten(0, n)) for at, n in zip(seen, heads, strict=True))
        known = _found[model] = [Part(at.parent, at.name, "weight") for at in seen], given
    return known[1]


def projections(model: PreTrainedModel) -> dict[int, Tensor]:
    """The output projection of each layer: index of the layer -> weights, float32 [H * V, hidden].

    Biases are left out, because they cancel in differences.

    Raises:
        UnsupportedModel: if the projection of a layer is not found.
    """
    return {number: at.weight for number, at in enumerate(_found_in(model))}


@dataclass
class _Layer:
    """The projection of one layer, and what a short pass showed of it.

    Attributes:
        parent: the layer's attention.
        name: the name of the projection in it.
        heads, kv_heads: query and key/value heads of the layer.
        attended: [T, H * V], the heads' outputs; None before the pass.
        given, made: its input and output of the same tokens, [T, H * V] and [T, hidden].
        times: how many times the layer computed an attention.
    """

    parent: nn.Module
    name: str
    heads: int = 0
    kv_heads: int = 0
    attended: Tensor | None = None
    given: Tensor | None = None
    made: Tensor | None = None
    times: int = 0

    @property
    def module(self) -> nn.Module:
        """The projection."""
        return getattr(self.parent, self.name)

    @property
    def own(self) -> Tensor:
        """The model's own weights, [H * V, hidden]."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return (weight if isinstance(self.module, Conv1D) else weight.T).detach()

    @property
    def weight(self) -> Tensor:
        """float32 [H * V, hidden]."""
        return self.own.float()

    @property
    def known(self) -> bool:
        """Whether it maps the outputs of the heads, by its weights."""
        if self.times != 1 or self.attended is None or self.given is None or self.made is None:
            return False
        if self.attended.shape != self.given.shape or self.weight.shape[0] != self.given.shape[1]:
            return False
        bias = self.module.bias
        by_weights = self.given.float() @ self.weight.to(self.given.device)
        by_weights = by_weights + bias.detach().float() if isinstance(bias, Tensor) else by_weights
        return _near(self.attended.to(self.given.device), self.given) and _near(by_weights, self.made)


def _near(x: Tensor, like: Tensor) -> bool:
    error = (x.float() - like.float()).square().mean().sqrt()
    return bool(error <= TOLERANCE.get(like.dtype, LOOSE) * like.float().square().mean().sqrt())


@dataclass
class _Recording(Plan):
    """A pass that notes the output of each layer's attention in `seen`."""

    seen: dict[int, _Layer] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options, window: int | None
    ) -> Tensor:
        output = super().attend(layer, query, key, value, options, window)
        at = self.seen[layer]
        at.heads, at.kv_heads, at.times = query.shape[1], key.shape[1], at.times + 1
        at.attended = output[0].transpose(0, 1).flatten(1)
        return output


def _found_in(model: PreTrainedModel) -> list[_Layer]:
    """The projection of each layer, by the layers' numbers.

    Raises:
        UnsupportedModel: if that of a layer is not found, or does something else.
    """
    seen: dict[int, _Layer] = {}
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        linear = [name for name in PROJECTIONS if isinstance(getattr(module, name, None), nn.Linear | Conv1D)]
        if isinstance(number, int) and linear and "attention" in type(module).__name__.lower():
            seen[number] = _Layer(module, linear[0])
    if sorted(seen) != list(range(layers_of(model))):
        raise UnsupportedModel(
            f"{type(model).__name__} does not have an output projection named {', '.join(PROJECTIONS)} in each layer, "
            "so that nothing after the projection can be measured"
        )
    tokens = length_for(model, TOKENS)
    plan = _Recording.of_one(tokens, unpruned(model), model.config, seen=seen)
    ids = torch.tensor([tokens_of(model, 1, tokens)[0]], device=input_device(model))
    with torch.inference_mode(), idle(model), reported(model), attached(model), running(plan), _noting(seen):
        bare(model)(ids, use_cache=False)
    for number, at in sorted(seen.items()):
        if not at.known:
            raise UnsupportedModel(
                f"what follows the attention of layer {number} of {type(model).__name__} is not only a projection of its "
                "heads by plain weights, so that nothing after the projection can be measured"
            )
    return [seen[number] for number in sorted(seen)]


@contextmanager
def _noting(seen: dict[int, _Layer]) -> Iterator[None]:
    """Note the inputs and outputs of the projections."""

    def note(at: _Layer, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        at.given, at.made = (x.flatten(0, -2) for x in (args[0], output))

    hooks = [at.module.register_forward_hook(partial(note, at)) for at in seen.values()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
