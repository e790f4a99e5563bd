"""A pass in which policies look at what the layers compute for some of its tokens: whole texts, from their first token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from a2sf.engine.state import Options, accumulation_dtype
from a2sf.hf.attention.errors import UnsupportedModel
from a2sf.hf.attention.function import Pass, active, running
from a2sf.policies.prepared import LayerRead


@dataclass
class Look:
    """A policy's function that sees one text of a pass, layer by layer.

    Attributes:
        function: called with each layer.
        columns: where the text's tokens are in the row, an int64 tensor [T] on the device that computes, or a slice.
        hidden_states: whether it sees the hidden states too.
        found: by layer, what it returned.
    """

    function: Callable[[LayerRead], Any]
    columns: Tensor | slice = field(default_factory=lambda: slice(None))
    hidden_states: bool = False
    found: dict[int, Any] = field(default_factory=dict)

    def at(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options, hidden: Tensor | None = None
    ) -> None:
        """Look at a layer.

        Args:
            query, key, value: [1, heads, tokens, D] of the row.
            options: as in `Pass.attend`.
            hidden: [1, tokens, hidden size].

        Raises:
            UnsupportedModel: if the layer was looked at before, or its hidden states are to be seen and are not known.
        """
        if layer in self.found:
            raise UnsupportedModel(
                "a layer of the model calls its attention several times, and the policy reads prompts before they are cut, "
                "which is not supported; choose another policy or model"
            )
        if self.hidden_states and (hidden is None or hidden.shape[:2] != (1, key.shape[2])):
            raise UnsupportedModel(
                f"what the attention of layer {layer} of the model reads is not known, and the policy uses hidden states; "
                "choose another policy or model"
            )
        q, k, v = (x[0][:, self.columns].to(accumulation_dtype(x.dtype)) for x in (query, key, value))
        seen = hidden[0][self.columns] if self.hidden_states and hidden is not None else None
        q = q.unflatten(0, (k.shape[0], -1))
        self.found[layer] = self.function(LayerRead(layer, q, k, v, options.scale, seen, options.softmax))

    def results(self, layers: int) -> list[Any]:
        """What the function returned for each of the model's `layers`, once all were read."""
        return [self.found[layer] for layer in range(layers)]


@dataclass
class _ObservedPass:
    """A pass over one row that `looks` see.

    Attributes:
        reading: what computes the attention.
        layers: attention layers of the model.
        hidden: by layer, the input of its attention, until it was looked at.
    """

    reading: Pass
    looks: Sequence[Look]
    layers: int
    hidden: dict[int, Tensor] = field(default_factory=dict)

    @property
    def reached(self) -> Set[int]:
        return self.reading.reached

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options, window: int | None
    ) -> Tensor:
        """Attention of one layer, [1, H, T, V]; first, because it refuses numbers that are not finite."""
        output = self.reading.attend(layer, query, key, value, options, window)
        hidden = self.hidden.pop(layer, None)
        for look in self.looks:
            look.at(layer, query, key, value, options, hidden)
        return output


@contextmanager
def running_with_looks(model: PreTrainedModel, reading: Pass, looks: Sequence[Look]) -> Iterator[None]:
    """As `running(reading)`, and `looks` see what the layers compute.

    Raises:
        UnsupportedModel: as `running` and `Look.at`.
    """
    if not looks:
        with running(reading):
            yield
        return
    seen = _ObservedPass(reading, looks, reading.layers)
    with hidden_noted(model, seen.hidden, seen, looks), running(seen):
        yield


@contextmanager
def hidden_noted(
    model: PreTrainedModel, hidden: dict[int, Tensor], reading: Pass, looks: Sequence[Look]
) -> Iterator[None]:
    """In the pass `reading`, note in `hidden` the input of each layer's attention, if one of `looks` is to see it."""

    def note(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        found = given.get("hidden_states", args[0] if args else None)
        if active.get() is reading and isinstance(found, Tensor):  # another thread may call the model too
            hidden[module.layer_idx] = found  # type: ignore[index]

    attentions = [
        m
        for m in (model.modules() if any(look.hidden_states for look in looks) else ())
        if isinstance(getattr(m, "layer_idx", None), int) and "attention" in type(m).__name__.lower()
    ]
    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in attentions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
