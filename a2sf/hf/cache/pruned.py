"""Generating text with a cache that a policy keeps small: `PrunedCache` for transformers' `generate`.

    cache = PrunedCache(model, policy=A2SF(forgetting_factor=0.3), budget=Budget(ratio=0.2, base="context"))
    model.generate(**inputs, cache=cache, max_new_tokens=100)

`PrunedCache` wraps the model's calls (`a2sf.hf.calls`), so that the attention function knows the cache and the tokens of a
call. Calls without a `PrunedCache` are the model's own. Shapes as in `a2sf.engine.state`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from a2sf.engine.kernels import check_backend
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import EvictionState
from a2sf.errors import ConfigError, UserError
from a2sf.hf.attention.errors import UnsupportedModel
from a2sf.hf.attention.windows import global_layers, keeps_window, mixes_windows, rope_switch, within_window
from a2sf.hf.cache.attention_cache import LayerSettings, NewTokens
from a2sf.hf.cache.budgets import resolve_budgets
from a2sf.hf.cache.cache_pass import CachePass
from a2sf.hf.cache.checks import check_call, check_lengths_are_given, new_tokens
from a2sf.hf.cache.layer import PrunedLayer
from a2sf.hf.cache.looking_pass import LookingPass
from a2sf.hf.cache.stored import ModelRef, load_into, stored_of
from a2sf.hf.calls.again import compare_again
from a2sf.hf.calls.around import decoder_of, following_copy, surround
from a2sf.hf.calls.chunks import bounds, columns
from a2sf.hf.calls.read_tokens import ReadTokens
from a2sf.hf.loading.config import kv_heads_of
from a2sf.hf.projection import projections_for
from a2sf.hf.rotary import rotary_for
from a2sf.hf.settings import check_settings, contexts_of, new_tokens_of
from a2sf.policies.arguments import budget_of, policy_of, schedule_of
from a2sf.policies.base import Policy, Retention
from a2sf.policies.budget import Budget
from a2sf.policies.schedule import STEP, Schedule, schedule_for


class PrunedCache(Cache):
    """A cache of at most `C` tokens per layer and KV head (more while a schedule says so), for one batch of sequences.

    Give it to `model.generate(..., cache=cache)` or to the model itself; padding (`attention_mask`) never enters it.
    Budgets are resolved once, from the first call's tokens, and stay the same when the cache is used for the next turn; a
    ratio of base `seen` grows with every token instead.

    Args:
        model: the model it will be used with, or what wraps it (PEFT, torch.compile, data parallelism).
        policy: which tokens to retain; a policy's name or class stands for one with its defaults.
        budget: how many tokens to retain (None: for a policy that ignores budgets). A ratio of base `context` is a share of
            the row's prompt, of base `total` a share of the tokens that are read: the prompt and all new tokens but the
            last, of base `seen` a share of the tokens read so far, which needs neither length. 64 stands for
            `Budget(tokens=64)`, 0.2 for `Budget(ratio=0.2)`.
        schedule: when tokens are evicted, a `Schedule` or its name; None: after every token, or after the prompt for a
            policy that knows no other. A row's prompt is what the first call reads of it, or its `context_tokens`, which
            may be less: then the cut comes within the first call.
        max_new_tokens: as given to `generate`; needed for a ratio of base `total`, with which no more may be generated.
        context_tokens: the prompt's length, or each prompt's; needed when the prompt is read in chunks, for a ratio and
            for the prompt schedule.
        backend: which implementation runs, `auto` or a name in `a2sf.engine.kernels.BACKENDS`.
        trace: record what every step evicts (`evicted`), at a cost in speed and memory.

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
        layers, kv_heads = config.num_hidden_layers, kv_heads_of(model.config)
        check_settings(policy, budget, layers, schedule=schedule, kv_heads=kv_heads, generating=True)
        self.policy, self.budget = policy, budget if policy.uses_budget else None
        self.schedule = schedule_for(policy, schedule)
        check_lengths_are_given(self.budget, self.schedule, max_new_tokens, contexts)
        self.check_model(model)
        positions = getattr(config, "max_position_embeddings", None) or 2**31
        settings = [LayerSettings(positions, backend, trace, i, layers) for i in range(layers)]
        super().__init__(layers=[PrunedLayer(each) for each in settings])
        self.layers: list[PrunedLayer]  # type: ignore[assignment]
        self._follow(model)
        self.trace = trace
        self.max_new_tokens, self.context_tokens = max_new_tokens, contexts
        self.policy_on_sliding, self.acts = not mixes_windows(model.config), global_layers(model.config)
        self.positions = positions
        self.rope_switch = rope_switch(model.config)
        self.model_ref = ModelRef(model)
        self.reset()

    def check_model(self, model: PreTrainedModel) -> None:
        """Check, once per model, that decoding through such a cache is exact, and wrap the model's calls.

        Raises:
            UnsupportedModel: if it is not.
        """
        from a2sf.hf.cache.decoding import prove_decoding  # makes such caches itself

        prove_decoding(model, self.policy, self.budget)
        surround(model)
        compare_again(model)

    def _follow(self, model: PreTrainedModel) -> None:
        """Take over what the policy sees of `model`'s weights, as they are now.

        Raises:
            UnsupportedModel: if that is not known.
        """
        rotary, projections = rotary_for(model, self.policy), projections_for(model, self.policy)
        for i, layer in enumerate(self.layers):
            layer.settings.rotary = None if rotary is None else rotary[i]
            layer.settings.projection = None if projections is None else projections[i]

    def __deepcopy__(self, memo: dict[Any, Any]) -> PrunedCache:
        """A cache for the same model; if the model is copied together with its cache, for the copy."""
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        twin.belongs_to(following_copy(twin, self.model_ref(), memo))
        return twin

    def belongs_to(self, model: PreTrainedModel | None) -> None:
        """Make this a cache for `model`; None: its model no longer exists."""
        self.model_ref = ModelRef(model) if model is not None else self.model_ref

    def reset(self) -> None:
        """Forget everything; the next call starts a new batch and resolves the budgets anew."""
        for layer in self.layers:
            layer.reset()
        self.columns = 0  # tokens of every row, padding included: what transformers calls the sequence's length
        self.seen: Tensor | None = None  # int64 [B], tokens of each row that were no padding
        self.retention: list[tuple[Retention, ...]] = []  # what each layer retains, per row
        self.prompt: list[int] = []  # tokens of each row's prompt
        self.first: list[int] = []  # tokens of each row in the first call
        self.dtype: torch.dtype | None = None  # the model's when the cache began
        self.text = ReadTokens()
        self.calls = 0
        self.incoming: Tensor | None = None  # the first call's tokens, set before it, for a policy that prepares
        self.looking = False  # whether the policy looks at the first call, which is the prompts, before they are cut
        self._pass: CachePass | None = None
        self.attentions: list[int] = []  # how many times each layer calls its attention in a pass
        self.failed = False  # whether a call stopped midway
        self._given = self.begins_turn = False  # whether generate was given this cache, and no call came since it began
        self.later_turn = False  # whether generate was given it again, after the first calls
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
        """Bytes of memory reserved for the layers' keys, values, scores and positions, with room for tokens to come."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def cached_nbytes(self) -> int:
        """Bytes of the keys and values of the tokens that are cached now, all rows together, as they are stored."""
        return sum(layer.cached_nbytes for layer in self.layers)

    def state(self, layer: int) -> EvictionState:
        """A copy of `layer`'s cache; its `positions` [B, K, slots] are the retained positions, which do not count padding.

        Raises:
            ConfigError: if there is no such layer.
            UserError: if nothing has been read yet.
        """
        of = self._layer(layer)
        if not of.is_initialized:
            raise UserError("this cache has read nothing yet; call the model with it first")
        return of.state()

    def _layer(self, layer: int) -> PrunedLayer:
        try:
            return self.layers[layer]
        except IndexError as error:
            last = len(self.layers) - 1
            raise ConfigError("layer", layer, f"the model has the layers 0 to {last}") from error

    def stored(self) -> dict[str, Any]:
        """All that is cached, as tensors on the CPU and plain numbers, for `torch.save` and `load`.

        Raises:
            UserError: if nothing has been read yet.
        """
        return stored_of(self)

    def load(self, states: Mapping[str, Any] | Sequence[EvictionState]) -> None:
        """Continue from what `stored` gave, or from states, one per layer with as many rows, instead of what is cached.

        Raises:
            UserError: if what is stored is of another model, policy, schedule or budget; if states are given and nothing
                has been read yet, so that neither the rows nor their budgets are known; if the states have another number
                of layers or rows, hold more than the budget, or are of another policy.
        """
        load_into(self, states)

    def evicted(self, layer: int) -> Tensor:
        """int32 [B, K, tokens fed, padding included]: the position evicted at each step; needs `trace`.

        It is -1 where a step evicted none, or several (`cuts`), as schedules other than `step` do.

        Raises:
            ConfigError: if there is no such layer.
            UserError: if the cache records no trace, or has read nothing yet.
        """
        self._check_traced()
        return self._layer(layer).evicted()

    def cuts(self, layer: int) -> Tensor:
        """int64 [n, 4]: row, head, token fed and position of each eviction at a step that evicted several; needs `trace`.

        Raises:
            ConfigError: if there is no such layer.
            UserError: if the cache records no trace, or has read nothing yet.
        """
        self._check_traced()
        return self._layer(layer).cuts()

    def _check_traced(self) -> None:
        if not self.trace or not self.calls:
            raise UserError(
                "this cache has recorded nothing; make it with PrunedCache(..., trace=True) and call the model"
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
        self.first = [self.first[i] for i in rows.tolist()] if self.first else []
        self.text.select(rows)
        for layer in self.layers:
            layer.batch_select_indices(rows)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UserError(
                "a pruned cache cannot take tokens back, because others were evicted for them; generate without an "
                "assistant model"
            )

    def parts(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> list[int]:
        """The columns at which the parts of a call of `model` end (`a2sf.hf.calls.chunks`).

        Raises:
            UserError: as `begin`.
        """
        most = columns(shape[0], model.device)
        if self._left or shape[1] <= most:
            return [shape[1]]
        start, length, order = self._admit(model, shape, mask)
        assert self.seen is not None
        # the length at the end decides how all keys are rotated
        switches = int((self.seen + length).max()) > self.rope_switch
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
        """Check a call as a whole, and resolve the budgets at the first; returns where each row's new tokens are."""
        start, length, order = check_call(self, model, shape, mask)
        self._follow(model)
        if self.seen is None:
            if not self.retention:  # else `keep` set it
                self.resolve_budgets(start, length)  # last, so that a call that is refused leaves nothing behind
            self.seen, self.first = torch.zeros(shape[0], dtype=torch.int64), length.tolist()
            self.dtype = model.dtype
        return start, length, order

    @property
    def _is_user_defined(self) -> bool:
        """Set by transformers' `generate` when it begins with a cache that its caller gave: a turn begins."""
        return self._given

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        self._given = self.begins_turn = value
        self.later_turn |= value and self.calls > 0

    def begin(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> CachePass:
        """Start a call of `model` on `shape` = (B, T) new tokens; `mask` [B, columns] is 0 where a token is padding.

        Raises:
            UserError: if the cache does not fit the model, the batch or the mask, or a sequence gets too long.
        """
        start, length, order = self._admit(model, shape, mask) if not self._left else new_tokens(self, shape, mask)
        assert self.seen is not None
        after = self.seen + length
        self._left = max(0, self._left - shape[1])
        new = NewTokens(start, length, self.seen, after, shape[1], order)
        self._pass = (LookingPass if self.looking else CachePass)(self, new, len(self.layers))
        self._pass.begin()
        return self._pass

    def check_again(self, given: Tensor, mask: Tensor | None) -> None:
        """Refuse a text `given` [B, columns or more] to `generate` that does not begin with what was read, as far as known.

        Raises:
            UserError: naming the first token that is another one.
        """
        if given.shape[0] == self.batch_size:
            self.text.check(given, mask, self.columns)

    def end(self, completed: bool) -> None:
        """Finish the call that `begin` started; a cache whose call failed is not used again."""
        done, self._pass = self._pass, None
        self.begins_turn = False
        if not completed and self._left:
            self.failed, self._left = True, 0
        if done is None:
            return
        self.failed, self.looking = True, False
        done.finish(completed)
        attentions = [done.attentions[i] for i in range(done.layers)]
        self.attentions = self.attentions or attentions
        self.failed = not completed or attentions != self.attentions
        if completed and self.failed:
            raise UnsupportedModel(
                "the model's layers call their attention another number of times than in the first pass, which a pruned "
                "cache does not follow"
            )
        self.seen = done.new.after
        self.columns += done.new.columns
        self.calls += 0 if self._left else 1

    def rows(self, layer: int, window: int | None) -> list[Retention]:
        """What `layer` retains of each row; a layer may have a sliding window of its own.

        Raises:
            UnsupportedModel: if a row has outgrown the window.
        """
        retained = [row[layer] for row in self.retention]
        if window is None:
            return retained
        seen = self.seen if self._pass is None else self._pass.new.after
        assert seen is not None
        after = seen.tolist()
        return [
            within_window(k, window, layer, n, self.policy_on_sliding) for k, n in zip(retained, after, strict=True)
        ]

    def batch_retention(self, layer: int, window: int | None) -> BatchRetention:
        """The same as tensors, with the schedule; a layer that goes by its own window evicts step by step."""
        windowed = window is not None and any(
            keeps_window(row[layer], self.policy_on_sliding) for row in self.retention
        )
        return BatchRetention.of(self.rows(layer, window), STEP if windowed else self.schedule, self.prompt)

    @property
    def more(self) -> int | None:
        """How many tokens may follow this call's, if that is known."""
        return None if self.calls or self.max_new_tokens is None else self._left + self.max_new_tokens

    def keep(self, retention: list[tuple[Retention, ...]], prompt: list[int]) -> None:
        """Set, before the first call, what each layer retains and the prompt's tokens, per row."""
        self.retention, self.prompt = retention, prompt

    def resolve_budgets(self, start: Tensor, length: Tensor) -> None:
        """Set what each layer retains from the first call's tokens: `length` [B] of each row, from column `start` [B]."""
        retention, prompt, self.looking = resolve_budgets(self, start, length)
        self.keep(retention, prompt)
