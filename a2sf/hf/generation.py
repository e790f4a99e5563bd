"""Generating text with a cache that a policy keeps small: `PrunedCache` for transformers' `generate`, and `pruning`.

    cache = PrunedCache(model, policy=A2SF(forgetting_factor=0.3), budget=Budget(ratio=0.2, base="context"))
    model.generate(**inputs, cache=cache, max_new_tokens=100)

A hook around the model's call, put there by `PrunedCache`, tells the attention function which cache and which tokens a
call is about; calls without a `PrunedCache` are untouched. Shapes as in `a2sf.engine.eviction`.
"""

from __future__ import annotations

import numbers
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from a2sf.engine.eviction import EvictionState
from a2sf.errors import ConfigError, UserError
from a2sf.hf.attention import Plan, UnsupportedModel, attached, check_finite, mixes_windows, rope_switch, within_window
from a2sf.hf.calls import hooks_of, new_tokens
from a2sf.hf.exactness import require_decoding, require_exact
from a2sf.hf.slots import PrunedLayer, Step
from a2sf.policies.base import UNLIMITED, Policy, Retention
from a2sf.policies.budget import Budget


class PrunedCache(Cache):
    """A cache of at most `C` tokens per layer and KV head, for one batch of sequences.

    Give it to `model.generate(..., cache=cache)` or to the model itself; padding (`attention_mask`) never enters it.
    Budgets are resolved once, from the first call's tokens, and stay when the cache is used again for the next turn.

    Args:
        model: the model it will be used with.
        policy, budget: what to keep (None: for a policy that ignores budgets). A ratio of base `context` is one of the
            row's prompt, of base `total` one of the tokens that are read: the prompt and all new tokens but the last.
        max_new_tokens: as given to `generate`; needed for a ratio of base `total`.
        context_tokens: the prompt's length, or each prompt's; needed for a ratio when the prompt is read in chunks.
        backend: which implementation runs, `auto` or a name in `a2sf.engine.kernels.BACKENDS`.
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
        if (
            max_new_tokens is None
            and policy.uses_budget
            and budget
            and budget.ratio is not None
            and budget.base == "total"
        ):
            raise ConfigError(
                "budget.base",
                "total",
                "a share of the whole sequence needs max_new_tokens=...; give it, or a ratio of base context",
            )
        self.policy, self.budget = policy, budget if policy.uses_budget else None
        self.prove(model)
        hooks_of(model)
        positions = getattr(config, "max_position_embeddings", None) or 2**31
        super().__init__(layers=[PrunedLayer(positions, backend, trace) for _ in range(config.num_hidden_layers)])
        self.layers: list[PrunedLayer]  # type: ignore[assignment]
        self.trace = trace
        if context_tokens is not None and not isinstance(context_tokens, numbers.Integral):
            context_tokens = [int(n) for n in context_tokens]  # type: ignore[union-attr]
        self.max_new_tokens, self.context_tokens = max_new_tokens, context_tokens
        self.policy_on_sliding = not mixes_windows(model.config)
        self.positions = positions
        self.rope_switch = rope_switch(model.config)
        self._model = weakref.ref(model)
        self.reset()

    def prove(self, model: PreTrainedModel) -> None:
        """Try, once per model, that decoding through such a cache is exact.

        Raises:
            UnsupportedModel: if it is not.
        """
        prove_decoding(model, self.policy, self.budget)

    def reset(self) -> None:
        """Forget everything; the next call starts a new batch and resolves the budgets anew."""
        for layer in self.layers:
            layer.reset()
        self.columns = 0  # tokens of every row, padding included: what transformers calls the sequence's length
        self.seen: Tensor | None = None  # int64 [B], tokens of each row that were no padding
        self.retention: list[tuple[Retention, ...]] = []  # what each layer keeps, per row
        self.calls = 0
        self._pass: _CachePass | None = None
        self._attentions: list[int] = []  # how many times each layer calls its attention in a pass
        self._spoilt = False

    def __bool__(self) -> bool:
        """False: Phi-3's generation drops a cache that is true where its rotary embedding changes; others ask for None."""
        return False

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first call."""
        return -1 if self.seen is None else len(self.seen)

    @property
    def nbytes(self) -> int:
        """Bytes that the layers' keys, values, scores and positions take."""
        return sum(layer.nbytes for layer in self.layers)

    def state(self, layer: int) -> EvictionState:
        """What `layer` has cached, a copy; `.positions` [B, K, slots] are the kept positions, without padding.

        Raises:
            UserError: if nothing has been read yet.
        """
        if not self.layers[layer].is_initialized:
            raise UserError("this cache has read nothing yet; call the model with it first")
        return self.layers[layer].state()

    def load(self, states: Sequence[EvictionState]) -> None:
        """Go on from stored states, one per layer and of as many rows, instead of what is cached.

        Raises:
            UserError: if nothing has been read yet, so that neither the rows nor their budgets are known; if the states
                are not of as many layers and rows, or hold more than the budget.
        """
        if self.seen is None:
            raise UserError("a pruned cache takes over states once it has read something; call the model with it first")
        if len(states) != len(self.layers) or any(len(s.seen) != len(self.seen) for s in states):
            raise UserError(
                f"give one state for each of the {len(self.layers)} layers, each of {len(self.seen)} rows as this cache has"
            )
        for layer, state in zip(self.layers, states, strict=True):
            if bool(((state.positions >= 0).sum(-1).amax(-1).cpu() > layer.budget).any()):
                raise UserError(
                    "a state holds more tokens than this cache's budget; make a cache with the state's budget"
                )
        for layer, state in zip(self.layers, states, strict=True):
            layer.load(state)
        self.seen = states[0].seen.cpu().clone()
        self.columns = int(self.seen.max())

    def evicted(self, layer: int) -> Tensor:
        """int32 [B, K, tokens fed, padding included]: the position evicted at each step, -1 for none; needs `trace`.

        Raises:
            UserError: if the cache keeps no trace, or has read nothing yet.
        """
        if not self.trace or not self.calls:
            raise UserError(
                "this cache has noted nothing; make it with PrunedCache(..., trace=True) and call the model"
            )
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
        in_chunks = (self.calls == 1 and shape[1] > 1) or (self.calls == 0 and shape[1] == 1)
        if in_chunks and self._depends_on_prompt and self.context_tokens is None:
            raise UserError(
                "the prompt comes in chunks, so its length is not known when a share of it is needed; give "
                "PrunedCache(..., context_tokens=...), or budget.tokens"
            )
        if self.seen is not None and mask is not None:
            earlier = mask[:, : self.columns].long().sum(1).cpu()
            if not torch.equal(earlier, self.seen):
                raise UserError(
                    "attention_mask hides tokens that this cache has read, or shows padding that it has not; pass the "
                    "mask of the earlier calls with ones for what was generated, and start anew where rows ended early"
                )
        seen = torch.zeros(shape[0], dtype=torch.int64) if self.seen is None else self.seen
        after = seen + length
        self._check_length(after, torch.where(seen > 0, seen, after), prompt=self.calls == 0)
        if self.seen is None:
            self._resolve(length)  # last, so that a call that is refused leaves nothing behind
            self.seen = seen
        self._pass = _CachePass(self, Step(start, length, seen, after, shape[1]), len(self.layers))
        return self._pass

    def end(self, completed: bool) -> None:
        """Finish the call that `begin` started; a cache whose call failed is not used again."""
        done, self._pass = self._pass, None
        if done is None:
            return
        attentions = [done.attentions[i] for i in range(done.layers)]
        self._attentions = self._attentions or attentions
        self._spoilt = not completed or attentions != self._attentions
        if completed and self._spoilt:
            raise UnsupportedModel(
                "the model's layers call their attention another number of times than in the first pass, which a pruned "
                "cache does not follow"
            )
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
        return self.budget is not None and self.budget.ratio is not None

    def _resolve(self, length: Tensor) -> None:
        context = length.tolist()
        if self.context_tokens is not None:
            given = self.context_tokens
            context = [int(given)] * len(context) if isinstance(given, numbers.Integral) else list(given)
            if context and len(length) % len(context) == 0:  # beams, or several texts of a prompt, are neighbours
                context = [n for n in context for _ in range(len(length) // len(context))]
            if len(context) != len(length):
                raise UserError(f"context_tokens gives {len(context)} lengths and the batch has {len(length)} rows")
        layers, more = len(self.layers), max(0, (self.max_new_tokens or 0) - 1)  # the last token is never read
        self.retention = [retention_of(self.policy, self.budget, n + more, n, layers) for n in context]

    def _check_length(self, after: Tensor, earliest: Tensor, prompt: bool) -> None:
        """`earliest` [B]: the shortest length at which a cached key of the row was made."""
        longest = int(after.max()) + (max(0, self.max_new_tokens - 1) if prompt and self.max_new_tokens else 0)
        if longest > self.positions:
            and_more = " with those to generate" if prompt and self.max_new_tokens else ""
            raise UserError(
                f"the sequence has {longest} tokens{and_more} and the model {self.positions} positions; shorten the prompt "
                "or generate less"
            )
        if int(earliest.min()) <= self.rope_switch < longest:
            raise UnsupportedModel(
                f"the model's rotary embedding changes at {self.rope_switch:.0f} tokens, and this batch has keys from both "
                "sides of it, which is not supported under pruning; use shorter sequences"
            )


@dataclass
class _CachePass:
    """One call of a model through a `PrunedCache`: an `a2sf.hf.attention.Pass`."""

    cache: PrunedCache
    step: Step
    layers: int
    attentions: Counter[int] = field(default_factory=Counter)

    @property
    def reached(self) -> set[int]:
        """The layers that have called their attention."""
        return set(self.attentions)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Insert, attend, score and evict in one layer, [B, H, T, V]."""
        tokens = (range(len(self.step.start)), self.step.start.tolist(), self.step.length.tolist())
        if self.step.columns > 1:
            check_finite(layer, tokens, query=query, key=key, value=value)
        store: PrunedLayer = self.cache.layers[layer]
        if not store.is_initialized:
            store.rule = self.cache.rule(layer, window)
        elif window is not None:
            self.cache.rule(layer, window)  # refuses a sequence that has outgrown the window
        which = self.attentions[layer]
        output = store.attend(query, key, value, self.step, scale, self.cache.limit(), which)
        if self.step.columns == 1:
            # NaN and infinity end up in the output, but not those of a key that only gets no attention
            check_finite(layer, tokens, key=key, output=output)
        self.attentions[layer] += 1
        return output


class _TrialCache(PrunedCache):
    """A cache that evicts nothing, to prove others by."""

    def prove(self, model: PreTrainedModel) -> None: ...

    def _resolve(self, length: Tensor) -> None:
        self.retention = [(Retention(budget=UNLIMITED),) * len(self.layers) for _ in length]


def prove_decoding(model: PreTrainedModel, policy: Policy, budget: Budget | None) -> None:
    """Try, once per model, that scoring it and decoding through a `PrunedCache` are exact; any policy will do.

    Raises:
        UnsupportedModel: if they are not.
    """
    require_exact(model)
    require_decoding(model, lambda: _TrialCache(model, policy, budget, max_new_tokens=1, context_tokens=1))


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
        return tuple(policy.keeps(c, i, layers) for i, c in enumerate(slots))
    except ValueError as error:
        raise UserError(f"policy {policy.name} does not fit a budget of {min(slots)} tokens: {error}") from error


@dataclass(frozen=True)
class _Scope:
    """What `pruning` does to the calls of a model."""

    policy: Policy
    budget: Budget | None
    max_new_tokens: int | None
    backend: str

    def supply(self, model: PreTrainedModel, cache: Any, keep: bool | None) -> PrunedCache | None:
        """The cache for a call inside `pruning`: the one that was given if it is pruned, else a new one if any is kept."""
        if isinstance(cache, PrunedCache):
            return cache
        if cache is not None and cache.get_seq_length() > 0:
            raise UserError(
                "inside pruning(...) the model was called with a cache that was filled without pruning; start with an "
                "empty one, or a PrunedCache"
            )
        if cache is None and not (model.config.get_text_config().use_cache if keep is None else keep):
            return None
        more = self.max_new_tokens if cache is not None else 0  # without one it is a plain call, of its own tokens
        return PrunedCache(model, self.policy, self.budget, max_new_tokens=more, backend=self.backend)

    def plan(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> Plan:
        start, length = (x.tolist() for x in new_tokens(shape, 0, mask))
        layers = model.config.get_text_config().num_hidden_layers
        kept = [retention_of(self.policy, self.budget, n, n, layers) for n in length]
        return Plan.of_rows(
            length,
            start,
            lambda row, layer: kept[row][layer],
            layers,
            policy_on_sliding=not mixes_windows(model.config),
            backend=self.backend,
        )


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
    require_exact(model)
    with suppress(UnsupportedModel):  # told once a cache is made; calls without one are exact
        prove_decoding(model, policy, budget)
    hooks = hooks_of(model)
    hooks.close(None)  # a call that was interrupted left it open
    before, hooks.scope = hooks.scope, _Scope(policy, budget if policy.uses_budget else None, max_new_tokens, backend)
    try:
        with attached(model):
            yield model
    finally:
        hooks.scope = before
