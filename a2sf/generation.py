"""Generating text with a cache that a policy keeps small: `PrunedCache` for transformers' `generate`, and `pruning`.

    cache = PrunedCache(model, policy=A2SF(forgetting_factor=0.3), budget=Budget(ratio=0.2, base="context"))
    model.generate(**inputs, cache=cache, max_new_tokens=100)

A hook around the model's call, put there by `PrunedCache`, tells the attention function which cache and which tokens a
call is about; calls without a `PrunedCache` are untouched. Shapes as in `a2sf.eviction`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from a2sf.attention import (
    IMPLEMENTATION,
    Pass,
    Plan,
    UnsupportedModel,
    active,
    attached,
    check_finite,
    check_reached,
    mixes_windows,
    rope_switch,
    within_window,
)
from a2sf.budget import Budget
from a2sf.errors import ConfigError, UserError
from a2sf.eviction import EvictionState
from a2sf.models import check_exact
from a2sf.policy import Policy, Retention
from a2sf.slots import PrunedLayer, Step

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers' models call the cache they are given."""


class PrunedCache(Cache):
    """A cache of at most `C` tokens per layer and KV head, for one batch of sequences.

    Give it to `model.generate(..., cache=cache)` or to the model itself; padding (`attention_mask`) never enters it.
    Budgets are resolved once, from the first call's tokens, and stay when the cache is used again for the next turn.

    Args:
        model: the model it will be used with.
        policy, budget: what to keep (None: for a policy that ignores budgets). A ratio of base `context` is one of the
            row's prompt, of base `total` one of the prompt and `max_new_tokens`.
        max_new_tokens: as given to `generate`; needed for a ratio of base `total`.
        context_tokens: the prompt's length, or each row's; needed for a ratio when the prompt is read in chunks.
        backend: which implementation runs, `auto` or a name in `a2sf.kernels.BACKENDS`.
        trace: keep note of what every step evicts (`evicted`), at a cost in speed and memory.

    Raises:
        ConfigError: if a setting is not allowed, or does not fit the model or the policy.
        UnsupportedModel: if the model's attention cannot be pruned exactly.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        budget: Budget | None = None,
        *,
        max_new_tokens: int | None = None,
        context_tokens: int | Sequence[int] | None = None,
        backend: str = "auto",
        trace: bool = False,
    ) -> None:
        config = model.config.get_text_config()
        check_settings(policy, budget, config.num_hidden_layers)
        by_total = budget is not None and budget.ratio is not None and budget.base == "total"
        if by_total and policy.uses_budget and max_new_tokens is None:
            raise ConfigError(
                "budget.base",
                "total",
                "a share of the whole sequence needs max_new_tokens=...; give it, or a ratio of base context",
            )
        hooks_of(model)
        positions = getattr(config, "max_position_embeddings", None) or 2**31
        super().__init__(layers=[PrunedLayer(positions, backend, trace) for _ in range(config.num_hidden_layers)])
        self.policy, self.budget = policy, budget
        self.max_new_tokens, self.context_tokens = max_new_tokens, context_tokens
        self.policy_on_sliding = not mixes_windows(model.config)
        self.positions = positions
        self.rope_switch = rope_switch(model.config)
        self._model = weakref.ref(model)
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next call starts a new batch and resolves the budgets anew."""
        for layer in self.layers:
            layer.reset()
        self.columns = 0  # tokens of every row, padding included: what transformers calls the sequence's length
        self.seen: Tensor | None = None  # int64 [B], tokens of each row that were no padding
        self.retention: list[tuple[Retention, ...]] = []  # what each layer keeps, per row
        self.calls = 0
        self._pass: _CachePass | None = None
        self._spoilt = False

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first call."""
        return -1 if self.seen is None else len(self.seen)

    @property
    def nbytes(self) -> int:
        """Bytes that the layers' keys, values, scores and positions take."""
        return sum(layer.nbytes for layer in self.layers)

    def state(self, layer: int) -> EvictionState:
        """What `layer` has cached, a copy; `.positions` [B, K, slots] are the kept positions, without padding."""
        return self.layers[layer].state()

    def evicted(self, layer: int) -> Tensor:
        """int32 [B, K, tokens fed, padding included]: the position evicted at each step, -1 for none; needs `trace`."""
        return self.layers[layer].evicted()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.columns + query_length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are: the attention function inserts them, and attends to the cached ones."""
        if self._pass is None:
            raise UserError(
                "this cache was made for another model, or the model was called through one of its parts; make one with "
                "PrunedCache(model, ...) and call that model"
            )
        return key_states, value_states

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen is not None:
            self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order; a row may be taken several times."""
        if self.seen is None:
            return
        rows = indices.cpu()
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        if torch.equal(rows, torch.arange(len(self.seen))):
            return  # beams often stay where they are, and moving them copies the cache
        self.seen = self.seen[rows]
        self.retention = [self.retention[i] for i in rows.tolist()]
        for layer in self.layers:
            layer.batch_select_indices(rows)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UserError(
                "a pruned cache cannot take tokens back, because others were evicted for them; generate without an "
                "assistant model"
            )

    def begin(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> _CachePass:
        """Start a call of `model` on `shape` = (B, T) new tokens; `mask` [B, columns] is 0 where a token is padding.

        Raises:
            UserError: if the cache does not fit the model, the batch or the mask, or a sequence gets too long.
        """
        if self._model() is not model:
            raise UserError(
                f"this cache was made for another model than this {type(model).__name__}; make one with "
                "PrunedCache(model, ...)"
            )
        if self._spoilt:
            raise UserError("an earlier call with this cache stopped midway; call cache.reset() and start again")
        if self.seen is not None and len(self.seen) != shape[0]:
            raise UserError(
                f"this cache holds a batch of {len(self.seen)} sequences and the model was called with {shape[0]}; make "
                "a cache for each batch"
            )
        start, length = new_tokens(shape, self.columns, mask)
        if self.seen is None:
            self._resolve(length)
            self.seen = torch.zeros(shape[0], dtype=torch.int64)
        elif self.calls == 1 and shape[1] > 1 and self._depends_on_prompt and self.context_tokens is None:
            raise UserError(
                "the prompt comes in chunks, so its length is not known when a share of it is needed; give "
                "PrunedCache(..., context_tokens=...), or budget.tokens"
            )
        after = self.seen + length
        self._check_length(after, prompt=self.calls == 0)
        self._pass = _CachePass(self, Step(start, length, self.seen, after, shape[1]), len(self.layers))
        return self._pass

    def end(self, completed: bool) -> None:
        """Finish the call that `begin` started; a cache whose call failed is not used again."""
        done, self._pass = self._pass, None
        if done is None:
            return
        self._spoilt = not completed
        self.seen = done.step.after
        self.columns += done.step.columns
        self.calls += 1

    def rule(self, layer: int, window: int | None) -> list[Retention]:
        """What `layer` keeps of each row; a layer may have a sliding window of its own."""
        kept = [row[layer] for row in self.retention]
        if window is None:
            return kept
        assert self._pass is not None
        after = self._pass.step.after.tolist()
        return [within_window(k, window, layer, n, self.policy_on_sliding) for k, n in zip(kept, after, strict=True)]

    def limit(self) -> int | None:
        """The longest a row can get, where that is known."""
        if self.max_new_tokens is None or self.calls:
            return None
        assert self._pass is not None
        return int(self._pass.step.after.max()) + self.max_new_tokens

    @property
    def _depends_on_prompt(self) -> bool:
        return self.policy.uses_budget and self.budget is not None and self.budget.ratio is not None

    def _resolve(self, length: Tensor) -> None:
        context = length.tolist()
        if self.context_tokens is not None:
            given = self.context_tokens
            context = [given] * len(context) if isinstance(given, int) else list(given)
            if len(context) != len(length):
                raise UserError(f"context_tokens gives {len(context)} lengths and the batch has {len(length)} rows")
        layers, more = len(self.layers), self.max_new_tokens or 0
        self.retention = [retention_of(self.policy, self.budget, n + more, n, layers) for n in context]

    def _check_length(self, after: Tensor, prompt: bool) -> None:
        longest = int(after.max()) + (max(0, self.max_new_tokens - 1) if prompt and self.max_new_tokens else 0)
        if longest > self.positions:
            raise UserError(
                f"the sequence has {longest} tokens{' with those to generate' if prompt else ''} and the model "
                f"{self.positions} positions; shorten the prompt or generate less"
            )
        if int(after.min()) <= self.rope_switch < longest:
            raise UnsupportedModel(
                f"the model's rotary embedding changes at {self.rope_switch:.0f} tokens, and this batch has sequences on "
                "both sides of it, which is not supported under pruning; use shorter sequences"
            )


@dataclass
class _CachePass:
    """One call of a model through a `PrunedCache`: an `a2sf.attention.Pass`."""

    cache: PrunedCache
    step: Step
    layers: int
    reached: set[int] = field(default_factory=set)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Insert, attend, score and evict in one layer, [B, H, T, V]."""
        if self.step.columns > 1:
            check_finite(layer, query=query, key=key, value=value)
        store: PrunedLayer = self.cache.layers[layer]
        if not store.is_initialized:
            store.rule = self.cache.rule(layer, window)
        elif window is not None:
            self.cache.rule(layer, window)  # refuses a sequence that has outgrown the window
        output = store.attend(query, key, value, self.step, scale, self.cache.limit())
        if self.step.columns == 1:
            check_finite(layer, output=output)  # one look instead of three: NaN and infinity end up there
        self.reached.add(layer)
        return output


def new_tokens(shape: tuple[int, int], past: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each row's new tokens are among `shape` = (B, T) columns: first column and number, int64 [B] each.

    Raises:
        UserError: if the mask has another size, or a gap within a row's new tokens.
    """
    B, T = shape
    if mask is None:
        return torch.zeros(B, dtype=torch.int64), torch.full((B,), T)
    if mask.ndim != 2:
        raise UnsupportedModel(
            "only a padding mask [batch, tokens] can be used with pruning; give attention_mask as one"
        )
    if mask.shape != (B, past + T):
        raise UserError(
            f"attention_mask has shape {tuple(mask.shape)} and must cover the {past} tokens read so far and the {T} new "
            f"ones of {B} rows"
        )
    real = mask[:, past:].bool().cpu()
    if bool(real.all()):
        return torch.zeros(B, dtype=torch.int64), torch.full((B,), T)
    length = real.sum(1)
    start = real.int().argmax(1)
    column = torch.arange(T)
    if not torch.equal(real, (column >= start[:, None]) & (column < (start + length)[:, None])):
        raise UserError("attention_mask has a gap inside a row's new tokens; pad at the beginning or at the end")
    return start, length


def check_settings(policy: Policy, budget: Budget | None, layers: int) -> None:
    """Refuse a policy and budget that do not fit each other, or a model of `layers` layers.

    Raises:
        ConfigError: if they do not.
    """
    policy.check(layers)
    if not policy.uses_budget:
        return
    if budget is None:
        raise ConfigError("budget", None, f"the policy {policy.name} needs budget.ratio or budget.tokens")
    budget.check(layers)
    tokens = budget.tokens if isinstance(budget.tokens, tuple) else (budget.tokens,)
    if budget.tokens is not None and min(tokens) < policy.least_budget:
        raise ConfigError(
            "budget.tokens",
            budget.tokens,
            f"recent + sinks may not exceed the budget, and {policy.name} protects {policy.least_budget} tokens",
        )


def retention_of(policy: Policy, budget: Budget | None, total: int, context: int, layers: int) -> tuple[Retention, ...]:
    """What each layer keeps of a sequence of `total` tokens whose prompt has `context`.

    Raises:
        UserError: if the policy protects more tokens than the budget holds.
    """
    slots = [budget.slots(total=total, context=context, layer=i) if budget else 1 for i in range(layers)]
    try:
        return tuple(policy.retention(c, i) for i, c in enumerate(slots))
    except ValueError as error:
        raise UserError(f"policy {policy.name} does not fit a budget of {min(slots)} tokens: {error}") from error


@dataclass(frozen=True)
class _Scope:
    """What `pruning` does to the calls of a model."""

    policy: Policy
    budget: Budget | None
    max_new_tokens: int | None
    backend: str


@contextmanager
def pruning(
    model: PreTrainedModel,
    policy: Policy,
    budget: Budget | None = None,
    *,
    max_new_tokens: int | None = None,
    backend: str = "auto",
) -> Iterator[PreTrainedModel]:
    """Prune every call of `model` inside the block: plain calls on padded batches, and `generate`.

    A plain call (`use_cache=False`) reads a batch whose rows may be padded on either side (`attention_mask`) and prunes
    each as one sequence of its own length. A call that keeps a cache, as `generate` makes them, gets a `PrunedCache`.

        with pruning(model, H2O(), Budget(ratio=0.2, base="context")):
            logits = model(ids, attention_mask=mask, use_cache=False).logits
            text = model.generate(ids, attention_mask=mask, max_new_tokens=50)

    Args:
        model, policy, budget, max_new_tokens, backend: as for `PrunedCache`.

    Raises:
        ConfigError, UnsupportedModel: if a setting is not allowed or the model cannot be pruned.
    """
    check_settings(policy, budget, model.config.get_text_config().num_hidden_layers)
    hooks = hooks_of(model)
    before, hooks.scope = hooks.scope, _Scope(policy, budget, max_new_tokens, backend)
    try:
        with attached(model):
            yield model
    finally:
        hooks.scope = before


class _Hooks:
    """What happens around every call of one model; idle without a `PrunedCache` or `pruning`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.names = [n for n in inspect.signature(model.forward).parameters if n != "self"]
        self.scope: _Scope | None = None
        self.open: tuple[ExitStack, Pass, PrunedCache | None] | None = None
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, with_kwargs=True, always_call=True)

    def before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict] | None:
        self.close(None)  # a call that was interrupted left it open
        named = dict(zip(self.names, args, strict=False)) | kwargs
        cache = next((named[n] for n in CACHE_NAMES if named.get(n) is not None), None)
        if self.scope is not None:
            cache = self._supply(model, cache, named)
        elif not isinstance(cache, PrunedCache):
            return None
        tokens = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
        shape, mask = (tokens.shape[0], tokens.shape[1]), named.get("attention_mask")
        past = torch.zeros(shape[0], dtype=torch.int64) if cache is None or cache.seen is None else cache.seen
        current: Pass = cache.begin(model, shape, mask) if cache is not None else self._plan(model, shape, mask)
        if mask is not None and named.get("position_ids") is None and "position_ids" in self.names:
            # positions count a row's own tokens, wherever its padding is
            real = mask[:, -shape[1] :].long()
            named["position_ids"] = (past[:, None].to(mask.device) + real.cumsum(1) - 1).clamp(min=0)
        stack = ExitStack()
        self.open = stack, current, cache
        if model.config._attn_implementation != IMPLEMENTATION:
            stack.enter_context(attached(model))
        stack.callback(active.set, active.get())
        active.set(current)
        return (), named

    def after(self, model: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.close(output)

    def close(self, output: Any) -> None:
        """End the open pass, if there is one; `output` is None where the model's call failed."""
        if self.open is None:
            return
        (stack, current, cache), self.open = self.open, None
        stack.close()
        if cache is not None:
            cache.end(completed=output is not None)
        if output is not None:
            check_reached(current)

    def _supply(self, model: PreTrainedModel, cache: Any, named: dict[str, Any]) -> PrunedCache | None:
        """The cache for a call inside `pruning`: the one that was given if it is pruned, else a new one if any is kept."""
        scope = self.scope
        assert scope is not None
        if isinstance(cache, PrunedCache):
            return cache
        if cache is not None and cache.get_seq_length() > 0:
            raise UserError(
                "inside pruning(...) the model was called with a cache that was filled without pruning; start with an "
                "empty one, or a PrunedCache"
            )
        keep = named.get("use_cache")
        if cache is None and not (model.config.get_text_config().use_cache if keep is None else keep):
            return None
        more = scope.max_new_tokens if cache is not None or scope.max_new_tokens is not None else 0
        new = PrunedCache(model, scope.policy, scope.budget, max_new_tokens=more, backend=scope.backend)
        for name in CACHE_NAMES:
            named.pop(name, None)
        named[next(n for n in CACHE_NAMES if n in self.names)] = new
        return new

    def _plan(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> Plan:
        scope = self.scope
        assert scope is not None
        start, length = (x.tolist() for x in new_tokens(shape, 0, mask))
        layers = model.config.get_text_config().num_hidden_layers
        kept = [retention_of(scope.policy, scope.budget, n, n, layers) for n in length]
        return Plan.of_rows(
            length,
            start,
            lambda row, layer: kept[row][layer],
            layers,
            policy_on_sliding=not mixes_windows(model.config),
            backend=scope.backend,
        )


_hooks: weakref.WeakKeyDictionary[PreTrainedModel, _Hooks] = weakref.WeakKeyDictionary()


def hooks_of(model: PreTrainedModel) -> _Hooks:
    """The hooks around `model`'s calls, put there once, after a check that pruning it is exact.

    Raises:
        UnsupportedModel: if it is not.
    """
    if model not in _hooks:
        if model.config.is_encoder_decoder:
            raise UnsupportedModel("only decoder models have a cache to prune, and this one is an encoder-decoder")
        rope_switch(model.config)
        check_exact(model)
        _hooks[model] = _Hooks(model)
    return _hooks[model]
