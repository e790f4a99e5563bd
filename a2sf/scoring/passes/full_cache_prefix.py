"""What pruning has not touched yet: how far sequences may be computed together, which scores saw a pruned cache.

A sequence is what its layers keep of it (`Retention`), the schedule, and the number of its prompt's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.rule import ACCUMULATED
from a2sf.policies.schedule import Schedule
from a2sf.policies.slots import head_slots


def untouched(kept: Sequence[Retention], schedule: Schedule, prompt: int, kv_heads: int | None = None) -> int:
    """The first so many tokens of a sequence leave the cache of every layer whole; `UNLIMITED`: all do.

    The token after them still attends to all of them; those after it see a pruned cache.

    Args:
        kv_heads: KV heads of a layer, for policies that name heads which keep everything; None: not known.
    """
    budgets = [min(_budgets(r)) for r in kept if kv_heads is None or len(r.rule.full_heads) < kv_heads]
    budget = min(budgets, default=UNLIMITED)
    if budget >= UNLIMITED:
        return UNLIMITED
    if not schedule.prompt:
        return budget + schedule.spare
    if prompt > budget:
        return prompt - 1
    return budget if schedule.then == "step" else UNLIMITED


def shareable(kept: Sequence[Retention], schedule: Schedule, prompt: int) -> int:
    """The first so many tokens of a sequence leave a state that depends on them alone, whatever is kept and the prompt.

    The state of rules that rank and forget alike: what they add to the scores of whole caches differs.
    """
    if any(r.rule.precompute is not None for r in kept):
        return 0  # what is to come counts from the first token
    whole = untouched(kept, schedule, prompt)
    if not schedule.prompt:
        return whole
    # the prompt's last queries add to the scores, and which are the last depends on the prompt
    looking = max((r.recent for r in kept if r.rule.cut is not None), default=0)
    return max(0, min(whole, prompt - looking))


def pruned_scores(scored: int, clean: int, prompt: int) -> int:
    """How many of `scored` tokens, predicted from the prompt's last token on, saw a pruned cache (`clean`: `untouched`)."""
    first = prompt - 1
    return max(0, first + scored - max(first, clean + 1))


def held(kept: Retention, schedule: Schedule, total: int, prompt: int, kv_heads: int | None = None) -> float:
    """Tokens that a layer has cached after `total` tokens, mean over its KV heads."""
    if kept.rule.heads:
        each = [replace(kept, budget=C, recent=0, sinks=0, rule=ACCUMULATED) for C in _budgets(kept)]
        return sum(held(head, schedule, total, prompt) for head in each) / len(each)
    C = kept.budget
    if schedule.when == "every":
        cached = total if total < C + schedule.every else C + (total - C) % schedule.every
    elif schedule.prompt and schedule.then == "keep":
        cached = min(prompt, C, total) + max(0, total - prompt)
    else:
        cached = min(C, total)
    whole = len(kept.rule.full_heads) / kv_heads if kv_heads else 0.0
    return cached + whole * (total - cached)


def _budgets(kept: Retention) -> list[int]:
    """The budget of each KV head that has one of its own, or of all."""
    return [C for C, _, _ in head_slots(kept.rule.heads, kept.budget)] if kept.rule.heads else [kept.budget]
