"""What was found out about a model once, and whether the model still is as it was then."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn


class Part:
    """A tensor of a model's module, which stays the same while its values change, and not if another is put in its place.

    Args:
        parent: a module.
        name: the name of a module in it; "": the parent itself.
        tensor: the name of that module's tensor.
    """

    def __init__(self, parent: nn.Module, name: str, tensor: str) -> None:
        self._parent, self._name, self._tensor = weakref.ref(parent), name, tensor
        self._was = self._now()

    @property
    def changed(self) -> bool:
        """Whether the model computes with another tensor now, or something else was hung on the module."""
        return self._now() != self._was

    def _now(self) -> Any:
        parent = self._parent()
        module = getattr(parent, self._name, None) if self._name else parent
        if module is None:
            return None
        tensor = getattr(module, self._tensor, None)
        of = (tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape) if isinstance(tensor, Tensor) else tensor
        hooks = tuple(module._forward_hooks), tuple(module._forward_pre_hooks)
        return id(module), type(module), of, hooks, id(vars(module).get("forward"))
