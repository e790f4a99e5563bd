"""How many tokens of a sequence are read before the first eviction.

Up to there, sequences can be computed together whatever their policies, and log-likelihoods are those with the full cache.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.budget import Growth
from a2sf.policies.rule import ACCUMULATED
from a2sf.policies.schedule import Schedule
from a2sf.policies.slots import head_slots


def full_cache_prefix(
    retention: Sequence[Retention],
    schedule: Schedule,
    prompt: int,
    kv_heads: int | None = None,
    *,
    total: int | None = None,
) -> int:
    """The number of tokens that can be read before any layer evicts one; `UNLIMITED`: nothing is ever evicted.

    The next token still attends to all of them; those after it see a pruned cache.

    Args:
        retention: what each layer retains.
        prompt: tokens of the prompt, which the schedule `prompt` reads before it evicts.
        kv_heads: KV heads of a layer, for policies that leave the cache of some heads full; None: not known.
        total: tokens of the sequence; needed where a budget grows with them, which is looked at no further.
    """
    acting = [r for r in retention if kv_heads is None or len(r.rule.full_heads) < kv_heads]
    grown = [_first_eviction(g, schedule, total) for r in acting for g in _growths(r)]
    fixed = [min(_budgets(r)) for r in acting if r.growth is None]
    return min([_fixed_prefix(fixed, schedule, prompt), *grown])


def _fixed_prefix(budgets: Sequence[int], schedule: Schedule, prompt: int) -> int:
    """`full_cache_prefix` of layers whose budgets do not grow."""
    budget = min(budgets, default=UNLIMITED)
    if budget >= UNLIMITED:
        return UNLIMITED
    if not schedule.prompt:
        return budget + schedule.spare
    if prompt > budget:
        return prompt - 1
    return UNLIMITED if schedule.then == "keep" else budget + schedule.spare


def _first_eviction(growth: Growth, schedule: Schedule, total: int | None) -> int:
    """How many of `total` tokens are read before one is evicted, where the budget grows."""
    if total is None:
        raise ValueError("a budget that grows needs the number of tokens")
    held = growth.cached(total, schedule.spare)
    # what is evicted does not come back, so that the difference never gets smaller
    first = bisect_left(range(total), True, key=lambda t: held[t] <= t)
    return first if first < total else UNLIMITED


def shareable_prefix(retention: Sequence[Retention], schedule: Schedule, prompt: int, total: int | None = None) -> int:
    """The number of tokens after which the cache state depends on these tokens alone, not on budget or prompt.

    Only states of the same rule and forgetting factor are compared: others accumulate other scores.
    """
    if any(r.rule.precompute is not None for r in retention):
        return 0  # scores depend on tokens to come, from the first token on
    prefix = full_cache_prefix(retention, schedule, prompt, total=total)
    if not schedule.prompt:
        return prefix
    # the prompt's last queries add to the scores, and which are the last depends on the prompt
    looking = max((r.recent for r in retention if r.rule.cut is not None and r.rule.scored), default=0)
    return max(0, min(prefix, prompt - looking))


def pruned_scores(scored: int, clean: int, prompt: int) -> int:
    """How many of `scored` tokens, predicted from the prompt's last token on, saw a pruned cache.

    Args:
        clean: the sequence's `full_cache_prefix`.
    """
    first = prompt - 1
    return max(0, first + scored - max(first, clean + 1))


def cached_tokens(
    retention: Retention, schedule: Schedule, total: int, prompt: int, kv_heads: int | None = None
) -> float:
    """Tokens that a layer has cached after `total` tokens, mean over its KV heads."""
    C = retention.budget
    cached: float
    if retention.growth is not None:
        cached = fmean(g.cached(total, schedule.spare)[total - 1] for g in _growths(retention)) if total else 0
    elif retention.rule.heads:
        each = [replace(retention, budget=C, recent=0, sinks=0, rule=ACCUMULATED) for C in _budgets(retention)]
        return sum(cached_tokens(head, schedule, total, prompt) for head in each) / len(each)
    elif schedule.when == "every":
        cached = total if total < C + schedule.every else C + (total - C) % schedule.every
    elif schedule.prompt and schedule.then == "keep":
        cached = min(prompt, C, total) + max(0, total - prompt)
    elif schedule.prompt and schedule.spare and total > prompt:
        # what was cached after the cut, and the tokens since, which are evicted `every` at a time
        cut = min(prompt, C)
        more = total - prompt - (C - cut)  # beyond the budget
        cached = C + more % schedule.every if more > 0 else cut + total - prompt
    else:
        cached = min(C, total)
    return _with_full_heads(cached, retention, total, kv_heads)


def peak_tokens(
    retention: Retention, schedule: Schedule, total: int, prompt: int, kv_heads: int | None = None
) -> float:
    """The most tokens that a layer has cached between two of `total` steps, mean over its KV heads."""
    if retention.growth is not None:
        whole = min(prompt, total) if schedule.prompt else 0
        grown = fmean(max([whole, *g.cached(total, schedule.spare)[:total]]) for g in _growths(retention))
        return _with_full_heads(grown, retention, total, kv_heads)
    if retention.rule.heads:
        each = [replace(retention, budget=C, recent=0, sinks=0, rule=ACCUMULATED) for C in _budgets(retention)]
        return sum(peak_tokens(head, schedule, total, prompt) for head in each) / len(each)
    # before the cut all of the prompt is cached; after an eviction every n tokens up to n - 1 more are
    most = min(total, retention.budget + schedule.spare)
    if schedule.prompt:
        end = cached_tokens(replace(retention, rule=ACCUMULATED), schedule, total, prompt)
        most = max(min(prompt, total), int(end))
    return _with_full_heads(most, retention, total, kv_heads)


def _with_full_heads(cached: float, retention: Retention, total: int, kv_heads: int | None) -> float:
    """The mean over the KV heads of a layer, of which some retain all `total` tokens and the others `cached`."""
    full = len(retention.rule.full_heads) / kv_heads if kv_heads else 0.0
    return cached + full * (total - cached)


def _growths(retention: Retention) -> list[Growth]:
    """That of each KV head, or one for all heads where theirs are equal; none where the budget does not grow."""
    growth, heads = retention.growth, retention.rule.heads
    if growth is None:
        return []
    return [growth.of_head(h) for h in range(len(heads))] if heads else [growth]


def _budgets(retention: Retention) -> list[int]:
    """The budget of each KV head, or one for all heads where theirs are equal."""
    heads = retention.rule.heads
    return [C for C, _, _ in head_slots(heads, retention.budget)] if heads else [retention.budget]
