"""Wraps a model's calls, so that the attention function knows the cache and the tokens of a call.

A model is wrapped once. A call without a bounded cache, outside of any scope, is the model's own.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from a2sf.compat.torch import compiled_from, inside, is_compiled
from a2sf.errors import Notice, UserError
from a2sf.hf.attention.context import ContextStack
from a2sf.hf.attention.errors import UnsupportedModel
from a2sf.hf.attention.function import Pass, attached, check_reached, following
from a2sf.hf.attention.masks import CACHE_NAMES, arguments, check_call
from a2sf.hf.attention.named import Configs, configs_of, named
from a2sf.hf.calls.chunks import ModelCall, columns, joined, splits
from a2sf.hf.calls.logits import check_output
from a2sf.hf.calls.read_tokens import ReadTokens
from a2sf.hf.calls.tokens import check_positions, tokens_of
from a2sf.hf.calls.wrapped import Wrapped, cache_in


@runtime_checkable
class BoundedCache(Protocol):
    """A cache that a call reads and writes.

    Attributes:
        seen: int64 [B], each row's tokens so far, None before the first.
        incoming: the first call's tokens or embeddings, set before the call begins.
        failed: whether a call stopped midway, so that the next one is refused.
        text: the tokens that were read.
    """

    seen: Tensor | None
    incoming: Tensor | None
    failed: bool
    text: ReadTokens

    def parts(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> list[int]:
        """The columns at which the parts of such a call end; a call that does not fit is refused."""
        ...

    def begin(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> Pass:
        """Start a call on `shape` = (B, T) new tokens; `mask` [B, columns] is 0 where a token is padding."""
        ...

    def end(self, completed: bool) -> None:
        """Finish it."""
        ...


class Scope(Protocol):
    """What is done with calls that have no bounded cache."""

    def supply(self, model: PreTrainedModel, cache: Any, keep: bool | None) -> BoundedCache | None:
        """The cache for a call that was given `cache` (or None) and `use_cache=keep`; None: it uses no cache."""
        ...

    def passing(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> BoundedCache | None:
        """A cache for reading a call without a cache in parts; None: it is read at once."""
        ...

    def plan(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> Pass:
        """What the attention does in a call without a cache."""
        ...


class Around(Wrapped):
    """The `forward` of a pruned model: calls with a bounded cache, or in a scope, are passes; others are the model's own.

    It is an attribute of the model, as accelerate's is for models on several devices, so that a pass ends with the call,
    however that ends: PyTorch runs no hooks after Ctrl-C, nor after another hook that fails. The data of a call are in the
    call's own context.
    """

    def __init__(self, model: PreTrainedModel, own: Callable[..., Any] | None = None) -> None:
        super().__init__(model, own)
        method = type(model).forward
        self.__name__, self.__doc__ = "forward", method.__doc__
        self.__signature__ = inspect.signature(own or MethodType(method, model))
        self._names = list(self.__signature__.parameters)
        self._cache_name = _cache_name(self._names)
        self._configs: Configs | None = None

    def __deepcopy__(self, memo: dict[Any, Any]) -> Around:
        model = self._of()
        twin = copy.deepcopy(model, memo)
        for cache in memo.pop(_copies_of(model), ()):
            cache.belongs_to(twin)
        return Around(twin, copy.deepcopy(self._own, memo))

    @torch.compiler.disable(recursive=False)  # its decisions are no part of a compiled graph
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._of()
        own = self._own or MethodType(type(model).forward, model)
        if any(m is model for m in _inside.get()):
            return own(*args, **kwargs)
        named = dict(zip(self._names, args, strict=False)) | kwargs
        cache = cache_in(named)
        scopes = [s for of, s in _scopes.innermost_first() if of is model]
        scope = scopes[0] if scopes else None
        if scope is not None:
            cache = scope.supply(model, cache, named.get("use_cache"))
            named = {n: x for n, x in named.items() if n not in CACHE_NAMES}
            named |= {self._cache_name: cache} if cache is not None else {}
        elif not isinstance(cache, BoundedCache):
            if not scopes and _scoped.get(model):
                warnings.warn(_ELSEWHERE.format(type(model).__name__), Notice, stacklevel=2)
            return own(*args, **kwargs)
        while (original := compiled_from(own)) is not None:
            own = original
        return self._pruned(model, own, named, cache, scope)

    @torch.compiler.disable
    def _pruned(
        self,
        model: PreTrainedModel,
        own: Forward,
        named: dict[str, Any],
        cache: BoundedCache | None,
        scope: Scope | None,
    ) -> Any:
        """A call, read at once or in parts."""
        tokens, hidden, shaping = tokens_of(named), None, check_call(model, named)
        shape, mask = (tokens.shape[0], tokens.shape[1]), named.get("attention_mask")
        parts = shape[1] > columns(shape[0], tokens.device) and splits(model, named)
        if parts and cache is None and scope is not None:
            cache = hidden = scope.passing(model, shape, mask)
            named |= {self._cache_name: cache} if cache is not None else {}
        if cache is None:
            return self._once(model, own, named, None, scope, shaping)
        with _alone(cache):
            try:
                cache.incoming = tokens if cache.seen is None else None
                ends = cache.parts(model, shape, mask) if parts else []
                call = ModelCall(lambda **part: self._once(model, own, part, cache, scope, shaping), named, shape[1])
                before = call.read(ends)
                output = call.last(ends)
            except BaseException:
                cache.end(completed=False)
                raise
        return joined(before, output, hidden) if before or len(ends) > 1 or hidden is not None else output

    def _once(
        self,
        model: PreTrainedModel,
        own: Forward,
        named: dict[str, Any],
        cache: BoundedCache | None,
        scope: Scope | None,
        shaping: tuple[str, ...],
    ) -> Any:
        """One pass of the model; `shaping` as `check_call` gives it."""
        tokens, mask, given = tokens_of(named), named.get("attention_mask"), named.get("position_ids")
        shape = tokens.shape[0], tokens.shape[1]
        past = torch.zeros(shape[0], dtype=torch.int64) if cache is None or cache.seen is None else cache.seen
        # of one token the positions are not fetched from a GPU, but where rows differ
        several = shape[1] > 1 or len(set(past.tolist())) > 1
        if mask is None and given is not None and several and cache is not None and not cache.failed:
            check_positions(given, past, shape)
        current: Pass
        if cache is not None:
            current = cache.begin(model, shape, mask)
        else:
            assert scope is not None
            current = scope.plan(model, shape, mask)
        if given is None and (mask is not None or bool((past > 0).any())):
            # positions count a row's own tokens, wherever its padding is; a model that is exact follows them
            real = mask[:, -shape[1] :].long() if mask is not None else tokens.new_ones(shape, dtype=torch.int64)
            named = named | {"position_ids": (past[:, None].to(real.device) + real.cumsum(1) - 1).clamp(min=0)}
        if self._configs is None:
            self._configs = configs_of(model)
        inside, before = _inside.get(), arguments.get()
        try:
            _inside.set((*inside, model))
            arguments.set(shaping)
            with attached(model, configs=self._configs), following(current):
                output = own(**named)
        finally:
            _inside.set(inside)
            arguments.set(before)
        if cache is not None:
            cache.end(completed=True)
            cache.text.add(tokens)
        _check_reached(model, current)
        last = isinstance(named.get("logits_to_keep", 0), int)  # the logits are those of the last columns
        check_output(output, mask[:, -shape[1] :].bool() if mask is not None and last else None)
        return output


Forward = Callable[..., Any]
_inside: ContextVar[tuple[PreTrainedModel, ...]] = ContextVar("inside", default=())
"""The models that are in a pass."""
_scopes: ContextStack[tuple[PreTrainedModel, Scope | None]] = ContextStack("scopes")
_scoped: weakref.WeakKeyDictionary[PreTrainedModel, int] = weakref.WeakKeyDictionary()
"""The number of scopes that a model is in, over all contexts."""
_lock = threading.Lock()
_used: dict[int, object] = {}
"""The caches that calls are using, by `id`."""
_ELSEWHERE = (
    "this call of {} is not pruned: pruning(...) was entered in another thread or task and acts on the calls there; enter "
    "it where the model is called, or give the call a PrunedCache"
)


@contextmanager
def scoped(model: PreTrainedModel, scope: Scope | None) -> Iterator[None]:
    """Calls of `model` in this context are handled by `scope`; None: they are the model's own."""
    entered = False
    try:
        with _lock:
            _scoped[model], entered = _scoped.get(model, 0) + (scope is not None), True
        with _scopes.entered((model, scope)):
            yield
    finally:
        with _lock:
            _scoped[model] = _scoped.get(model, 0) - (entered and scope is not None)


