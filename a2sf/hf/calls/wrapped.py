"""Callables that stand on a model in place of one of its methods."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self

from transformers import PreTrainedModel

from a2sf.errors import UserError
from a2sf.hf.attention.masks import CACHE_NAMES


class Wrapped:
    """A method of a model that is wrapped: an attribute of the model, which is copied and pickled with it.

    Args:
        own: the attribute's earlier value; None: there was none, and the class's method is called.
    """

    def __init__(self, model: PreTrainedModel, own: Callable[..., Any] | None = None) -> None:
        self._model, self._own = weakref.ref(model), own  # a reference would keep a model until it is collected

    def _of(self) -> PreTrainedModel:
        """The model.

        Raises:
            UserError: if it no longer exists.
        """
        model = self._model()
        if model is None:
            raise UserError("this model is a shallow copy of one that no longer exists; copy models by copy.deepcopy")
        return model

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._of(), self._own)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Self:
        return type(self)(copy.deepcopy(self._of(), memo), copy.deepcopy(self._own, memo))


def cache_in(named: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments; None: there is none."""
    return next((named[n] for n in CACHE_NAMES if named.get(n) is not None), None)
