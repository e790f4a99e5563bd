"""A pruned cache as plain tensors and numbers: `torch.save` writes them, and a cache of another process takes them over."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from a2sf.engine.state import EvictionState
from a2sf.errors import UserError
from a2sf.policies.base import Policy, Retention
from a2sf.policies.schedule import Schedule

FORMAT = 1
OF_MODEL = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
"""What must be the same of the model that goes on."""


class ModelRef:
    """A model that is not kept alive; a copy made with the model is of the model's copy."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._ref = weakref.ref(model)

    def __call__(self) -> PreTrainedModel | None:
        return self._ref()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRef:
        model = self._ref()
        return self if model is None else ModelRef(memo.get(id(model), model))

    def __reduce__(self) -> Any:
        raise UserError(
            "a pruned cache cannot be pickled, because it is one of a model; give cache.stored() to torch.save, and what it "
            "holds to PrunedCache(model, ...).load(...)"
        )


def settings(model: PreTrainedModel, policy: Policy, schedule: Schedule, kept: Sequence[Sequence[Retention]]) -> dict:
    """What a stored cache and the one that goes on must have in common."""
    config = model.config.get_text_config()
    numbers = [[(k.budget, k.recent, k.sinks, k.forgetting_factor) for k in row] for row in kept]
    return {
        "model": {name: getattr(config, name, None) for name in OF_MODEL},
        "policy": repr(policy),
        "schedule": schedule.name,
        "kept": torch.tensor(numbers, dtype=torch.float64),
    }


def check(stored: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse what was stored with another model, policy, schedule or budget than are `here`.

    Raises:
        UserError: if it was.
    """
    for name in ("model", "policy", "schedule"):
        if stored[name] != here[name]:
            raise UserError(f"the {name} of a stored cache is {stored[name]} and this cache's is {here[name]}")
    if not torch.equal(stored["kept"], here["kept"]):
        budgets = [sorted(set(s["kept"][..., 0].long().flatten().tolist())) for s in (stored, here)]
        raise UserError(
            f"a stored cache keeps {budgets[0]} tokens and this one {budgets[1]}, or others of them; make the "
            "cache with the same budget and max_new_tokens"
        )


def tensors_of(state: EvictionState) -> dict[str, Tensor]:
    """A state's tensors by name, in memory of their own on the CPU."""
    return {name: x.detach().cpu().clone() for name, x in state.tensors().items()}


def is_stored(given: Any) -> bool:
    """Whether it is what `PrunedCache.stored` gave.

    Raises:
        UserError: if a later version gave it.
    """
    if not isinstance(given, Mapping) or "format" not in given:
        return False
    if given["format"] != FORMAT:
        raise UserError(f"a cache stored in format {given['format']} is not read by this version, which knows {FORMAT}")
    return True
