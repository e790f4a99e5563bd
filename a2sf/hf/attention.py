"""The one attention function given to transformers' AttentionInterface.

A model's layers call `pruned_attention` like any other attention implementation, in the contexts (of a thread or a task)
where `attached` has their configs name it. What to do in each layer is in the context's active `Plan`, set by `running`.
No modelling code is copied, and nothing is set on a model or its config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from a2sf.engine.eviction import Options, Segments, wants_gradient
from a2sf.engine.kernels import attend, noting
from a2sf.engine.trace import attention_mass, steps_of
from a2sf.errors import UserError
from a2sf.hf.named import Configs, configs_of, named
from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.rule import ACCUMULATED
from a2sf.policies.schedule import STEP, Schedule

IMPLEMENTATION = "a2sf"

CHANGES_THE_RESULT = {
    "softcap": "caps its attention logits (softcap)",
    "s_aux": "has learned attention sinks (s_aux)",
    "sinks": "has learned attention sinks (sinks)",
    "position_bias": "adds a bias to its attention logits (position_bias)",
    "indices": "lets an index choose which tokens are seen (indices)",
    "block_indices": "lets an index choose which blocks of tokens are seen (block_indices)",
    "head_mask": "masks heads (head_mask)",
}
"""Arguments known to change an attention's result, and how. Of any other, `exactness.check_exact` finds out by trying.

From every call of an attention function in transformers 5.24. `is_causal=False` and `dropout` are refused as well. The
other arguments there, `position_ids cu_seq_lens_* max_length_* output_* deterministic use_cache` and what callers of a
model add, do not enter the attention.
"""

REMEDIES = {
    torch.float16: "float16 ends at 65504, so try model.dtype=bfloat16 or float32",
    torch.bfloat16: "try model.dtype=float32",
}


class UnsupportedModel(UserError):
    """A model whose attention cannot be pruned exactly through AttentionInterface."""


class NonFiniteError(UserError):
    """NaN or infinity where a result depends on it.

    Attributes:
        where: what holds it, such as "the key of layer 3".
        dtype: what the model computes in.
        rows: which rows of the batch, or segments of a packed row, it concerns; empty where that is not known.
        subject: which document, where that is known.
    """

    def __init__(self, where: str, dtype: torch.dtype, rows: Sequence[int] = (), subject: str = "") -> None:
        self.where, self.dtype, self.rows, self.subject = where, dtype, tuple(rows), subject
        name = str(dtype).removeprefix("torch.")
        remedy = REMEDIES.get(dtype, "the weights may be damaged, so load them anew or look at them")
        if rows and not subject:
            where += f" (row {', '.join(map(str, self.rows))} of the batch)"
        super().__init__(
            f"{subject + ': ' if subject else ''}NaN or infinity in {where}, computed in {name}; the result would be "
            f"meaningless, {remedy}"
        )

    def about(self, subject: str) -> NonFiniteError:
        """The same error, with the document that it concerns."""
        return NonFiniteError(self.where, self.dtype, self.rows, subject)


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

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of one layer, [B, H, T, V]."""
        ...


