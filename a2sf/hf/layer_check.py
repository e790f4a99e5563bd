"""One pass with a model's own attention that compares each layer, on the same inputs, with ours, and its mask.

The model's own functions run under a name of their own through transformers' interfaces, as `pruned_attention` does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from a2sf.compat.transformers import ATTENTION, eager_attention
from a2sf.hf.attention.errors import NonFiniteError, UnsupportedModel
from a2sf.hf.attention.function import attached, check_arguments, options_of
from a2sf.hf.attention.plan import Plan
from a2sf.policies.base import UNLIMITED, Retention

CHECK = "a2sf_check"
"""The name of the model's own attention while it is compared."""
FAR = 2**20
"""Positions of a model that does not say how many it has."""


def layers_of(model: PreTrainedModel) -> int:
    """How many attention layers the model has, by its config.

    Raises:
        UnsupportedModel: if the config does not say.
    """
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise UnsupportedModel(f"{type(model).__name__} does not say how many layers it has (num_hidden_layers)")
    return layers


def unpruned(model: PreTrainedModel) -> tuple[Retention, ...]:
    """What each layer retains with the full cache."""
    return (Retention(budget=UNLIMITED),) * layers_of(model)


def positions_of(model: PreTrainedModel) -> int:
    """How many positions the model has."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or FAR)


def likely(logits: Tensor) -> Tensor:
    """Logits [..., vocabulary] in float32, limited from below where the probability is next to 0.

    Models mask entries that no token uses with -infinity or the least number there is, which would dwarf the others.
    """
    logits = logits.float()
    return logits.maximum(logits.amax(-1, keepdim=True) - 100)


def agree(own: Tensor, ours: Tensor, dtype: torch.dtype, tight: float = 1e-4, loose: float = 0.1) -> bool | None:
    """Whether two [B, T, N] are the same but for rounding, by root mean square; None where there is nothing to compare.

    Rows of `own` that are not finite are left out: scoring and generating report them where they affect a result.
    """
    own, ours = own.float(), ours.float()
    finite = torch.isfinite(own).all(-1)
    if not finite.any():
        return None
    own, ours = own[finite], ours[finite]
    # in bfloat16, where matmuls differ with the batch's shape, single logits are 0.2 off
    tolerance = tight if dtype in (torch.float32, torch.float64) else loose
    return bool((own - ours).square().mean().sqrt() <= tolerance * own.std().clamp(min=1e-6))


@dataclass
class _Check:
    """One pass with the model's own attention, compared layer by layer.

    Attributes:
        attention, mask: the model's own functions; for `attention` None where each layer's code has its own.
        plan: what our attention does with the same input.
        positions: how many the model has.
        masks: those made for this pass, each with the function that says which tokens it shows.
    """

    attention: Callable[..., tuple[Tensor, Any]] | None
    mask: Callable[..., Any]
    plan: Plan
    positions: int
    masks: list[tuple[Tensor, Callable[..., Tensor]]] = field(default_factory=list)

    def attention_of(self, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
        """The own attention of a layer: where there is none for all layers, the `eager` one of the layer's own code."""
        return eager_attention(module) if self.attention is None else self.attention


_current: ContextVar[_Check | None] = ContextVar("layer check", default=None)


def compare_layers(model: PreTrainedModel, ids: Tensor, call: Callable[..., Any] | None = None) -> None:
    """Compare each layer's own attention with the engine's, on the same queries, keys and values, and its mask.

    `call` is what is called instead of the model.

    Raises:
        UnsupportedModel: if one differs.
    """
    own = getattr(model.config, ATTENTION)
    if own != "eager":
        own = own if own in AttentionInterface() and own in AttentionMaskInterface() else "sdpa"
    plan = Plan.of_one(ids.shape[1], unpruned(model), model.config)
    check = _Check(AttentionInterface().get(own), AttentionMaskInterface()[own], plan, positions_of(model))
    token = _current.set(check)
    try:
        with attached(model, CHECK):
            (call or model)(ids, use_cache=False)
    finally:
        _current.reset(token)


