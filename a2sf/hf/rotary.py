"""The rotary embedding of each layer of a model, found by a short computation: for policies that see keys before it.

A text of one repeated token has the same keys at all positions before the rotary embedding, in every layer: all values are
equal, so that attention gives the same output everywhere. So an embedding is the right one if undoing it makes the keys of
such a text equal, and no part of the model's code has to be known. Learned attention sinks are left out while it is looked
for: they are no tokens, so that they would make the output depend on how many tokens there are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from a2sf.engine.state import Options
from a2sf.hf.attention.errors import UnsupportedModel
from a2sf.hf.attention.function import attached, running
from a2sf.hf.attention.plan import Plan
from a2sf.hf.attention.windows import rope_switch
from a2sf.hf.calls.around import bare, idle
from a2sf.hf.devices import input_device
from a2sf.hf.exactness import length_for, reported, tokens_of
from a2sf.hf.found import Part
from a2sf.hf.layer_check import unpruned
from a2sf.policies.base import Policy
from a2sf.policies.model.rotary import Rotary
from a2sf.policies.model.softmax import PLAIN

TOKENS = 24
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""How much unrotated keys may differ, relative to their size; elsewhere `LOOSE`."""
LOOSE = 0.03

_found: weakref.WeakKeyDictionary[PreTrainedModel, tuple[list[Part], tuple[Rotary | None, ...]]] = (
    weakref.WeakKeyDictionary()
)


def rotary_for(model: PreTrainedModel, policy: Policy) -> tuple[Rotary | None, ...] | None:
    """The rotary embedding of each layer, if the policy needs it; else None. A layer without one has None.

    Raises:
        UnsupportedModel: if it needs it, and the model's is not known.
    """
    return rotary_of(model) if policy.unrotated else None


def rotary_of(model: PreTrainedModel) -> tuple[Rotary | None, ...]:
    """The rotary embedding of each layer; None for a layer without one. It is looked for once per model, and again
    where the model has other frequencies now (as one that is cast to another dtype).

    Raises:
        UnsupportedModel: if it is not known, or changes with the length of the text.
    """
    known = _found.get(model)
    if known is None or any(part.changed for part in known[0]):
        given = _find(model)
        known = _found[model] = [Part(module, "", name) for module, name in _frequencies(model)], given
    return known[1]


def _find(model: PreTrainedModel) -> tuple[Rotary | None, ...]:
    if rope_switch(model.config) < float("inf"):
        raise UnsupportedModel(
            f"the rotary embedding of {type(model).__name__} changes with the length of a text, so keys before it are not "
            "known; choose another policy"
        )
    keys = _keys_of_one_token(model)
    candidates = [None, *_candidates(model)]
    found = []
    for layer in sorted(keys):
        fitting = [r for r in candidates if _constant(keys[layer], r)]
        if not fitting:
            raise UnsupportedModel(
                f"the keys of layer {layer} of {type(model).__name__} depend on positions in another way than by a rotary "
                "embedding that is known, and the policy sees keys before it; choose another policy or model"
            )
        found.append(fitting[0])
    return tuple(found)


@dataclass
class _Recording(Plan):
    """A pass that notes the keys of each layer, [K, T, D]."""

    keys: dict[int, Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options, window: int | None
    ) -> Tensor:
        self.keys.setdefault(layer, key[0].detach().clone())
        # learned sinks would take less and less attention from token to token
        return super().attend(layer, query, key, value, replace(options, softmax=PLAIN), window)


def _keys_of_one_token(model: PreTrainedModel) -> dict[int, Tensor]:
    tokens = length_for(model, TOKENS)
    plan = _Recording.of_one(tokens, unpruned(model), model.config)
    ids = torch.tensor([tokens_of(model, 1, 1)[0] * tokens], device=input_device(model))
    call = bare(model)
    with torch.inference_mode(), idle(model), reported(model), attached(model), running(plan):
        call(ids, use_cache=False)
    return plan.keys


def _candidates(model: PreTrainedModel) -> Iterator[Rotary]:
    """The rotary embeddings that modules of the model hold, with both ways to pair numbers."""
    for module, name in _frequencies(model):
        scaling = getattr(module, name.removesuffix("inv_freq") + "attention_scaling", 1.0)
        for interleaved in (False, True):
            yield Rotary(module.get_buffer(name).float(), float(scaling), interleaved)


def _frequencies(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str]]:
    """The modules that hold frequencies, and the names of the buffers in which they do."""
    for module in model.modules():
        for name, _ in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name:
                yield module, name


def _constant(keys: Tensor, rotary: Rotary | None) -> bool:
    """Whether keys [K, T, D] are the same at all positions once the embedding is undone."""
    x = keys.float()
    if rotary is not None:
        if 2 * len(rotary.frequencies) > x.shape[-1]:
            return False
        x = rotary.unrotate(x, torch.arange(x.shape[1], device=x.device))
    spread = (x - x[:, :1]).square().mean().sqrt()
    return bool(spread <= TOLERANCE.get(keys.dtype, LOOSE) * x.square().mean().sqrt())
