"""A pruned cache as plain tensors and numbers, which `torch.save` can write and another process can load."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from a2sf.engine.state import EvictionState
from a2sf.errors import UserError
from a2sf.hf.cache.budgets import retention_of_prompts
from a2sf.hf.calls.read_tokens import ReadTokens
from a2sf.policies.base import Policy, Retention
from a2sf.policies.schedule import Schedule

if TYPE_CHECKING:
    from a2sf.hf.cache.pruned import PrunedCache

FORMAT = 1
OF_MODEL = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
"""Settings in which the model that continues must be the same."""


class ModelRef:
    """A weak reference to a model; if it is copied together with the model, it refers to the model's copy."""

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


def settings(
    model: PreTrainedModel, policy: Policy, schedule: Schedule, retention: Sequence[Sequence[Retention]]
) -> dict:
    """What a stored cache and the one that loads it must have in common."""
    config = model.config.get_text_config()
    numbers = [[(k.budget, k.recent, k.sinks, k.forgetting_factor) for k in row] for row in retention]
    grows = [[k.growth and k.growth.budget.ratio for k in row] for row in retention]
    return {
        "model": {name: getattr(config, name, None) for name in OF_MODEL},
        "policy": _in_words(policy),
        "schedule": schedule.name,
        "kept": torch.tensor(numbers, dtype=torch.float64),  # part of the stored format, so it has its earlier name
        "grows": grows if any(any(row) for row in grows) else None,
    }


def _in_words(policy: Policy) -> str:
    """A policy by its stored settings, so that a setting which is new and has its default changes nothing."""
    settings = ", ".join(f"{key}={x!r}" for key, x in policy.stored_settings().items())
    return f"{type(policy).__qualname__}({settings})"


def check(stored: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a cache that was stored with another model, policy, schedule or budget than `here`.

    Raises:
        UserError: if it was.
    """
    for name in ("model", "policy", "schedule"):
        if stored[name] != here[name]:
            raise UserError(f"the {name} of a stored cache is {stored[name]} and this cache's is {here[name]}")
    if stored.get("grows") != here["grows"]:
        raise UserError(
            "the budget of a stored cache, a share of the tokens seen, is not this cache's; give the same one"
        )
    if not torch.equal(stored["kept"], here["kept"]):
        budgets = [sorted(set(s["kept"][..., 0].long().flatten().tolist())) for s in (stored, here)]
        raise UserError(
            f"a stored cache retains {budgets[0]} tokens and this one {budgets[1]}, or other ones; make the "
            "cache with the same budget and max_new_tokens"
        )


def tensors_of(state: EvictionState) -> dict[str, Tensor]:
    """A state's tensors by name, in memory of their own on the CPU."""
    return {name: x.detach().cpu().clone() for name, x in state.tensors().items()}


def is_stored(given: Any) -> bool:
    """Whether `given` is what `PrunedCache.stored` gave.

    Raises:
        UserError: if a later version stored it.
    """
    if not isinstance(given, Mapping) or "format" not in given:
        return False
    if given["format"] != FORMAT:
        raise UserError(f"a cache stored in format {given['format']} is not read by this version, which knows {FORMAT}")
    return True


def stored_of(cache: PrunedCache) -> dict[str, Any]:
    """All that a cache holds, for `PrunedCache.stored`."""
    model = cache.model_ref()
    if cache.seen is None or model is None:
        raise UserError("this cache has read nothing yet, or its model is no longer there")
    if cache.policy.prepares:
        raise UserError(
            f"what the policy {cache.policy.name} has prepared for a prompt is not stored; keep the cache itself, or give "
            "another policy"
        )
    layers = [{**layer.shape, "state": tensors_of(layer.state())} for layer in cache.layers]
    return {
        "format": FORMAT,
        **settings(model, cache.policy, cache.schedule, cache.retention),
        "prompt": list(cache.prompt),
        "first": list(cache.first),
        "seen": cache.seen.clone(),
        "columns": cache.columns,
        "text": cache.text.ids(len(cache.seen), cache.columns),
        "calls": cache.calls,
        "later_turn": cache.later_turn,
        "attentions": list(cache.attentions),
        "layers": layers,
    }


def load_into(cache: PrunedCache, states: Mapping[str, Any] | Sequence[EvictionState]) -> None:
    """`PrunedCache.load`."""
    if is_stored(states):
        assert isinstance(states, Mapping)
        return _restore(cache, states)
    assert isinstance(states, Sequence)
    if cache.seen is None:
        raise UserError(
            "a pruned cache takes over states once it has read something, since they do not say what a row retains; "
            "store cache.stored() instead, which a new cache loads"
        )
    if len(states) != len(cache.layers) or any(len(s.seen) != len(cache.seen) for s in states):
        raise UserError(
            f"give one state for each of the {len(cache.layers)} layers, each of {len(cache.seen)} rows as this cache has"
        )
    for layer, state in zip(cache.layers, states, strict=True):
        layer.check(state)
    for layer, state in zip(cache.layers, states, strict=True):
        layer.load(state)
    cache.seen, cache.text = states[0].seen.cpu().clone(), ReadTokens()
    cache.columns = int(cache.seen.max())


def _restore(cache: PrunedCache, stored: Mapping[str, Any]) -> None:
    """Take over what another cache of the same model, policy and budget stored."""
    model = cache.model_ref()
    if model is None or cache.trace:
        raise UserError("a cache that records a trace, or whose model no longer exists, cannot load a stored one")
    first = stored.get("first") or stored["prompt"]  # earlier versions did not store it
    retention = retention_of_prompts(cache, stored["prompt"], first)
    check(stored, settings(model, cache.policy, cache.schedule, retention))
    cache.reset()
    cache.retention, cache.prompt, cache.first = retention, list(stored["prompt"]), list(first)
    cache.seen, cache.text = stored["seen"].clone(), ReadTokens(stored.get("text"))
    cache.columns, cache.calls, cache.attentions = stored["columns"], stored["calls"], list(stored["attentions"])
    cache.later_turn = stored.get("later_turn", True)  # earlier versions did not store it
    for i, (layer, one) in enumerate(zip(cache.layers, stored["layers"], strict=True)):
        state = EvictionState(**{name: x.to(model.device) for name, x in one["state"].items()})
        layer.restore(cache.batch_retention(i, one["window"]), one, state)
    # states of float32, bfloat16 and float16 models are float32, and each of these models may continue them
    dtypes = {one["state"]["keys"].dtype for one in stored["layers"]}
    cache.dtype = dtypes.pop() if torch.float64 in dtypes | {model.dtype} else model.dtype
