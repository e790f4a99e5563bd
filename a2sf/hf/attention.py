"""The one attention function given to transformers' AttentionInterface.

A model's layers call `pruned_attention` like any other attention implementation. What to do in each layer is in the
active `Plan`, set by `running`; no modelling code is copied and no class is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from a2sf.engine.eviction import Options, Segments
from a2sf.engine.kernels import attend
from a2sf.engine.trace import attention_mass
from a2sf.errors import UserError
from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.rule import ACCUMULATED

IMPLEMENTATION = "a2sf"

# what models pass to an attention function that does not change its result here
HARMLESS = frozenset(
    "position_ids position_embeddings cache_position use_cache output_attentions output_hidden_states is_causal "
    "num_items_in_batch return_dict".split()
)


class UnsupportedModel(UserError):
    """A model whose attention cannot be pruned exactly through AttentionInterface."""


class NonFiniteError(UserError):
    """NaN or infinity reached a layer's attention."""


class Pass(Protocol):
    """One forward pass of a model, as the attention function sees it: a `Plan`, or a pass through a bounded cache.

    Attributes:
        layers: attention layers of the model.
        reached: those that have called `attend`.
    """

    layers: int
    reached: set[int]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of one layer, [B, H, T, V]."""
        ...


@dataclass
class Plan:
    """What the attention function does with one forward pass without a cache.

    Attributes:
        row, start, length, parent: the segments of the packed input (see `a2sf.engine.eviction.Segments`).
        retention: `retention(segment, layer)`: what a layer keeps of the sequence through a segment.
        layers: attention layers of the model.
        policy_on_sliding: whether the policy acts on layers that have a sliding window of their own; False for models
            that mix such layers with global ones, whose sliding layers stay as the model defines them.
        backend: which implementation runs.
        trace: whether to note in `evicted` what each layer evicts, int32 [B, K, T] (see `Attended`), and of a
            single sequence without padding the attention behind it, in `received` and `lost` (`trace.attention_mass`).
    """

    row: Sequence[int]
    start: Sequence[int]
    length: Sequence[int]
    parent: Sequence[int]
    retention: Callable[[int, int], Retention]
    layers: int
    policy_on_sliding: bool = True
    backend: str = "auto"
    trace: bool = False
    reached: set[int] = field(default_factory=set)
    evicted: dict[int, Tensor] = field(default_factory=dict)
    received: dict[int, Tensor] = field(default_factory=dict)
    lost: dict[int, Tensor] = field(default_factory=dict)
    _segments: dict[Any, Segments] = field(default_factory=dict)
    _by_layer: dict[tuple[int, int | None], Segments] = field(default_factory=dict)

    @classmethod
    def of_rows(cls, lengths: Sequence[int], starts: Sequence[int], retention, layers: int, **more: Any) -> Plan:
        """A batch of padded rows: row `b` holds its tokens at `starts[b] : starts[b] + lengths[b]`."""
        return cls(
            row=range(len(lengths)),
            start=starts,
            length=lengths,
            parent=[-1] * len(lengths),
            retention=retention,
            layers=layers,
            **more,
        )

    def segments(self, layer: int, sliding_window: int | None) -> Segments:
        """The segments of `layer`, with its retention; shared between layers that retain alike."""
        known = self._by_layer.get((layer, sliding_window))
        if known is not None:
            return known
        kept = [self._kept(i, layer, sliding_window) for i in range(len(self.row))]
        numbers = np.array([(k.budget, k.recent, k.sinks, k.forgetting_factor) for k in kept])
        rules = {k.rule for k in kept}
        assert len(rules) <= 1, "the sequences of a pass follow one policy"
        rule = rules.pop() if rules else ACCUMULATED
        key = (rule, numbers.tobytes())
        if key not in self._segments:
            budget, recent, sinks = (torch.from_numpy(numbers[:, j].astype(np.int64)) for j in range(3))
            row, start, length, parent = (
                torch.tensor(list(x), dtype=torch.int64) for x in (self.row, self.start, self.length, self.parent)
            )
            self._segments[key] = Segments(
                row=row,
                start=start,
                length=length,
                parent=parent,
                budget=budget,
                recent=recent,
                sinks=sinks,
                forgetting_factor=torch.from_numpy(numbers[:, 3].copy()),
                rule=rule,
            )
        self._by_layer[layer, sliding_window] = self._segments[key]
        return self._segments[key]

    def _kept(self, segment: int, layer: int, window: int | None) -> Retention:
        kept = self.retention(segment, layer)
        if window is not None:
            kept = within_window(kept, window, layer, self._end(segment), self.policy_on_sliding)
        return kept

    def _end(self, segment: int) -> int:
        tokens = 0
        while segment >= 0:
            tokens += self.length[segment]
            segment = self.parent[segment]
        return tokens

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of one layer, [B, H, T, V]."""
        check_finite(layer, query=query, key=key, value=value)
        options = Options(scale=scale, trace=self.trace)
        out = attend(query, key, value, self.segments(layer, window), options, backend=self.backend)
        self.reached.add(layer)
        if out.evicted is not None:
            self.evicted[layer] = out.evicted
            if list(self.length) == [query.shape[2]]:
                self.received[layer], self.lost[layer] = attention_mass(query, key, out.evicted, scale)
        return out.output