@contextmanager
def idle(model: PreTrainedModel) -> Iterator[None]:
    """Calls of `model` are its own inside the block, also within `pruning`."""
    with scoped(model, None), named(configs_of(model), None):
        yield


def surround(model: PreTrainedModel) -> None:
    """Wrap `model`'s calls in an `Around`, once."""
    with _lock:
        found = vars(model).get("forward")
        while found is not None and not (isinstance(found, Around) and found._model() is model):
            found = getattr(found, "__wrapped__", None) or compiled_from(found)
        if found is None:
            model.forward = Around(model, vars(model).get("forward"))


def decoder_of(model: Any) -> PreTrainedModel:
    """The transformers model inside a wrapper: PEFT's adapters, torch.compile, data parallelism.

    Raises:
        UserError: if there is none.
    """
    inner = model
    for _ in range(8):
        if isinstance(inner, PreTrainedModel):
            return inner
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif (found := inside(inner)) is not None:
            inner = found
        else:
            break
    raise UserError(
        f"a {type(model).__name__} cannot be pruned; give a transformers model, such as AutoModelForCausalLM loads"
    )


def following_copy(cache: Any, model: PreTrainedModel | None, memo: dict[Any, Any]) -> PreTrainedModel | None:
    """The model for `cache`, a copy of one for `model`: `model`'s copy, if it is copied too, now or later (`memo`)."""
    if id(model) not in memo:
        memo.setdefault(_copies_of(model), []).append(cache)
    return memo.get(id(model), model)


