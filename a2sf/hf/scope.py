"""`pruning`: every call of a model inside a block is pruned, whoever makes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from a2sf.errors import UserError
from a2sf.hf.attention import Plan, UnsupportedModel, attached, mixes_windows
from a2sf.hf.calls import hooks_of, new_tokens
from a2sf.hf.exactness import require_exact
from a2sf.hf.generation import PrunedCache, prove_decoding
from a2sf.hf.loading import kv_heads_of
from a2sf.hf.settings import check_settings, contexts_for, contexts_of, retention_of
from a2sf.policies.base import Policy, Retention
from a2sf.policies.budget import Budget
from a2sf.policies.schedule import Schedule, schedule_for


@dataclass(frozen=True)
class _Scope:
    """What `pruning` does to the calls of a model."""

    policy: Policy
    budget: Budget | None
    schedule: Schedule | None
    max_new_tokens: int | None
    context_tokens: int | list[int] | None
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
        return PrunedCache(
            model,
            self.policy,
            self.budget,
            schedule=self.schedule,
            max_new_tokens=more,
            context_tokens=self.context_tokens,
            backend=self.backend,
        )

    def passing(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> PrunedCache | None:
        """A cache to read a call in parts through that keeps none; None where the model is only exact in one pass."""
        _, length, context, kept = self._rows(model, shape, mask)
        if min(context) < 1:
            return None
        try:
            cache = PrunedCache(
                model,
                self.policy,
                self.budget,
                schedule=self.schedule,
                max_new_tokens=0,
                context_tokens=context,
                backend=self.backend,
            )
        except UnsupportedModel:
            return None
        if max(length) > cache.positions:
            return None
        cache.keep(kept, context)
        return cache

    def plan(self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None) -> Plan:
        start, length, context, kept = self._rows(model, shape, mask)
        return Plan.of_rows(
            length,
            start,
            lambda row, layer: kept[row][layer],
            len(kept[0]),
            policy_on_sliding=not mixes_windows(model.config),
            backend=self.backend,
            schedule=schedule_for(self.policy, self.schedule),
            prompt=context.__getitem__,
        )

    def _rows(
        self, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None
    ) -> tuple[list[int], list[int], list[int], list[tuple[Retention, ...]]]:
        """Of each row of a call without a cache: first column, tokens, those of the prompt, and what each layer keeps."""
        start, length = (x.tolist() for x in new_tokens(shape, 0, mask))
        layers = model.config.get_text_config().num_hidden_layers
        if schedule_for(self.policy, self.schedule).prompt and self.context_tokens is None:
            raise UserError(
                "a call without a cache does not tell where its prompt ends, which the prompt schedule asks for; give "
                "pruning(..., context_tokens=...), or call the model with use_cache=True"
            )
        context = length if self.context_tokens is None else contexts_for(len(length), self.context_tokens)
        numbers = zip(length, context, strict=True)
        kept = [retention_of(self.policy, self.budget, n, c, layers, self.schedule) for n, c in numbers]
        return start, length, context, kept


@contextmanager
def pruning(
    model: PreTrainedModel,
    policy: Policy,
    budget: Budget | None = None,
    *,
    schedule: Schedule | None = None,
    max_new_tokens: int | None = None,
    context_tokens: int | Sequence[int] | None = None,
    backend: str = "auto",
) -> Iterator[PreTrainedModel]:
    """Prune every call of `model` inside the block: plain calls on padded batches, and `generate`.

    A plain call (`use_cache=False`) reads a batch whose rows may be padded on either side (`attention_mask`) and prunes
    each as one sequence of its own length. A call that keeps a cache, as `generate` makes them, gets a `PrunedCache`.

        with pruning(model, H2O(), Budget(ratio=0.2, base="context")):
            logits = model(ids, attention_mask=mask, use_cache=False).logits
            text = model.generate(ids, attention_mask=mask, max_new_tokens=50)

    Args:
        model, policy, budget, schedule, max_new_tokens, context_tokens, backend: as for `PrunedCache`. A call without a
            cache is a prompt as a whole, unless `context_tokens` says how much of it; the prompt schedule needs to know.

    Raises:
        ConfigError, UnsupportedModel: if a setting is not allowed or the model cannot be pruned.
    """
    layers = model.config.get_text_config().num_hidden_layers
    check_settings(policy, budget, layers, schedule=schedule, kv_heads=kv_heads_of(model.config), generating=True)
    require_exact(model)
    with suppress(UnsupportedModel):  # told once a cache is made; calls without one are exact
        prove_decoding(model, policy, budget)
    scope = _Scope(
        policy,
        budget if policy.uses_budget else None,
        schedule,
        max_new_tokens,
        contexts_of(context_tokens),
        backend,
    )
    hooks = hooks_of(model)
    hooks.close(None)  # a call that was interrupted left it open
    before, hooks.scope = hooks.scope, scope
    try:
        with attached(model):
            yield model
    finally:
        hooks.scope = before
