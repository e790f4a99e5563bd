"""Generating text with a cache that a policy keeps small: `PrunedCache` for transformers' `generate`.

    cache = PrunedCache(model, policy=A2SF(forgetting_factor=0.3), budget=Budget(ratio=0.2, base="context"))
    model.generate(**inputs, cache=cache, max_new_tokens=100)

What `PrunedCache` puts around the model's call (`a2sf.hf.calls`) tells the attention function which cache and which tokens
a call is about; calls without a `PrunedCache` are untouched. Shapes as in `a2sf.engine.state`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from a2sf.engine.kernels import check_backend
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import EvictionState
from a2sf.errors import ConfigError, UserError
from a2sf.hf.attention.errors import UnsupportedModel, check_finite
from a2sf.hf.attention.windows import keeps_window, mixes_windows, rope_switch, within_window
from a2sf.hf.cache.layer import PrunedLayer
from a2sf.hf.cache.store import How, Step
from a2sf.hf.cache.stored import FORMAT, ModelRef, check, is_stored, settings, tensors_of
from a2sf.hf.calls.around import decoder_of, following_copy, surround
from a2sf.hf.calls.chunks import bounds, columns
from a2sf.hf.calls.tokens import ragged_tokens
from a2sf.hf.exactness import require_decoding, require_exact
from a2sf.hf.loading.config import kv_heads_of
from a2sf.hf.settings import check_settings, contexts_for, contexts_of, new_tokens_of, retention_of
from a2sf.policies.arguments import budget_of, policy_of, schedule_of
from a2sf.policies.base import UNLIMITED, Policy, Retention
from a2sf.policies.budget import Budget
from a2sf.policies.schedule import STEP, Schedule, schedule_for


class PrunedCache(Cache):
    """A cache of at most `C` tokens per layer and KV head (more while a schedule says so), for one batch of sequences.

    Give it to `model.generate(..., cache=cache)` or to the model itself; padding (`attention_mask`) never enters it.
    Budgets are resolved once, from the first call's tokens, and stay when the cache is used again for the next turn.

    Args:
        model: the model it will be used with, or what wraps it (PEFT, torch.compile, data parallelism).
        policy: which tokens to keep; a policy's name or class stands for one with its defaults.
        budget: how many tokens to keep (None: for a policy that ignores budgets). A ratio of base `context` is a share of
            the row's prompt, of base `total` a share of the tokens that are read: the prompt and all new tokens but the
            last. 64 stands for `Budget(tokens=64)`, 0.2 for `Budget(ratio=0.2)`.
        schedule: when tokens are evicted, a `Schedule` or its name; None: after every token, or after the prompt for a
            policy that knows no other. A row's prompt is what the first call reads of it, or its `context_tokens`, which
            may be less: then the cut comes within the first call.
        max_new_tokens: as given to `generate`; needed for a ratio of base `total`.
        context_tokens: the prompt's length, or each prompt's; needed when the prompt is read in chunks, for a ratio and
            for the prompt schedule.
        backend: which implementation runs, `auto` or a name in `a2sf.engine.kernels.BACKENDS`.
        trace: keep note of what every step evicts (`evicted`), at a cost in speed and memory.

    Raises:
        ConfigError: if a setting is not allowed, or does not fit the model or the policy.
        UnsupportedModel: if the model's attention cannot be pruned exactly.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy | type[Policy] | str,
        budget: Budget | int | float | None = None,
        *,
        schedule: Schedule | str | None = None,
        max_new_tokens: int | None = None,
        context_tokens: int | Sequence[int] | None = None,
        backend: str = "auto",
        trace: bool = False,
    ) -> None:
        model = decoder_of(model)
        policy, budget, schedule = policy_of(policy), budget_of(budget), schedule_of(schedule)
        max_new_tokens, contexts = new_tokens_of(max_new_tokens), contexts_of(context_tokens)
        check_backend(backend)
        config = model.config.get_text_config()
        check_settings(
            policy,
            budget,
            config.num_hidden_layers,
            schedule=schedule,
            kv_heads=kv_heads_of(model.config),
            generating=True,
        )
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
        self.schedule = schedule_for(policy, schedule)
        if self.schedule.before_question and context_tokens is None:
            raise ConfigError(
                "context_tokens",
                None,
                "schedule.at=context cuts within a prompt, so give the length of what comes before",
            )
        self.prove(model)
        positions = getattr(config, "max_position_embeddings", None) or 2**31
        super().__init__(layers=[PrunedLayer(How(positions, backend, trace)) for _ in range(config.num_hidden_layers)])
        self.layers: list[PrunedLayer]  # type: ignore[assignment]
        self.trace = trace
        self.max_new_tokens, self.context_tokens = max_new_tokens, contexts
        self.policy_on_sliding = not mixes_windows(model.config)
        self.positions = positions
        self.rope_switch = rope_switch(model.config)
        self._model = ModelRef(model)
        self.reset()

    def prove(self, model: PreTrainedModel) -> None:
        """Try, once per model, that decoding through such a cache is exact, and prepare the model's calls for one.

        Raises:
            UnsupportedModel: if it is not.
        """
        prove_decoding(model, self.policy, self.budget)
        surround(model)

    def __deepcopy__(self, memo: dict[Any, Any]) -> PrunedCache:
        """A cache for the same model; one that is copied together with its model is for the copy."""
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        twin.belongs_to(following_copy(twin, self._model(), memo))
        return twin

    def belongs_to(self, model: PreTrainedModel | None) -> None:
        """Be a cache for `model`; None: for one that no longer exists."""
        self._model = ModelRef(model) if model is not None else self._model

    def reset(self) -> None:
        """Forget everything; the next call starts a new batch and resolves the budgets anew."""
        for layer in self.layers:
            layer.reset()
        self.columns = 0  # tokens of every row, padding included: what transformers calls the sequence's length
        self.seen: Tensor | None = None  # int64 [B], tokens of each row that were no padding
        self.retention: list[tuple[Retention, ...]] = []  # what each layer keeps, per row
        self.prompt: list[int] = []  # tokens of each row's prompt
        self.calls = 0
        self._pass: _CachePass | None = None
        self._attentions: list[int] = []  # how many times each layer calls its attention in a pass
        self._spoilt = False
        self._given = self._begins = False  # whether generate was given this cache, and no call came since it began
        self._left = 0  # columns still to be read of a call that is read in parts

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

    def stored(self) -> dict[str, Any]:
        """All that is cached, as tensors on the CPU and plain numbers, for `torch.save` and `load`.

        Raises:
            UserError: if nothing has been read yet.
        """
        model = self._model()
        if self.seen is None or model is None:
            raise UserError("this cache has read nothing yet, or its model is no longer there")
        layers = [{**layer.shape, "state": tensors_of(layer.state())} for layer in self.layers]
        return {
            "format": FORMAT,
            **settings(model, self.policy, self.schedule, self.retention),
            "prompt": list(self.prompt),
            "seen": self.seen.clone(),
            "columns": self.columns,
            "calls": self.calls,
            "attentions": list(self._attentions),
            "layers": layers,
        }

    def _restore(self, stored: Mapping[str, Any]) -> None:
        """Take over what another cache of the same model, policy and budget stored."""
        model = self._model()
        if model is None or self.trace:
            raise UserError("a cache that keeps a trace, or whose model is gone, cannot take over a stored one")
        retention = self._retention_of(stored["prompt"])
        check(stored, settings(model, self.policy, self.schedule, retention))
        self.reset()
        self.retention, self.prompt, self.seen = retention, list(stored["prompt"]), stored["seen"].clone()
        self.columns, self.calls, self._attentions = stored["columns"], stored["calls"], list(stored["attentions"])
        for i, (layer, one) in enumerate(zip(self.layers, stored["layers"], strict=True)):
            state = EvictionState(**{name: x.to(model.device) for name, x in one["state"].items()})
            layer.restore(self.batch_retention(i, one["window"]), one, state)

    def load(self, states: Mapping[str, Any] | Sequence[EvictionState]) -> None:
        """Go on from what `stored` gave, or from states, one per layer and of as many rows, instead of what is cached.

        Raises:
            UserError: if what is stored is of another model, policy, schedule or budget; if states are given and nothing
                has been read yet, so that neither the rows nor their budgets are known; if the states are not of as many
                layers and rows, hold more than the budget, or are of another policy.
        """
        if is_stored(states):
            assert isinstance(states, Mapping)
            return self._restore(states)
        assert isinstance(states, Sequence)
        if self.seen is None:
            raise UserError(
                "a pruned cache takes over states once it has read something, since they do not say what a row keeps; "
                "store cache.stored() instead, which a new cache loads"
            )
        if len(states) != len(self.layers) or any(len(s.seen) != len(self.seen) for s in states):
            raise UserError(
                f"give one state for each of the {len(self.layers)} layers, each of {len(self.seen)} rows as this cache has"
            )
        for layer, state in zip(self.layers, states, strict=True):
            layer.check(state)
        for layer, state in zip(self.layers, states, strict=True):
            layer.load(state)
        self.seen = states[0].seen.cpu().clone()
        self.columns = int(self.seen.max())

    def evicted(self, layer: int) -> Tensor:
        """int32 [B, K, tokens fed, padding included]: the position evicted at each step; needs `trace`.

        It is -1 where a step evicted none, or several (`cuts`), as schedules other than `step` do.

        Raises:
            UserError: if the cache keeps no trace, or has read nothing yet.
        """
        self._check_noted()
        return self.layers[layer].evicted()

    def cuts(self, layer: int) -> Tensor:
        """int64 [n, 4]: row, head, token fed and position of each eviction at a step that evicted several; needs `trace`.

        Raises:
            UserError: if the cache keeps no trace, or has read nothing yet.
        """
        self._check_noted()
        return self.layers[layer].cuts()

    def _check_noted(self) -> None:
        if not self.trace or not self.calls:
            raise UserError(
                "this cache has noted nothing; make it with PrunedCache(..., trace=True) and call the model"
            )

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
        self.prompt = [self.prompt[i] for i in rows.tolist()]
        for layer in self.layers:
            layer.batch_select_indices(rows)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UserError(
                "a pruned cache cannot take tokens back, because others were evicted for them; generate without an "
                "assistant model"
            )

    def parts(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> list[int]:
        """Where the parts end, as columns, in which a call of `model` is to be read (`a2sf.hf.calls.chunks`).

        Raises:
            UserError: as `begin`.
        """
        most = columns(shape[0], model.device)
        if self._left or shape[1] <= most:
            return [shape[1]]
        start, length, order = self._admit(model, shape, mask)
        assert self.seen is not None
        switches = int((self.seen + length).max()) > self.rope_switch  # what comes later says how all are turned
        if switches or (order is not None and self.schedule.prompt):
            return [shape[1]]
        first = 0
        if self.schedule.prompt:
            cut = torch.minimum(torch.tensor(self.prompt) - self.seen, length)  # of the call's tokens, those before it
            first = int(torch.where(cut > 0, start + cut, 0).max())
        ends = bounds(shape[1], most, first)
        self._left = shape[1] if len(ends) > 1 else 0
        return ends

    def _admit(
        self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Check a call as a whole, and resolve the budgets at the first; where each row's new tokens are."""
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
        start, length, order = self._new_tokens(shape, mask)
        self._check_prompt_is_known(shape[1])
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
            if not self.retention:  # else `keep` gave it
                self._resolve(length)  # last, so that a call that is refused leaves nothing behind
            self.seen = seen
        return start, length, order

    def _new_tokens(self, shape: tuple[int, int], mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where each row's new tokens are; a later turn's may have a gap, between the last answer and the question."""
        start, length, order = ragged_tokens(shape, self.columns, mask)
        if order is not None and (self.seen is None or self.trace):
            why = "a trace notes steps by their columns, so give rows of one length" if self.seen is not None else None
            raise UserError(
                f"attention_mask has a gap inside a row's new tokens; {why or 'pad at the beginning or at the end'}"
            )
        return start, length, order

    def _check_prompt_is_known(self, columns: int) -> None:
        """Refuse a call of `columns` tokens where what follows from the prompt's length may be wrong.

        The first call is the prompt. It may be a part of it where it brings one token, and was one where the second brings
        several, unless `generate` began there.

        Raises:
            UserError: if it does.
        """
        depends = self.schedule.prompt or (self.budget is not None and self.budget.ratio is not None)
        unknown = (self.calls == 1 and columns > 1) or (self.calls == 0 and columns == 1)
        if not depends or not unknown or self._begins or self.context_tokens is not None:
            return
        needed = "for the cut after it" if self.schedule.prompt else "for a budget that is a share of it"
        told = (
            "the first call brings a single token"
            if not self.calls
            else (f"the first call brought {max(self.prompt)} tokens and the second brings several more")
        )
        raise UserError(
            f"{told}, so it is not known where the prompt ends, which is needed {needed}; give its length as "
            "context_tokens=..." + ("" if self.schedule.prompt else ", or a budget of tokens")
        )

    @property
    def _is_user_defined(self) -> bool:
        """transformers' `generate` sets it where it begins on a cache that its caller gave: a turn begins."""
        return self._given

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        self._given = self._begins = value

    def begin(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> _CachePass:
        """Start a call of `model` on `shape` = (B, T) new tokens; `mask` [B, columns] is 0 where a token is padding.

        Raises:
            UserError: if the cache does not fit the model, the batch or the mask, or a sequence gets too long.
        """
        start, length, order = self._admit(model, shape, mask) if not self._left else self._new_tokens(shape, mask)
        assert self.seen is not None
        after = self.seen + length
        self._left = max(0, self._left - shape[1])
        self._pass = _CachePass(self, Step(start, length, self.seen, after, shape[1], order), len(self.layers))
        return self._pass

    def end(self, completed: bool) -> None:
        """Finish the call that `begin` started; a cache whose call failed is not used again."""
        done, self._pass = self._pass, None
        self._begins = False
        if not completed and self._left:
            self._spoilt, self._left = True, 0
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
        self.calls += 0 if self._left else 1

    def rows(self, layer: int, window: int | None) -> list[Retention]:
        """What `layer` keeps of each row; a layer may have a sliding window of its own.

        Raises:
            UnsupportedModel: if a row has outgrown the window.
        """
        kept = [row[layer] for row in self.retention]
        if window is None:
            return kept
        seen = self.seen if self._pass is None else self._pass.step.after
        assert seen is not None
        after = seen.tolist()
        return [within_window(k, window, layer, n, self.policy_on_sliding) for k, n in zip(kept, after, strict=True)]

    def batch_retention(self, layer: int, window: int | None) -> BatchRetention:
        """The same as tensors, with the schedule; a layer that goes by its own window evicts step by step."""
        own = window is not None and any(keeps_window(row[layer], self.policy_on_sliding) for row in self.retention)
        return BatchRetention.of(self.rows(layer, window), STEP if own else self.schedule, self.prompt)

    @property
    def more(self) -> int | None:
        """How many tokens may come after this call's, where that is known."""
        return None if self.calls or self.max_new_tokens is None else self._left + self.max_new_tokens

    def keep(self, retention: list[tuple[Retention, ...]], prompt: list[int]) -> None:
        """Resolve the budgets before the first call: what each layer keeps and the prompt's tokens, per row."""
        self.retention, self.prompt = retention, prompt

    def _resolve(self, length: Tensor) -> None:
        context = length.tolist()
        if self.context_tokens is not None:
            context = contexts_for(len(length), self.context_tokens)
        if self.schedule.prompt and min(context, default=1) < 1:
            raise UserError(f"row {context.index(0)} of the batch has no token in its prompt; give each at least one")
        self.retention = self._retention_of(context)
        self.prompt = context

    def _retention_of(self, context: list[int]) -> list[tuple[Retention, ...]]:
        """What each layer keeps of rows whose prompts have so many tokens."""
        layers, more = len(self.layers), max(0, (self.max_new_tokens or 0) - 1)  # the last token is never read
        return [retention_of(self.policy, self.budget, n + more, n, layers, self.schedule) for n in context]

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
        if (order := self.step.order) is not None:
            query, key, value = (_in_order(x, order) for x in (query, key, value))
        tokens = (range(len(self.step.start)), self.step.start.tolist(), self.step.length.tolist())
        if self.step.columns > 1:
            check_finite(layer, tokens, query=query, key=key, value=value)
        store: PrunedLayer = self.cache.layers[layer]
        if not store.is_initialized:
            store.retention, store.window = self.cache.batch_retention(layer, window), window
        elif window is not None:
            self.cache.rows(layer, window)  # refuses a sequence that has outgrown the window
        which = self.attentions[layer]
        output = store.attend(query, key, value, self.step, scale, self.cache.more, which)
        if self.step.columns == 1:
            # NaN and infinity end up in the output, but not those of a key that only gets no attention
            check_finite(layer, tokens, key=key, output=output)
        self.attentions[layer] += 1
        return output if order is None else _in_order(output, order.argsort(1))


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """`x` [B, heads, T, D] with the columns of each row in an order [B, T]."""
    index = order.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)


class _TrialCache(PrunedCache):
    """A cache that evicts nothing, to prove others by."""

    def prove(self, model: PreTrainedModel) -> None:
        self.schedule = STEP

    def _resolve(self, length: Tensor) -> None:
        self.retention = [(Retention(budget=UNLIMITED),) * len(self.layers) for _ in length]
        self.prompt = length.tolist()


def prove_decoding(model: PreTrainedModel, policy: Policy, budget: Budget | None) -> None:
    """Try, once per model, that scoring it and decoding through a `PrunedCache` are exact; any policy will do.

    Raises:
        UnsupportedModel: if they are not.
    """
    require_exact(model)
    require_decoding(model, lambda: _TrialCache(model, policy, budget, max_new_tokens=1, context_tokens=1))
