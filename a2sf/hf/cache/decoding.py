"""Whether decoding through a `PrunedCache` is exact: checked once per model, with a cache that evicts nothing."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.exactness import require_decoding, require_exact
from a2sf.policies.base import UNLIMITED, Policy, Retention
from a2sf.policies.budget import Budget
from a2sf.policies.schedule import STEP


class _FullCache(PrunedCache):
    """A cache that evicts nothing, to compare with the model's own."""

    def check_model(self, model: PreTrainedModel) -> None:
        self.schedule = STEP

    def resolve_budgets(self, start: Tensor, length: Tensor) -> None:
        self.max_new_tokens = None  # it has no budget that would be a share of these
        self.keep([(Retention(budget=UNLIMITED),) * len(self.layers) for _ in length], length.tolist())


def prove_decoding(model: PreTrainedModel, policy: Policy, budget: Budget | None) -> None:
    """Check, once per model, that scoring it and decoding through a `PrunedCache` are exact; any policy will do.

    Raises:
        UnsupportedModel: if they are not.
    """
    require_exact(model)
    require_decoding(model, lambda: _FullCache(model, policy, budget, max_new_tokens=1, context_tokens=1))
