"""The attention function that is registered with transformers' AttentionInterface.

A model's layers call `pruned_attention` like any other attention implementation, in the contexts (of a thread or an asyncio
task) in which `attached` makes their configs name it. The context's active `Plan`, set by `running`, says what to do in
each layer. No modelling code is copied, and no attribute of a model or its config is set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from a2sf.compat.transformers import can_set_attention
from a2sf.engine.eviction import wants_gradient
from a2sf.engine.state import Options
from a2sf.errors import UserError
from a2sf.hf.attention.errors import UnsupportedModel
from a2sf.hf.attention.named import Configs, configs_of, named
from a2sf.policies.model.softmax import Softmax

IMPLEMENTATION = "a2sf"
CHANGES_THE_RESULT = {
    "position_bias": "adds a bias to its attention logits (position_bias)",
    "indices": "lets an index choose which tokens are seen (indices)",
    "block_indices": "lets an index choose which blocks of tokens are seen (block_indices)",
    "head_mask": "masks heads (head_mask)",
}
"""Arguments that are known to change an attention's result, and how. `exactness.check_exact` detects all others.

From every call of an attention function in transformers 5.24. `is_causal=False` and `dropout` are refused as well, `softcap`
and learned sinks are computed (`options_of`). The other arguments there, `position_ids cu_seq_lens_* max_length_* output_*
deterministic use_cache` and what callers of a model add, do not enter the attention.
"""

SINKS = ("s_aux", "sinks")
"""The names of learned attention sinks among the arguments."""


class Pass(Protocol):
    """One forward pass of a model, as the attention function sees it: a `Plan`, or a pass through a bounded cache.

    Attributes:
        layers: attention layers of the model.
    """

    layers: int

    @property
    def reached(self) -> Set[int]:
        """The layers that have called `attend`."""
        ...

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options, window: int | None
    ) -> Tensor:
        """Attention of one layer, [B, H, T, V]; `options`: how the layer computes it (`options_of`)."""
        ...


active: ContextVar[Pass | None] = ContextVar("pass", default=None)
"""The pass that `pruned_attention` computes in this context; set by `running`, and around a model's pruned call."""


@contextmanager
def running(plan: Pass) -> Iterator[Pass]:
    """Make `plan` the pass that `pruned_attention` computes, for one forward pass.

    Raises:
        UnsupportedModel: at the end, if a layer did not call `pruned_attention` (its attention is its own).
    """
    with following(plan):
        yield plan
    check_reached(plan)


@contextmanager
def following(plan: Pass) -> Iterator[None]:
    """The same without the check at the end; the outer pass is restored however the block ends."""
    before = active.get()
    try:
        active.set(plan)
        yield
    finally:
        active.set(before)


def check_reached(plan: Pass) -> None:
    """Raise `UnsupportedModel` if a layer did not call `pruned_attention`."""
    if len(plan.reached) < plan.layers:
        raise UnsupportedModel(
            f"only {len(plan.reached)} of the model's {plan.layers} layers use transformers' AttentionInterface, each "
            "under a number of its own, so it would run unpruned; choose a model whose every layer does"
        )
    if len(plan.reached) > plan.layers:
        raise UnsupportedModel(
            f"{len(plan.reached)} layers of the model have an attention and its config states {plan.layers} "
            "(num_hidden_layers), so they cannot be given budgets; choose another model"
        )


@contextmanager
def attached(
    model: PreTrainedModel, implementation: str = IMPLEMENTATION, configs: Configs | None = None
) -> Iterator[None]:
    """Let `model` call `pruned_attention` (or another registered function) in this context; elsewhere it calls its own.

    Args:
        configs: the model's, where they are known (`configs_of`).

    Raises:
        UnsupportedModel: if the model's attention cannot be set.
    """
    if not can_set_attention(model):
        raise UnsupportedModel(
            f"{type(model).__name__} has an attention of its own that transformers' AttentionInterface does not reach, "
            "so it would run unpruned; choose another model"
        )
    with named(configs_of(model) if configs is None else configs, implementation):
        yield


def pruned_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, V].

    Raises:
        UnsupportedModel: for an argument that is known to change the attention, such as `position_bias`.
    """
    plan = active.get()
    if plan is None:
        raise UserError(
            f"{type(module).__name__} was called through a part of its model, which pruning(...) does not reach; inside of "
            "it call the whole model that pruning(...) was given"
        )
    layer = check_arguments(module, dropout, other)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedModel(
            f"{type(module).__name__} builds an attention mask of its own, which the engine does not support"
        )
    options = options_of(module, query, key, scaling, other)
    output = plan.attend(layer, query, key, value, options, sliding_window or None).transpose(1, 2)
    if not output.requires_grad and wants_gradient(query, key, value, softmax=options.softmax):
        output = _WithoutGradient.apply(output, query, key, value, options.softmax.learned_sinks)
    return output, None


class _WithoutGradient(torch.autograd.Function):
    """An output without a gradient: differentiating it raises an error, instead of giving a gradient that lacks a part."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *inputs: Tensor | None) -> Tensor:
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise UserError(
            "a pruned call was differentiated, which only backend=reference can be; give pruning(..., backend='reference') "
            "or a PrunedCache with it"
        )


def check_arguments(module: nn.Module, dropout: float, other: dict[str, Any]) -> int:
    """The number of the layer that calls its attention.

    Raises:
        UnsupportedModel: if it has none, or passes an argument that is known to change the attention.
    """
    name = type(module).__name__
    layer = getattr(module, "layer_idx", None)
    if layer is None or getattr(module, "is_cross_attention", False):
        raise UnsupportedModel(f"{name} is not the self-attention of a numbered decoder layer, which is all we prune")
    does = [how for what, how in CHANGES_THE_RESULT.items() if other.get(what) is not None]
    does += ["drops out attention"] if dropout else []
    does += ["attends to later tokens"] if other.get("is_causal") is False else []
    if does:
        raise UnsupportedModel(f"{name} {' and '.join(does)}, which the engine does not do; choose another model")
    return layer


def options_of(
    module: nn.Module, query: Tensor, key: Tensor, scaling: float | None, other: Mapping[str, Any]
) -> Options:
    """How a layer computes its attention: scale, softcap (Gemma 2) and learned sinks (GPT-OSS).

    Args:
        query, key, scaling, other: as the layer gives them to its attention.

    Raises:
        UnsupportedModel: if the softcap or the sinks are none that the engine knows.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    given = [name for name in SINKS if other.get(name) is not None]
    try:
        softmax = Softmax.of(other.get("softcap"), other.get(given[0]) if given else None, query.shape[1], key.shape[1])
    except ValueError as error:
        names = ", ".join(n for n in ("softcap", *given) if other.get(n) is not None)
        raise UnsupportedModel(
            f"{type(module).__name__} gives its attention a softcap or learned sinks ({names}) that the engine does not "
            f"know ({error}); choose another model"
        ) from error
    return Options(scale, softmax=softmax)


# the mask function that goes with it, `masks.no_mask`, makes none: the pass in force knows where the padding is
AttentionInterface.register(IMPLEMENTATION, pruned_attention)