def within_window(kept: Retention, window: int, layer: int, tokens: int, policy_on_sliding: bool) -> Retention:
    """What a layer with a sliding window of its own keeps of a sequence of `tokens` tokens.

    Raises:
        UnsupportedModel: if a policy is to act on the layer and the sequence is longer than its window.
    """
    if not policy_on_sliding or kept.budget == UNLIMITED:
        # the token itself and window - 1 before it: what a sliding window of window - 1 cached tokens attends to
        return Retention(budget=window - 1, recent=window - 1)
    if tokens > window:
        raise UnsupportedModel(
            f"layer {layer} has a sliding window of {window} tokens of its own and a sequence has {tokens}: pruning "
            "beyond the model's window is not supported, shorten the sequences"
        )
    return kept


def mixes_windows(config: Any) -> bool:
    """Whether a model has both global layers and layers with a sliding window (Gemma-3)."""
    return len(set(getattr(config.get_text_config(), "layer_types", None) or ())) > 1


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


active: ContextVar[Pass | None] = ContextVar("pass", default=None)
"""The pass that `pruned_attention` follows; set by `running`, and by the bounded cache around a model's call."""


@contextmanager
def running(plan: Plan) -> Iterator[Plan]:
    """Make `plan` the one that `pruned_attention` follows, for one forward pass.

    Raises:
        UnsupportedModel: at the end, if a layer did not call `pruned_attention` (its attention is its own).
    """
    token = active.set(plan)
    try:
        yield plan
    finally:
        active.reset(token)
    check_reached(plan)


def check_reached(plan: Pass) -> None:
    """Raise `UnsupportedModel` if a layer did not call `pruned_attention`."""
    if len(plan.reached) != plan.layers:
        raise UnsupportedModel(
            f"only {len(plan.reached)} of the model's {plan.layers} layers use transformers' AttentionInterface, so it "
            "would run unpruned; choose a model whose every layer does"
        )


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` call `pruned_attention`; its own attention comes back at the end.

    Raises:
        UnsupportedModel: if the model's attention cannot be set.
    """
    before = model.config._attn_implementation
    if not model._can_set_attn_implementation():
        raise UnsupportedModel(
            f"{type(model).__name__} has an attention of its own that transformers' AttentionInterface does not reach, "
            "so it would run unpruned; choose another model"
        )
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


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
        UnsupportedModel: for an argument that changes the attention and that the engine does not know, such as
            `softcap` or learned sinks (`s_aux`).
    """
    plan = active.get()
    if plan is None:
        raise RuntimeError("the model's attention is set to 'a2sf' but no plan is active; use a2sf.pruning(model, ...)")
    layer = getattr(module, "layer_idx", None)
    name = type(module).__name__
    if layer is None or getattr(module, "is_cross_attention", False):
        raise UnsupportedModel(f"{name} is not the self-attention of a numbered decoder layer, which is all we prune")
    strange = sorted(k for k, v in other.items() if v is not None and k not in HARMLESS)
    if dropout or strange:
        raise UnsupportedModel(
            f"{name} passes {', '.join(strange) or 'dropout'} to its attention, which changes the result and which the "
            "engine does not support; choose another model"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedModel(f"{name} builds an attention mask of its own, which the engine does not support")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return plan.attend(layer, query, key, value, scale, sliding_window).transpose(1, 2), None


# no mask function goes with it: transformers then builds no mask, and the pass in force knows where the padding is
AttentionInterface.register(IMPLEMENTATION, pruned_attention)


def check_finite(layer: int, **tensors: Tensor) -> None:
    """Raise `NonFiniteError` if one of the tensors of layer `layer` holds NaN or infinity."""
    for name, tensor in tensors.items():
        low, high = tensor.aminmax()
        # NaN and infinity both survive minimum and maximum; one pass, nothing allocated
        if not torch.isfinite(high - low if tensor.dtype == torch.float64 else high.double() - low.double()):
            raise NonFiniteError(f"NaN or infinity in the {name} of layer {layer}; the result would be meaningless")
