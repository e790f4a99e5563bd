"""Reads texts with a model for a policy that prepares a prompt's cut (`Policy.prepare`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from a2sf.engine.state import accumulation_dtype
from a2sf.errors import PolicyError, UserError, place
from a2sf.hf.attention.errors import UnsupportedModel
from a2sf.hf.attention.function import active, attached, running
from a2sf.hf.attention.plan import Plan
from a2sf.hf.attention.windows import global_layers
from a2sf.hf.calls.around import bare, idle
from a2sf.hf.devices import input_device
from a2sf.hf.layer_check import layers_of, positions_of, unpruned
from a2sf.policies.base import Policy
from a2sf.policies.prepared import LayerRead, Numbers, Prepared

T = TypeVar("T")


@dataclass
class _Looking(Plan):
    """A pass with the full cache in which something looks at every layer.

    Attributes:
        shows_hidden: whether it sees the hidden states too.
        hidden: by layer, the input of its attention, until it was looked at.
    """

    look: Callable[[LayerRead], Any] | None = None
    found: dict[int, Any] = field(default_factory=dict)
    shows_hidden: bool = False
    hidden: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        if layer in self.found:
            raise UnsupportedModel(
                "a layer of the model calls its attention several times, and the policy reads prompts before they are cut, "
                "which is not supported; choose another policy or model"
            )
        assert self.look is not None
        hidden = self.hidden.pop(layer, None)
        if self.shows_hidden and (hidden is None or hidden.shape[:2] != (1, key.shape[2])):
            raise UnsupportedModel(
                f"what the attention of layer {layer} of the model reads is not known, and the policy uses hidden states; "
                "choose another policy or model"
            )
        q, k, v = (x[0].to(accumulation_dtype(x.dtype)) for x in (query, key, value))
        self.found[layer] = self.look(
            LayerRead(layer, q.unflatten(0, (k.shape[0], -1)), k, v, scale, None if hidden is None else hidden[0])
        )
        return super().attend(layer, query, key, value, scale, window)


@dataclass(frozen=True)
class ModelReader:
    """A `Reader` of a model.

    Attributes:
        hidden_states: whether `LayerRead` has the hidden states.
    """

    model: PreTrainedModel
    hidden_states: bool = False

    @property
    def layers(self) -> int:
        return layers_of(self.model)

    def read(self, tokens: Sequence[int], look: Callable[[LayerRead], T]) -> list[T]:
        """Read a text with the full cache, and return what `look` makes of each layer.

        Raises:
            UserError: if the text is longer than what the model can read.
        """
        most = positions_of(self.model)
        if len(tokens) > most:
            raise UserError(
                f"the policy reads {len(tokens)} tokens before a cut, and the model has {most} positions; use shorter "
                "prompts"
            )
        plan = _Looking.of_one(len(tokens), unpruned(self.model), self.model.config)
        plan.look, plan.shows_hidden = look, self.hidden_states
        ids = torch.tensor([list(tokens)], device=input_device(self.model))
        with torch.inference_mode(), idle(self.model), attached(self.model), running(plan), _noting(self.model, plan):
            # without the head: logits of all tokens would take more memory than all layers
            bare(self.model)(ids, use_cache=False, logits_to_keep=1)
        return [plan.found[layer] for layer in range(self.layers)]


@contextmanager
def _noting(model: PreTrainedModel, plan: _Looking) -> Iterator[None]:
    """Note in `plan` what the attention of each layer is called with, if it is to be shown."""

    def note(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        hidden = given.get("hidden_states", args[0] if args else None)
        if active.get() is plan and isinstance(hidden, Tensor):  # another thread may call the model too
            plan.hidden[module.layer_idx] = hidden  # type: ignore[index]

    attentions = [
        m
        for m in (model.modules() if plan.shows_hidden else ())
        if isinstance(getattr(m, "layer_idx", None), int) and "attention" in type(m).__name__.lower()
    ]
    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in attentions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def prepared_for(model: PreTrainedModel, policy: Policy, tokens: Sequence[int]) -> Prepared:
    """What `policy` prepares for a prompt.

    Raises:
        PolicyError: if its own code fails, or returns something else than it must.
    """
    reader = ModelReader(model, policy.hidden_states)
    try:
        found = policy.prepare(reader, list(tokens))
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        at = place(error)
        where = f" ({at})" if at else ""
        raise PolicyError(f"policy {policy.name} fails in prepare: {type(error).__name__}: {error}{where}") from error
    if not isinstance(found, Prepared):
        raise PolicyError(f"policy {policy.name} prepares a {type(found).__name__}; prepare must return a Prepared")
    for name, given in (("numbers", found.numbers), ("shares", found.shares)):
        if given is not None and len(given) != reader.layers:
            raise PolicyError(
                f"policy {policy.name} prepares {name} for {len(given)} layers, and the model has {reader.layers}"
            )
    numbers = found.numbers and tuple(Numbers(n.of.detach().cpu()) for n in found.numbers)
    return replace(found, numbers=numbers, acts=tuple(global_layers(model.config)))