def _copies_of(model: PreTrainedModel | None) -> tuple[str, int]:
    return "a2sf: copies of the caches of", id(model)


def bare(model: PreTrainedModel) -> Forward:
    """The model's own `forward`, without the wrappers of `torch.compile` and `surround`; it runs outside of graphs."""
    found = vars(model).get("forward")
    while True:
        if isinstance(found, Around):
            found = found._own
        elif (original := compiled_from(found)) is not None:
            found = original
        else:
            return torch.compiler.disable(found or MethodType(type(model).forward, model))


@contextmanager
def _alone(cache: BoundedCache) -> Iterator[None]:
    """Reserve `cache` for one call.

    Raises:
        UserError: if another call is using it.
    """
    mine = object()
    try:
        if _used.setdefault(id(cache), mine) is not mine:  # one step, so that of two threads one is first
            raise UserError("this cache is in the middle of another call; give each thread's call a cache of its own")
        yield
    finally:
        if _used.get(id(cache)) is mine:
            del _used[id(cache)]


def _check_reached(model: PreTrainedModel, current: Pass) -> None:
    """Raise `UnsupportedModel` if a layer did not call the pruned attention."""
    if len(current.reached) < current.layers:
        parts = (m for m in model.modules() if m is not model)
        if any(is_compiled(m) for m in parts):
            raise UnsupportedModel(
                "parts of the model are compiled by torch.compile, whose code runs the model's own attention; compile the "
                "model as a whole, or not at all"
            )
    check_reached(current)


def names_of(model: PreTrainedModel) -> list[str]:
    """The names of the arguments of a model's call."""
    return list(inspect.signature(model.forward).parameters)


def cache_name_of(model: PreTrainedModel) -> str:
    """The name of the cache among the arguments of a model's call."""
    return _cache_name(names_of(model))


def _cache_name(names: Sequence[str]) -> str:
    return next((n for n in CACHE_NAMES if n in names), CACHE_NAMES[0])