@dataclass
class Plan:
    """What the attention function does with one forward pass without a cache.

    Attributes:
        row, start, length, parent: the segments of the packed input (see `a2sf.engine.eviction.Segments`).
        retention: `retention(segment, layer)`: what a layer keeps of the sequence through a segment.
        schedule: when tokens are evicted; a sliding window of the model's own always goes step by step.
        prompt: `prompt(segment)`: tokens of the prompt of the sequence through a segment; for the prompt schedule.
        layers: attention layers of the model.
        policy_on_sliding: whether the policy acts on layers that have a sliding window of their own; False for models
            that mix such layers with global ones, whose sliding layers stay as the model defines them.
        backend: which implementation runs.
        trace: whether to note in `evicted` what each layer evicts (see `Attended`), and of a single sequence
            without padding when each position went, in `gone`, int32 [B, K, T], and the attention behind it, in `received`
            and `lost` (`trace.attention_mass`).
        serves: what the caller calls the sequences that are read.
        ran: which implementations ran (`a2sf.engine.kernels.noting`).
    """

    row: Sequence[int]
    start: Sequence[int]
    length: Sequence[int]
    parent: Sequence[int]
    retention: Callable[[int, int], Retention]
    layers: int
    schedule: Schedule = STEP
    prompt: Callable[[int], int] | None = None
    policy_on_sliding: bool = True
    backend: str = "auto"
    trace: bool = False
    serves: Sequence[int] = ()
    ran: set[str] = field(default_factory=set)
    reached: set[int] = field(default_factory=set)
    evicted: dict[int, Tensor] = field(default_factory=dict)
    gone: dict[int, Tensor] = field(default_factory=dict)
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
        own = sliding_window is not None and any(keeps_window(k, self.policy_on_sliding) for k in self._asked(layer))
        schedule = STEP if own else self.schedule
        key = (rule, schedule, numbers.tobytes())
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
                schedule=schedule,
                prompt=self._prompts() if schedule.prompt else None,
            )
        self._by_layer[layer, sliding_window] = self._segments[key]
        return self._segments[key]

    def _asked(self, layer: int) -> Iterator[Retention]:
        return (self.retention(i, layer) for i in range(len(self.row)))

    def _prompts(self) -> Tensor:
        assert self.prompt is not None, "the prompt schedule needs each sequence's prompt"
        return torch.tensor([self.prompt(i) for i in range(len(self.row))], dtype=torch.int64)

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

    @property
    def plans(self) -> list[Plan]:
        """Itself, as a pass of several plans has them."""
        return [self]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of one layer, [B, H, T, V]."""
        check_finite(layer, (self.row, self.start, self.length), query=query, key=key, value=value)
        return self.checked(layer, query, key, value, scale, window)

    def checked(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """The same of tensors that are known to be finite."""
        options = Options(scale=scale, trace=self.trace)
        with noting() as names:
            out = attend(query, key, value, self.segments(layer, window), options, backend=self.backend)
        self.ran |= names
        self.reached.add(layer)
        if out.evicted is not None:
            noted = {"evicted": out.evicted}
            if list(self.length) == [query.shape[2]]:
                noted["gone"] = gone = steps_of(out)
                noted["received"], noted["lost"] = attention_mass(query, key, gone, scale)
            for name, found in noted.items():
                known = getattr(self, name)
                # a layer that calls its attention several times has the heads of all calls, in their order
                known[layer] = torch.cat([known[layer], found], 1) if layer in known else found
        return out.output


def within_window(kept: Retention, window: int, layer: int, tokens: int, policy_on_sliding: bool) -> Retention:
    """What a layer with a sliding window of its own keeps of a sequence of `tokens` tokens.

    Raises:
        UnsupportedModel: if a policy is to act on the layer and the sequence is longer than its window.
    """
    if keeps_window(kept, policy_on_sliding):
        # the token itself and window - 1 before it: what a sliding window of window - 1 cached tokens attends to
        return Retention(budget=window - 1, recent=window - 1)
    if tokens > window:
        raise UnsupportedModel(
            f"layer {layer} has a sliding window of {window} tokens of its own and a sequence has {tokens}: pruning "
            "beyond the model's window is not supported, shorten the sequences"
        )
    return kept


def keeps_window(kept: Retention, policy_on_sliding: bool) -> bool:
    """Whether a layer with a sliding window of its own goes by that, step by step, and not by what the policy says."""
    return not policy_on_sliding or kept.budget == UNLIMITED


def mixes_windows(config: Any) -> bool:
    """Whether a model has both global layers and layers with a sliding window (Gemma-3)."""
    return len(set(getattr(config.get_text_config(), "layer_types", None) or ())) > 1


def global_layers(config: Any) -> list[bool]:
    """Of each layer, whether a policy acts on it: where windows are mixed, those without one."""
    text = config.get_text_config()
    if not mixes_windows(config):
        return [True] * text.num_hidden_layers
    return [kind == "full_attention" for kind in text.layer_types]


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
"""The pass that `pruned_attention` follows in this context; set by `running`, and around a model's pruned call."""


@contextmanager
def running(plan: Pass) -> Iterator[Pass]:
    """Make `plan` the one that `pruned_attention` follows, for one forward pass.

    Raises:
        UnsupportedModel: at the end, if a layer did not call `pruned_attention` (its attention is its own).
    """
    with following(plan):
        yield plan
    check_reached(plan)


@contextmanager
def following(plan: Pass) -> Iterator[None]:
    """The same without a look at the end; what is followed outside comes back however it ends."""
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
            f"{len(plan.reached)} layers of the model have an attention and its config tells of {plan.layers} "
            "(num_hidden_layers), so they cannot be given budgets; choose another model"
        )


@contextmanager
def attached(
    model: PreTrainedModel, implementation: str = IMPLEMENTATION, configs: Configs | None = None
) -> Iterator[None]:
    """Let `model` call `pruned_attention` (or another registered one) in this context; elsewhere it calls its own.

    Args:
        configs: the model's, where they are known (`configs_of`).

    Raises:
        UnsupportedModel: if the model's attention cannot be set.
    """
    if not model._can_set_attn_implementation():
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
        UnsupportedModel: for an argument that is known to change the attention, such as `softcap` or learned sinks
            (`s_aux`).
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
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    output = plan.attend(layer, query, key, value, scale, sliding_window or None).transpose(1, 2)
    if not output.requires_grad and wants_gradient(query, key, value):
        output = _WithoutGradient.apply(output, query, key, value)
    return output, None


class _WithoutGradient(torch.autograd.Function):
    """An output that cannot be differentiated, which whoever tries is told; without it, gradients would lack a part."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *inputs: Tensor) -> Tensor:
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
        UnsupportedModel: if it has none, or hands on what is known to change the attention.
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


# the mask function that goes with it, `a2sf.hf.masks.no_mask`, makes none: the pass in force knows where the padding is
AttentionInterface.register(IMPLEMENTATION, pruned_attention)


def check_finite(
    layer: int, tokens: tuple[Sequence[int], Sequence[int], Sequence[int]] | None = None, **tensors: Tensor
) -> None:
    """Raise `NonFiniteError` if one of the tensors [B, heads, T, D] of layer `layer` holds NaN or infinity.

    Args:
        tokens: row, first column and number of the tokens that count, per segment; None: all. Padding does not count.
    """
    for name, tensor in tensors.items():
        low, high = tensor.aminmax()
        # NaN and infinity both survive minimum and maximum; one pass, nothing allocated
        if torch.isfinite(high - low if tensor.dtype == torch.float64 else high.double() - low.double()):
            continue
        bad = ~torch.isfinite(tensor).all(-1).all(1).cpu()
        rows = bad.any(1).nonzero()[:, 0].tolist()
        if tokens is not None:
            pieces = enumerate(zip(*tokens, strict=True))
            rows = [i for i, (row, start, n) in pieces if bad[int(row), int(start) : int(start) + int(n)].any()]
        if rows:
            raise NonFiniteError(f"the {name} of layer {layer}", tensor.dtype, rows)
