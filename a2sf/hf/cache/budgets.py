"""What a `PrunedCache` retains of each row: budgets in tokens, resolved once from the tokens of the first call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from a2sf.errors import UserError
from a2sf.hf.memory import tokens_in_caches
from a2sf.hf.reader import prepared_for, uncut
from a2sf.hf.settings import contexts_for, retention_of
from a2sf.policies.base import Retention
from a2sf.policies.prepared import Prepared

if TYPE_CHECKING:
    from a2sf.hf.cache.pruned import PrunedCache


def resolve_budgets(
    cache: PrunedCache, start: Tensor, length: Tensor
) -> tuple[list[tuple[Retention, ...]], list[int], bool]:
    """What each layer retains of each row, how many tokens the row's prompt has, and whether the policy looks at this call.

    Where it does, nothing is retained yet but all of the prompts (`LookingPass`).

    Args:
        start: int64 [B], the column of the first call in which each row begins.
        length: int64 [B], tokens of each row in that call.

    Raises:
        UserError: if a prompt has no token and the schedule cuts after it; if the policy reads prompts and this call does
            not have all of them, as tokens; if the policy protects more tokens than the budget holds.
    """
    context = length.tolist()
    if cache.context_tokens is not None:
        context = contexts_for(len(length), cache.context_tokens)
    if cache.schedule.prompt and min(context, default=1) < 1:
        raise UserError(f"row {context.index(0)} of the batch has no token in its prompt; give each at least one")
    read = length.tolist()
    retention = retention_of_prompts(cache, context, read)
    fits = all(k.budget >= n for row, n in zip(retention, context, strict=True) for k in row)
    # where tokens are evicted after the cut too, a prompt that fits is ranked later
    if not cache.policy.prepares or (fits and cache.schedule.then == "keep"):
        return retention, context, False
    if _looks(cache, context, read):
        return [uncut(k, n) for k, n in zip(retention, context, strict=True)], [n + 1 for n in context], True
    ready = _prepared(cache, context, start.tolist(), read)
    return retention_of_prompts(cache, context, read, ready), context, False


def _looks(cache: PrunedCache, context: list[int], length: list[int]) -> bool:
    """Whether the policy can look at the call that reads the prompts: all of them, and nothing else.

    All layers then hold the prompts until the end of the call. Else the prompts are read for the policy first.
    """
    model = cache.model_ref()
    if model is None or cache.trace or context != length or not cache.policy.looks:
        return False
    return sum(context) * len(cache.layers) <= tokens_in_caches(model)


def retention_of_prompts(
    cache: PrunedCache, context: list[int], read: list[int], prepared: Sequence[Prepared] | None = None
) -> list[tuple[Retention, ...]]:
    """What each layer retains of rows whose prompts have `context` tokens.

    Args:
        read: how many tokens of each row the first call has, which may be more: then at least so many are read in all.
        prepared: of each of these prompts.

    Raises:
        UserError: if the policy protects more tokens than the budget holds.
    """
    layers, more = len(cache.layers), max(0, (cache.max_new_tokens or 0) - 1)  # the last token is never read
    ready = [None] * len(context) if prepared is None else prepared
    return [
        retention_of(cache.policy, cache.budget, max(n + more, m), n, layers, cache.schedule, p, cache.acts)
        for n, m, p in zip(context, read, ready, strict=True)
    ]


def _prepared(cache: PrunedCache, context: list[int], start: list[int], length: list[int]) -> list[Prepared]:
    """What the policy prepares for each row's prompt, which this call reads."""
    model, tokens = cache.model_ref(), cache.incoming
    if (
        model is None
        or tokens is None
        or tokens.is_floating_point()
        or any(n > m for n, m in zip(context, length, strict=True))
    ):
        raise UserError(
            f"the policy {cache.policy.name} reads a prompt before it is cut; give the first call all of the prompt, as "
            "tokens"
        )
    rows = tokens.tolist()
    prompts = [tuple(row[s : s + n]) for row, s, n in zip(rows, start, context, strict=True)]
    ready = {p: prepared_for(model, cache.policy, p) for p in dict.fromkeys(prompts)}
    return [ready[p] for p in prompts]
