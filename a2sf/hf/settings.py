"""Checks that policy, budget and schedule fit a model, and what each layer retains of each row."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from a2sf.errors import ConfigError, UserError
from a2sf.policies.base import Policy, Retention
from a2sf.policies.budget import Budget, check_list, growing, retained
from a2sf.policies.prepared import Prepared
from a2sf.policies.schedule import Schedule, schedule_for

RetentionKey = tuple[tuple[int, ...], int | None]
"""The slots of each layer, and the prompt's tokens where they count: what a layer retains depends on nothing else."""
MOST_KNOWN = 256
"""How many retentions of all layers are remembered at a time; each takes some kilobytes."""


def check_settings(
    policy: Policy,
    budget: Budget | None,
    layers: int,
    *,
    schedule: Schedule | None = None,
    kv_heads: int | None = None,
    generating: bool = False,
) -> None:
    """Refuse a policy, budget and schedule that do not fit each other, or a model of `layers` layers.

    Args:
        schedule: None stands for `step`, or for the only one that the policy knows.
        kv_heads: key/value heads of each layer, if that is known.
        generating: whether text is to be generated; a policy that looks at later tokens cannot.

    Raises:
        ConfigError: if they do not.
    """
    policy.check(layers, kv_heads)
    check_cut(budget if policy.uses_budget else None, schedule_for(policy, schedule))
    if generating and not policy.causal:
        raise ConfigError(
            "policy",
            policy.name,
            "it looks at later tokens, which generating does not have; score with it, or give another",
        )
    if not policy.uses_budget:
        return
    if budget is None:
        raise ConfigError("budget", None, f"the policy {policy.name} needs budget.ratio or budget.tokens")
    budget.check(layers)
    check_list(policy, budget, layers)
    if budget.grows:
        _check_growth(policy, layers, schedule_for(policy, schedule))
    tokens = budget.tokens if isinstance(budget.tokens, tuple) else (budget.tokens,)
    if budget.tokens is not None and min(tokens) < policy.min_budget:
        raise ConfigError(
            "budget.tokens",
            budget.tokens,
            f"recent + sinks may not exceed the budget, and {policy.name} protects {policy.min_budget} tokens",
        )


def _check_growth(policy: Policy, layers: int, schedule: Schedule) -> None:
    """Refuse a policy whose numbers cannot follow a budget that grows with the text.

    Raises:
        ConfigError: if it ranks tokens in another way at a larger budget, or evicts below a threshold every so many tokens.
        UserError: if it does not fit the first budget, of one token.
    """
    least = policy.min_budget if schedule.prompt else 1
    for i in range(layers):
        small, large = (retained(policy, slots, i, layers) for slots in (least, least + 256))
        if (small.rule, small.forgetting_factor) != (large.rule, large.forgetting_factor):
            why = f"{policy.name} has another rule or forgetting factor at another budget; give total or context"
            raise ConfigError("budget.base", "seen", why)
        if small.rule.threshold is not None and schedule.spare:
            why = f"{policy.name} has a threshold, whose steps are counted from a full budget; give total or context"
            raise ConfigError("budget.base", "seen", why)


def check_cut(budget: Budget | None, schedule: Schedule) -> None:
    """Refuse a budget that depends on the question, if the cut comes before the question.

    Raises:
        ConfigError: if it does.
    """
    if schedule.before_question and budget is not None and budget.ratio is not None and budget.base == "total":
        raise ConfigError(
            "budget.base",
            "total",
            "schedule.at=context cuts before the question is known, so give a share of base context, or budget.tokens",
        )


def retention_of(
    policy: Policy,
    budget: Budget | None,
    total: int,
    context: int,
    layers: int,
    schedule: Schedule | None = None,
    prepared: Prepared | None = None,
    acts: tuple[bool, ...] | None = None,
    known: dict[RetentionKey, tuple[Retention, ...]] | None = None,
) -> tuple[Retention, ...]:
    """What each layer retains of a sequence of `total` tokens whose prompt has `context`; `schedule` as in `check_settings`.

    Args:
        prepared: what `policy.prepare` returned for the prompt.
        acts: on which layers the policy acts (`global_layers`); None: on all.
        known: results of earlier calls with the same policy, budget, schedule and `acts`, which are used again where
            `prepared` is None; this call adds its own.

    Raises:
        UserError: if the policy protects more tokens than the budget holds, or its own code fails.
    """
    schedule = schedule_for(policy, schedule)
    prompt = context if schedule.prompt else None
    if budget is not None and budget.grows:
        return growing(policy, budget, layers, schedule, prompt, prepared, acts)
    slots = budget.layer_slots(total, context, layers, prepared) if budget else [1] * layers
    if known is None or prepared is not None:
        known = {}
    key = tuple(slots), prompt
    if key not in known:
        if len(known) >= MOST_KNOWN:
            known.clear()
        known[key] = tuple(retained(policy, c, i, layers, prompt, prepared, acts) for i, c in enumerate(slots))
    return known[key]


def contexts_of(given: int | Sequence[int] | None) -> int | list[int] | None:
    """`context_tokens` as it was given, checked.

    Raises:
        ConfigError: unless it is None, a whole number of at least 1, or a list of such.
    """
    if given is None:
        return None
    values: Any = given.tolist() if isinstance(given, Tensor) else given
    one = not isinstance(values, Sequence) or isinstance(values, str)
    tokens = [values] if one else list(values)
    if not tokens or not all(_is_whole(n) and n >= 1 for n in tokens):
        raise ConfigError("context_tokens", given, "give each prompt's length, a whole number of at least 1 token")
    return int(tokens[0]) if one else [int(n) for n in tokens]


def new_tokens_of(given: int | None) -> int | None:
    """`max_new_tokens` as it was given, checked.

    Raises:
        ConfigError: unless it is None or a whole number of at least 0.
    """
    if given is not None and not (_is_whole(given) and given >= 0):
        raise ConfigError("max_new_tokens", given, "give a whole number of tokens, as to generate")
    return None if given is None else int(given)


def _is_whole(number: object) -> bool:
    return isinstance(number, numbers.Integral) and not isinstance(number, bool)


def contexts_for(rows: int, given: int | list[int]) -> list[int]:
    """The prompt's length of each of `rows` rows; several texts of one prompt, such as beams, are neighbours.

    Raises:
        UserError: if the rows are no multiple of the lengths.
    """
    tokens = given if isinstance(given, list) else [given]
    if rows % len(tokens):
        raise UserError(f"context_tokens gives {len(tokens)} lengths and the batch has {rows} rows")
    return [n for n in tokens for _ in range(rows // len(tokens))]