def _check_mask(*args: Any, mask_function: Callable[..., Tensor], **settings: Any) -> Any:
    """The model's own mask, always made, so that the function that made it is known."""
    check = _current.get()
    assert check is not None
    for name in ("allow_is_causal_skip", "allow_is_bidirectional_skip"):
        settings = settings | {name: False}
    made = check.mask(*args, mask_function=mask_function, **settings)
    if isinstance(made, Tensor):
        check.masks.append((made, mask_function))
    return made


def _check_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **other: Any,
) -> tuple[Tensor, Any]:
    """A layer's own attention, after a comparison with ours."""
    check = _current.get()
    assert check is not None
    layer, options = check_arguments(module, dropout, other), options_of(module, query, key, scaling, other)
    name = type(module).__name__
    made: list[Callable[..., Tensor] | None] = [None]  # without a mask, causal
    if attention_mask is not None:
        # two masks may hide the same of a short sequence: take this very mask, or all that are equal
        made = [shows for mask, shows in check.masks if mask is attention_mask]
        made = made or [shows for mask, shows in check.masks if _equal(mask, attention_mask)]
        if not made:
            raise UnsupportedModel(f"{name} builds an attention mask of its own, which the engine does not support")
    for shows in made:
        if (what := _differs(shows, sliding_window, check.positions, query.device)) is not None:
            raise UnsupportedModel(f"layer {layer} of the model ({name}) {what}; choose another model")
    settings = other | {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
    own, weights = check.attention_of(module)(module, query, key, value, attention_mask, **settings)
    try:
        ours = check.plan.attend(layer, query, key, value, options, sliding_window or None).transpose(1, 2)
    except NonFiniteError:
        return own, weights  # nothing to compare; a document with the same problem will be reported
    if agree(own.flatten(2), ours.flatten(2), own.dtype, tight=1e-3, loose=0.03) is False:
        given = ", ".join(sorted(k for k, v in other.items() if v is not None)) or "nothing unusual"
        raise UnsupportedModel(
            f"the attention of layer {layer} ({name}, which is given {given}) is not the softmax attention that the "
            "engine computes; choose another model"
        )
    return own, weights


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.to(b.device), b)  # a layer may be elsewhere


def _differs(
    shows: Callable[..., Tensor] | None, window: int | None, positions: int, device: torch.device
) -> str | None:
    """How a mask differs from causal attention (within `window` tokens, if any) anywhere up to `positions`, or None."""
    ends = {2**i + d for i in range(positions.bit_length() + 1) for d in (-1, 0, 1)} | {0, 3, positions - 1}
    ends |= {window + d for d in (-2, -1, 0, 1)} if window else set()
    marks = torch.tensor(sorted(e for e in ends if 0 <= e < positions), device=device)
    query = marks[:, None].expand(-1, 2 * len(marks) + 1)
    key = torch.cat([query[:, : len(marks)] - marks, query[:, :1] + 1, marks.expand(len(marks), -1)], 1)
    inside = (key >= 0) & (key < positions)
    query, key = query[inside], key[inside]
    expected = key <= query
    if window:
        expected &= key > query - window
    if shows is None:
        seen = key <= query
    else:
        try:
            seen = torch.as_tensor(shows(torch.zeros_like(query), torch.zeros_like(query), query, key))
        except (IndexError, RuntimeError, TypeError):
            return "has a mask that depends on more than positions"
        seen = seen.expand(query.shape)
    wrong = seen != expected
    if not wrong.any():
        return None
    first = int(torch.where(wrong, torch.maximum(query, key), positions).min())
    i = int((wrong & (torch.maximum(query, key) == first)).nonzero()[0])
    stated = f"the window of {window} tokens" if window else "the full causal attention"
    return (
        f"{'lets' if seen[i] else 'does not let'} token {int(query[i])} attend to token {int(key[i])}, unlike {stated} that "
        "it states, so longer texts would be wrong"
    )


AttentionInterface.register(CHECK, _check_attention)
AttentionMaskInterface.register(CHECK, _check_mask)
