"""`pruning`: every call of a model inside a block is pruned, whoever makes it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from a2sf.engine.kernels import check_backend
from a2sf.errors import UserError
from a2sf.hf.attention.errors import UnsupportedModel
from a2sf.hf.attention.function import attached
from a2sf.hf.attention.plan import Plan
from a2sf.hf.attention.windows import global_layers, mixes_windows
from a2sf.hf.cache.decoding import prove_decoding
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.calls.around import decoder_of, scoped, surround
from a2sf.hf.calls.tokens import new_tokens
from a2sf.hf.exactness import require_exact
from a2sf.hf.loading.config import kv_heads_of
from a2sf.hf.projection import projections_for
from a2sf.hf.rotary import rotary_for
from a2sf.hf.settings import check_settings, contexts_for, contexts_of, new_tokens_of, retention_of
from a2sf.policies.arguments import budget_of, policy_of, schedule_of
from a2sf.policies.base import Policy, Retention
from a2sf.policies.budget import Budget
from a2sf.policies.schedule import Schedule, schedule_for

Model = TypeVar("Model")


@dataclass(frozen=True)
class _Scope:
    """What `pruning` does with the calls of a model.

    Attributes:
        refused: why calls that keep a cache are refused; None: they are not.
        replaced: caches that were given to calls, and replaced by a `PrunedCache`.
    """

    policy: Policy
    budget: Budget | None
    schedule: Schedule | None
    max_new_tokens: int | None
    context_tokens: int | list[int] | None
    backend: str
    refused: UnsupportedModel | None
    replaced: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)

    def supply(self, model: PreTrainedModel, cache: Any, keep: bool | None) -> PrunedCache | None:
        """The cache for a call inside `pruning`: the given one if it is pruned, else a new one if the call uses a cache."""
        if isinstance(cache, PrunedCache):
            return cache
        if cache is not None and cache.get_seq_length() > 0:
            raise UserError(
                "inside pruning(...) the model was called with a cache that was filled without pruning; start with an "
                "empty one, or a PrunedCache"
            )
        if cache is None and not (model.config.get_text_config().use_cache if keep is None else keep):
            return None
        if self.refused is not None:
            raise UnsupportedModel(str(self.refused))
        if cache is not None and cache in self.replaced:
            raise UserError(
                "inside pruning(...) the cache that an earlier call was given stays empty, because a PrunedCache takes its "
                "place; continue with the output's cache, or give a PrunedCache from the beginning"
            )
        if cache is not None:
            self.replaced.add(cache)
        more = self.max_new_tokens if cache is not None else 0  # without one it is a plain call, of its own tokens
        return self._cache(model, more, self.context_tokens)

    def passing(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> PrunedCache | None:
        """A cache for reading a call without a cache in parts; None where the model is only exact in one pass."""
        _, length, context, retained = self._rows(model, shape, mask)
        if min(context) < 1 or self.refused is not None:
            return None
        cache = self._cache(model, 0, context)
        if max(length) > cache.positions:
            return None
        cache.keep(retained, context)
        return cache

    def _cache(
        self, model: PreTrainedModel, new_tokens: int | None, context_tokens: int | list[int] | None
    ) -> PrunedCache:
        return PrunedCache(
            model,
            self.policy,
            self.budget,
            schedule=self.schedule,
            max_new_tokens=new_tokens,
            context_tokens=context_tokens,
            backend=self.backend,
        )

    def plan(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> Plan:
        start, length, context, retained = self._rows(model, shape, mask)
        return Plan.of_rows(
            length,
            start,
            lambda row, layer: retained[row][layer],
            len(retained[0]),
            policy_on_sliding=not mixes_windows(model.config),
            backend=self.backend,
            rotary=rotary_for(model, self.policy),
            projections=projections_for(model, self.policy),
            schedule=schedule_for(self.policy, self.schedule),
            prompt=context.__getitem__,
        )

    def _rows(
        self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None
    ) -> tuple[list[int], list[int], list[int], list[tuple[Retention, ...]]]:
        """For each row of a call without a cache: first column, tokens, prompt tokens, and what each layer retains."""
        start, length = (x.tolist() for x in new_tokens(shape, 0, mask))
        acts = global_layers(model.config)
        if self.policy.prepares:
            raise UserError(
                f"the policy {self.policy.name} reads a prompt before it is cut, which a call without a cache does not do; "
                "call the model with use_cache=True"
            )
        if schedule_for(self.policy, self.schedule).prompt and self.context_tokens is None:
            raise UserError(
                "a call without a cache does not show where its prompt ends, which the prompt schedule needs; give "
                "pruning(..., context_tokens=...), or call the model with use_cache=True"
            )
        context = length if self.context_tokens is None else contexts_for(len(length), self.context_tokens)
        numbers = zip(length, context, strict=True)
        retained = [
            retention_of(self.policy, self.budget, n, c, len(acts), self.schedule, acts=acts) for n, c in numbers
        ]
        return start, length, context, retained


@contextmanager
def pruning(
    model: Model,
    policy: Policy | type[Policy] | str,
    budget: Budget | int | float | None = None,
    *,
    schedule: Schedule | str | None = None,
    max_new_tokens: int | None = None,
    context_tokens: int | Sequence[int] | None = None,
    backend: str = "auto",
) -> Iterator[Model]:
    """Prune every call of `model` inside the block: plain calls on padded batches, and `generate`.

    A plain call (`use_cache=False`) reads a batch whose rows may be padded on either side (`attention_mask`) and prunes
    each as one sequence of its own length. A call that uses a cache, as `generate` makes them, gets a `PrunedCache`.

        with pruning(model, H2O(), Budget(ratio=0.2, base="context")):
            logits = model(ids, attention_mask=mask, use_cache=False).logits
            text = model.generate(ids, attention_mask=mask, max_new_tokens=50)

    It acts on the thread, or asyncio task, that enters it. Others use the model as it is, and get a warning.

    Args:
        model: a transformers model, or what wraps one (PEFT, torch.compile).
        policy: as for `PrunedCache`.
        budget: as for `PrunedCache`.
        schedule: as for `PrunedCache`.
        max_new_tokens: as for `PrunedCache`.
        context_tokens: as for `PrunedCache`. A call without a cache is all prompt, unless this gives the prompt's
            length, which the prompt schedule needs.
        backend: as for `PrunedCache`.

    Raises:
        ConfigError, UnsupportedModel: if a setting is not allowed or the model cannot be pruned.
    """
    decoder = decoder_of(model)
    policy, budget, schedule = policy_of(policy), budget_of(budget), schedule_of(schedule)
    max_new_tokens, contexts = new_tokens_of(max_new_tokens), contexts_of(context_tokens)
    check_backend(backend)
    layers = decoder.config.get_text_config().num_hidden_layers
    check_settings(policy, budget, layers, schedule=schedule, kv_heads=kv_heads_of(decoder.config), generating=True)
    require_exact(decoder)
    refused = None
    try:
        prove_decoding(decoder, policy, budget)
    except UnsupportedModel as error:
        refused = error.with_traceback(None)  # calls without a cache are exact
    surround(decoder)
    budget = budget if policy.uses_budget else None
    scope = _Scope(policy, budget, schedule, max_new_tokens, contexts, backend, refused)
    with attached(decoder), scoped(decoder, scope):
        yield model
