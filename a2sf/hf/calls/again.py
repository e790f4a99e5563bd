"""Wraps what `generate` makes a call's inputs with: there the text is whole, of which a cache has read the beginning."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from a2sf.hf.calls.wrapped import Wrapped, cache_in

NAME = "prepare_inputs_for_generation"


@runtime_checkable
class RemembersText(Protocol):
    """A cache that knows which tokens it has read.

    Attributes:
        begins_turn: whether `generate` was given this cache, and no call came since.
        columns: how many columns were read.
    """

    begins_turn: bool
    columns: int

    def check_again(self, given: Tensor, mask: Tensor | None) -> None:
        """Refuse a text `given` [B, columns or more] that does not begin with what was read."""
        ...


class Preparing(Wrapped):
    """The `prepare_inputs_for_generation` of a pruned model: the model's own, after a check of what was read."""

    def __init__(self, model: PreTrainedModel, own: Callable[..., Any] | None = None) -> None:
        super().__init__(model, own)
        self.__signature__ = inspect.signature(own or getattr(model, NAME))
        self._names = list(self.__signature__.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(self._names, args, strict=False)) | kwargs
        cache = cache_in(named)
        if isinstance(cache, RemembersText) and cache.begins_turn and _is_whole(named, cache.columns):
            cache.check_again(named["input_ids"], named.get("attention_mask"))
        model = self._of()
        return (self._own or getattr(type(model), NAME).__get__(model))(*args, **kwargs)


def _is_whole(named: dict[str, Any], read: int) -> bool:
    """Whether a call is given a whole text, of which `read` columns were read, and not new tokens alone."""
    ids, new = named.get("input_ids"), named.get("next_sequence_length")
    if not isinstance(ids, Tensor) or new is None or named.get("inputs_embeds") is not None:
        return False
    return read > 0 and new > 0 and ids.shape[1] == read + new


def compare_again(model: PreTrainedModel) -> None:
    """Wrap a model's `prepare_inputs_for_generation`, once; a model that does not generate has none."""
    found = vars(model).get(NAME)
    if hasattr(model, NAME) and not (isinstance(found, Preparing) and found._model() is model):
        setattr(model, NAME, Preparing(model, found))
