"""What a model's config says of its layers' windows and of its rotary embedding."""

from __future__ import annotations

from typing import Any

from a2sf.hf.attention.errors import UnsupportedModel
from a2sf.policies.base import UNLIMITED, Retention


def within_window(stated: Retention, window: int, layer: int, tokens: int, policy_on_sliding: bool) -> Retention:
    """What a layer with its own sliding window retains of a sequence of `tokens` tokens.

    Raises:
        UnsupportedModel: if a policy is to act on the layer and the sequence is longer than its window.
    """
    if keeps_window(stated, policy_on_sliding):
        # the token itself and window - 1 before it: what a sliding window of window - 1 cached tokens attends to
        return Retention(budget=window - 1, recent=window - 1)
    if tokens > window:
        raise UnsupportedModel(
            f"layer {layer} has a sliding window of {window} tokens of its own and a sequence has {tokens}: pruning "
            "beyond the model's window is not supported, shorten the sequences"
        )
    return stated


def keeps_window(stated: Retention, policy_on_sliding: bool) -> bool:
    """Whether a layer with its own sliding window follows that, step by step, instead of the policy."""
    return not policy_on_sliding or stated.budget == UNLIMITED


def mixes_windows(config: Any) -> bool:
    """Whether a model has both global layers and layers with a sliding window (Gemma-3)."""
    return len(set(getattr(config.get_text_config(), "layer_types", None) or ())) > 1


def global_layers(config: Any) -> tuple[bool, ...]:
    """Of each layer, whether a policy acts on it: where windows are mixed, those without one."""
    text = config.get_text_config()
    if not mixes_windows(config):
        return (True,) * text.num_hidden_layers
    return tuple(kind == "full_attention" for kind in text.layer_types)


def rope_switch(config: Any) -> float:
    """The length beyond which a model's rotary embedding changes for the whole sequence (longrope); inf: never.

    Raises:
        UnsupportedModel: for dynamic NTK scaling, which depends on the longest sequence of a batch.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [parameters, *(p for p in parameters.values() if isinstance(p, dict))]
    kinds = {p.get("rope_type"): p for p in nested}
    if "dynamic" in kinds:
        raise UnsupportedModel("dynamic NTK rotary scaling makes a score depend on the batch, which is not supported")
    return float(kinds["longrope"]["original_max_position_embeddings"]) if "longrope" in kinds else float("inf")
