"""What happens around a model's calls: hooks that tell the attention function which cache and tokens a call is about.

They are PyTorch's own forward hooks, registered once per model; a call without a bounded cache is left alone.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from a2sf.errors import UserError
from a2sf.hf.attention import (
    IMPLEMENTATION,
    NonFiniteError,
    Pass,
    UnsupportedModel,
    active,
    attached,
    check_reached,
)
from a2sf.hf.chunks import Call, columns, joined, splits
from a2sf.hf.devices import is_spread
from a2sf.hf.masks import CACHE_NAMES, arguments, check_call


@runtime_checkable
class BoundedCache(Protocol):
    """A cache that a call goes through; `seen` int64 [B] counts each row's tokens so far, None before the first."""

    seen: Tensor | None

    def parts(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> list[int]:
        """Where the parts end, as columns, in which such a call is to be read; one that does not fit is refused."""
        ...

    def begin(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> Pass:
        """Start a call on `shape` = (B, T) new tokens; `mask` [B, columns] is 0 where a token is padding."""
        ...

    def end(self, completed: bool) -> None:
        """Finish it."""
        ...


class Scope(Protocol):
    """What is done to the calls that have no bounded cache."""

    def supply(self, model: PreTrainedModel, cache: Any, keep: bool | None) -> BoundedCache | None:
        """The cache for a call that was given `cache` (or None) and `use_cache=keep`; None: it keeps no cache."""
        ...

    def passing(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> BoundedCache | None:
        """A cache to read a call in parts through that keeps none; None: it is read at once."""
        ...

    def plan(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> Pass:
        """What the attention does in a call without a cache."""
        ...


class Hooks:
    """What happens around every call of one model; idle without a bounded cache or a scope."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.names = [n for n in inspect.signature(model.forward).parameters if n != "self"]
        self.cache_name = next((n for n in CACHE_NAMES if n in self.names), CACHE_NAMES[0])
        self.scope: Scope | None = None
        self.open: _Call | None = None
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, with_kwargs=True, always_call=True)

    def before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict] | None:
        self.close(None)  # a call that was interrupted left it open
        named = dict(zip(self.names, args, strict=False)) | kwargs
        cache = next((named[n] for n in CACHE_NAMES if named.get(n) is not None), None)
        if self.scope is not None:
            cache = self.scope.supply(model, cache, named.get("use_cache"))
            named = {n: x for n, x in named.items() if n not in CACHE_NAMES}
            named |= {self.cache_name: cache} if cache is not None else {}
        elif not isinstance(cache, BoundedCache):
            return None
        shaping = check_call(model, named)
        tokens = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
        shape, mask = (tokens.shape[0], tokens.shape[1]), named.get("attention_mask")
        before: list[Tensor] = []
        hidden, in_parts = None, False
        if shape[1] > columns(shape[0], tokens.device) and splits(model, named):
            if cache is None and self.scope is not None:
                cache = hidden = self.scope.passing(model, shape, mask)
                named |= {self.cache_name: cache} if cache is not None else {}
            ends = [] if cache is None else cache.parts(model, shape, mask)
            in_parts = len(ends) > 1 or hidden is not None
            if cache is not None and len(ends) > 1:
                before, named = self._read(Call(model, named, shape[1]), ends, cache)
                tokens, mask = tokens[:, ends[-2] :], named.get("attention_mask")
                shape = shape[0], tokens.shape[1]
        past = torch.zeros(shape[0], dtype=torch.int64) if cache is None or cache.seen is None else cache.seen
        given = named.get("position_ids")
        if mask is None and given is not None and len(set(past.tolist())) > 1:
            _check_positions(given, past, shape)
        current: Pass
        if cache is not None:
            current = cache.begin(model, shape, mask)
        else:
            assert self.scope is not None
            current = self.scope.plan(model, shape, mask)
        if given is None and (mask is not None or bool((past > 0).any())):
            # positions count a row's own tokens, wherever its padding is; a model that is exact follows them
            real = mask[:, -shape[1] :].long() if mask is not None else tokens.new_ones(shape, dtype=torch.int64)
            named["position_ids"] = (past[:, None].to(real.device) + real.cumsum(1) - 1).clamp(min=0)
        stack = ExitStack()
        count = named.get("logits_to_keep", 0)
        real = mask[:, -shape[1] :].bool() if mask is not None and isinstance(count, int) else None
        self.open = _Call(stack, current, cache, real, in_parts, before, hidden)
        if model.config._attn_implementation != IMPLEMENTATION:
            stack.enter_context(attached(model))
        stack.callback(active.set, active.get())
        active.set(current)
        stack.callback(arguments.set, arguments.get())
        arguments.set(shaping)
        return (), named

    def _read(self, call: Call, ends: list[int], cache: BoundedCache) -> tuple[list[Tensor], dict[str, Any]]:
        """Read all parts of a call but the last: what was asked for of them, and the arguments for the last."""
        try:
            return call.read(ends), call.part(ends[-2], ends[-1])
        except BaseException:
            cache.end(completed=False)
            raise

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model brings its hooks along, but no open call and no scope."""
        return self.__dict__ | {"scope": None, "open": None}

    def after(self, model: Any, args: Any, kwargs: Any, output: Any) -> Any:
        call = self.open
        self.close(output)
        return joined(call.before, output, call.hidden) if call and output is not None and call.in_parts else None

    def close(self, output: Any) -> None:
        """End the open pass, if there is one; `output` is None where the model's call failed."""
        if self.open is None:
            return
        call, self.open = self.open, None
        call.stack.close()
        if call.cache is not None:
            call.cache.end(completed=output is not None)
        if output is not None:
            check_reached(call.current)
            check_output(output, call.real)


@dataclass(frozen=True)
class _Call:
    """A model's call that has begun.

    Attributes:
        stack: undoes its setting up.
        real: bool [B, T], the tokens that are no padding.
        in_parts: whether it was read in several, or through a cache that its caller does not see.
        before: what was asked for of its earlier parts.
        hidden: that cache.
    """

    stack: ExitStack
    current: Pass
    cache: BoundedCache | None
    real: Tensor | None
    in_parts: bool
    before: list[Tensor]
    hidden: BoundedCache | None


def check_output(output: Any, real: Tensor | None) -> None:
    """Refuse a model's output that is NaN or infinity where a token counts.

    The entries of a vocabulary may be -infinity, as some models mark those that no token uses, but not all of them.

    Args:
        output: what the model returned; its logits [B, columns, vocabulary], of the last columns at least.
        real: bool [B, T], False for padding; None: every token counts.

    Raises:
        NonFiniteError: if it is, with the rows.
    """
    found = (getattr(output, "logits", None), getattr(output, "last_hidden_state", None))
    values = next((x for x in found if x is not None), output[0] if isinstance(output, tuple) else None)
    if not isinstance(values, Tensor) or values.ndim != 3:
        return
    largest = values.detach().amax(-1)  # NaN wins, so do +infinity, and -infinity where nothing else is
    if bool(torch.isfinite(largest).all()):
        return
    bad = ~torch.isfinite(largest)
    if real is not None and real.shape[1] >= bad.shape[1]:
        bad &= real[:, real.shape[1] - bad.shape[1] :].to(bad.device)
    if rows := bad.any(1).nonzero()[:, 0].tolist():
        where = "the logits" if found[0] is not None else "the hidden states"
        raise NonFiniteError(where, values.dtype, rows)


def _check_positions(given: Tensor, past: Tensor, shape: tuple[int, int]) -> None:
    """Refuse positions that count earlier padding, which transformers makes where it was given no mask.

    Raises:
        UserError: if they do.
    """
    own = past[:, None] + torch.arange(shape[1])
    if given.shape[-1] == shape[1] and given.shape[0] in (1, len(own)) and (given.cpu() != own).any():
        raise UserError("earlier tokens of this batch were padding; give attention_mask, which says where it was")


_hooks: weakref.WeakKeyDictionary[PreTrainedModel, Hooks] = weakref.WeakKeyDictionary()


def hooks_of(model: PreTrainedModel) -> Hooks:
    """The hooks around `model`'s calls, put there once."""
    carried = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    if model not in _hooks and (copied := next((h for h in carried if isinstance(h, Hooks)), None)) is not None:
        _hooks[model] = copied  # the model is a copy of one that has hooks
    if model not in _hooks:
        _hooks[model] = Hooks(model)
    return _hooks[model]


@contextmanager
def idle(model: PreTrainedModel) -> Iterator[None]:
    """Calls of `model` are its own for a while, whatever `pruning` it is in."""
    hooks = hooks_of(model)
    scope, hooks.scope = hooks.scope, None
    try:
        yield
    finally:
        hooks.scope = scope


def logits_at(model: PreTrainedModel, index: Tensor, **inputs: Any) -> Tensor:
    """The model's logits [B, len(index), vocabulary] at the columns `index` (int64) of its input.

    Only those are computed, where the model can.

    Raises:
        UnsupportedModel: if the model gives logits of other columns.
    """
    columns = inputs["input_ids"].shape[1]
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    # numbers go to whichever device has the last layer; a tensor, accelerate would move to the first
    columns_asked = index.tolist() if is_spread(model) else index
    logits = model(**inputs, **({"logits_to_keep": columns_asked} if keeps else {})).logits
    if logits.shape[1] == columns != len(index):
        return logits[:, index]
    if logits.shape[1] != len(index):
        raise UnsupportedModel(
            f"{type(model).__name__} was asked for the logits of {len(index)} of {columns} tokens and gave "
            f"{logits.shape[1]}; choose another model"
        )
    return logits


def new_tokens(shape: tuple[int, int], past: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each row's new tokens are among `shape` = (B, T) columns: first column and number, int64 [B] each.

    Raises:
        UserError: if the mask has another size, or a gap within a row's new tokens.
    """
    start, length, order = ragged_tokens(shape, past, mask)
    if order is not None:
        raise UserError("attention_mask has a gap inside a row's new tokens; pad at the beginning or at the end")
    return start, length


def ragged_tokens(shape: tuple[int, int], past: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `new_tokens`, and where a row has a gap the columns int64 [B, T] in an order that brings its tokens together.

    Raises:
        UserError: if the mask has another size.
    """
    B, T = shape
    whole = torch.zeros(B, dtype=torch.int64), torch.full((B,), T), None
    if mask is None:
        return whole
    if mask.shape != (B, past + T):
        raise UserError(
            f"attention_mask has shape {tuple(mask.shape)} and must cover the {past} tokens read so far and the {T} new "
            f"ones of {B} rows"
        )
    real = mask[:, past:].bool().cpu()
    if bool(real.all()):
        return whole
    length = real.sum(1)
    start = real.int().argmax(1)
    column = torch.arange(T)
    if torch.equal(real, (column >= start[:, None]) & (column < (start + length)[:, None])):
        return start, length, None
    return torch.zeros_like(start), length, (~real).int().argsort(dim=1, stable=True)
