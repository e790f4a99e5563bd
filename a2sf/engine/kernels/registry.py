"""The implementations of the recursion: `Backend` is what they have in common, `REGISTRY` has them all.

A new kernel is a class here and its place in `REGISTRY`. numba and Triton take a second to load, so that their modules are
imported when they are first used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from a2sf.engine.eviction import reference
from a2sf.engine.kernels.dense import attend_dense, unsupported
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Attended, AttentionCall
from a2sf.engine.stepwise import attend_torch
from a2sf.policies.model.softmax import Softmax
from a2sf.policies.rule import Rule

if TYPE_CHECKING:
    from a2sf.engine.kernels.cpu import SlotCache


class CacheShape(NamedTuple):
    """Sizes of a `TokenCache`: B rows, K KV heads, H // K query heads of each, slots per KV head, D and V."""

    rows: int
    heads: int
    group: int
    slots: int
    D: int
    V: int


TokenCache: TypeAlias = "SlotCache"
"""Caches of a batch of rows for reading token by token; those of another kernel would have the same methods."""
NewCache: TypeAlias = Callable[[CacheShape], TokenCache]


class Backend:
    """One implementation of the recursion: any call on any device, unless a method says otherwise.

    Attributes:
        name: how it is asked for, and what results say ran.
        selectable: whether it can be asked for by name; else it is only chosen by `auto`.
        automatic: whether `auto` may choose it.
        compiled: whether a call that it does not support is split into simpler ones for it (`kernels.split`).
    """

    name: str
    selectable: bool = True
    automatic: bool = True
    compiled: bool = False

    def serves(self, query: Tensor) -> str | None:
        """Why it cannot compute with tensors of such a dtype on such a device; None: it can."""
        return None

    def computes(self, softmax: Softmax) -> str | None:
        """Why it cannot compute attention with such a softmax; None: it can. A compiled backend knows a plain one alone."""
        if softmax.plain or not self.compiled:
            return None
        return (
            f"{self.name} does not know the softcap or the learned attention sinks that the model has; give auto, torch or "
            "reference"
        )

    def supports(self, call: AttentionCall) -> str | None:
        """Why it cannot run a call whose tensors it `serves` and whose softmax it `computes`; None: it can."""
        return None

    def attend(self, call: AttentionCall) -> Attended:
        """Run a call that it supports."""
        raise NotImplementedError

    def new_cache(self, retention: BatchRetention, like: Tensor) -> NewCache | None:
        """What makes a cache for keys like `like`; None where states are handed from call to call instead."""
        return None


class Dense(Backend):
    """Masked attention in plain torch, where scores do not matter."""

    name, selectable = "dense", False

    def supports(self, call: AttentionCall) -> str | None:
        if call.query.device.type == "cpu" and call.options.softmax.plain:
            return "the compiled kernel is faster on a CPU"
        return unsupported(call.segments, call.options, call.state)

    def attend(self, call: AttentionCall) -> Attended:
        return attend_dense(call.query, call.key, call.value, call.segments, call.options)


class Numba(Backend):
    """The compiled kernel of the CPU."""

    name, compiled = "numba", True

    def serves(self, query: Tensor) -> str | None:
        if query.dtype == torch.float64:
            return _float32_only(query)
        if query.device.type != "cpu":
            return f"numba serves tensors on the CPU, and these are {_kind(query)}; give auto"
        return None

    def supports(self, call: AttentionCall) -> str | None:
        return _token_by_token(call.segments)

    def attend(self, call: AttentionCall) -> Attended:
        from a2sf.engine.kernels.cpu import attend_cpu

        return attend_cpu(*call)

    def new_cache(self, retention: BatchRetention, like: Tensor) -> NewCache | None:
        if self.serves(like) or _token_by_token(retention):
            return None
        from a2sf.engine.kernels.cpu import SlotCache

        return lambda shape: SlotCache(*shape, retention.rule, retention.schedule.spare)


class Triton(Backend):
    """The compiled kernel of GPUs."""

    name, compiled = "triton", True

    def serves(self, query: Tensor) -> str | None:
        if query.dtype == torch.float64:
            return _float32_only(query)
        from a2sf.engine.kernels.gpu.run import unavailable

        return unavailable(query.device)

    def supports(self, call: AttentionCall) -> str | None:
        from a2sf.engine.kernels.gpu.run import too_wide

        return _token_by_token(call.segments) or too_wide(call)

    def attend(self, call: AttentionCall) -> Attended:
        from a2sf.engine.kernels.gpu.run import attend_triton

        return attend_triton(*call)


class Torch(Backend):
    """Plain torch, token by token over all rows and heads."""

    name = "torch"

    def attend(self, call: AttentionCall) -> Attended:
        return attend_torch(*call)


class Reference(Backend):
    """The readable implementation that the others are checked against."""

    name, automatic = "reference", False

    def attend(self, call: AttentionCall) -> Attended:
        return reference(*call)


TORCH, REFERENCE = Torch(), Reference()
REGISTRY: tuple[Backend, ...] = (REFERENCE, Dense(), Numba(), Triton(), TORCH)
"""In the order in which `auto` tries them."""


def knows(rule: Rule) -> bool:
    """Whether the compiled kernels, of the CPU and of GPUs, run a rule token by token."""
    plain = not rule.calls and rule.recording is None
    return plain and rule.cut is None and not rule.full_heads and not rule.heads and rule.threshold is None


def _token_by_token(retention: BatchRetention) -> str | None:
    if retention.schedule.prompt:
        return "it evicts token by token, and the schedule cuts a prompt"
    if retention.rule.threshold is not None:
        return "it evicts as many tokens as exceed a budget, and the rule those below a threshold"
    return None if knows(retention.rule) else "its rule is more than data of one kind for all heads"


def _kind(query: Tensor) -> str:
    return f"{query.dtype} tensors on {query.device}"


def _float32_only(query: Tensor) -> str:
    return f"it computes in float32, and these are {_kind(query)}; give auto, torch or reference"
