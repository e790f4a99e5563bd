"""The wrappers that `torch.compile` and data parallelism put around a model. Tried with torch 2.13.0."""

from __future__ import annotations

from typing import Any

from torch import nn

_ORIGINAL = "_torchdynamo_orig_callable"


def compiled_from(function: Any) -> Any | None:
    """What `torch.compile` was given to make `function`; None where it did not make it."""
    return getattr(function, _ORIGINAL, None)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module's calls run compiled code."""
    return hasattr(module, _ORIGINAL) or module._compiled_call_impl is not None


def inside(module: Any) -> Any | None:
    """The module that a compiled or parallel one wraps; None where it wraps none."""
    parts = getattr(module, "_modules", {})
    return parts.get("_orig_mod", parts.get("module"))
