"""The opposite of a policy, which would evict what the policy retains: shows whether a rule has an effect."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from a2sf.policies.base import Policy, Retention
from a2sf.policies.rule import PriorityFn, Rule, Step, TokenFn
from a2sf.policies.slots import head_slots


@dataclass(frozen=True)
class _Negative:
    """A function of a rule with the opposite sign; `varied` notes for each call whether its numbers differ."""

    of: TokenFn | PriorityFn
    varied: list[bool] = field(default_factory=list, compare=False)

    def __call__(self, *shown: Any) -> Any:
        given = self.of(*shown)
        number = given[0] if isinstance(given, tuple) else given
        if not isinstance(number, Tensor):
            return given  # the engine reports what is wrong with it
        real = number[shown[0].cached] if isinstance(shown[0], Step) else number
        self.varied.append(real.numel() > 0 and bool((real != real.flatten()[0]).any()))
        return (-number, *given[1:]) if isinstance(given, tuple) else -number


def _minus_one(keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return -torch.ones_like(keys[..., 0])


def opposite(policy: Policy) -> tuple[Policy, list[bool]]:
    """The policy with every priority negated, and a list: for each call of its functions, whether tokens differ."""
    varied: list[bool] = []

    def negated(rule: Rule) -> Rule:
        if rule.threshold is not None:
            rule = replace(rule, threshold=-rule.threshold)
        bias = None if rule.bias is None else _Negative(rule.bias, varied)
        if rule.priority_fn is not None:
            return replace(rule, priority_fn=_Negative(rule.priority_fn, varied))
        if not rule.scored:
            return replace(rule, bias=bias)
        varied.append(True)  # attention does
        return replace(rule, weight=_minus_one if rule.weight is None else _Negative(rule.weight), bias=bias)

    return _with_rule(policy, negated), varied


def lenient(policy: Policy) -> Policy:
    """The policy with a threshold that every priority reaches, if it has one."""
    least = -sys.float_info.max
    return _with_rule(policy, lambda rule: rule if rule.threshold is None else replace(rule, threshold=least))


def _with_rule(policy: Policy, changed: Callable[[Rule], Rule]) -> Policy:
    """The policy with another rule."""

    def keeps(*numbers: Any, **named: Any) -> Retention:
        stated = policy.keeps(*numbers, **named)
        return replace(stated, rule=changed(stated.rule))

    other = copy.copy(policy)
    vars(other)["keeps"] = keeps
    return other


def slots_of(stated: Retention, kv_heads: int) -> tuple[tuple[int, int, int], ...]:
    """Budget, recent and sinks of each head."""
    if stated.rule.heads:
        return head_slots(stated.rule.heads, stated.budget)
    return ((stated.budget, stated.recent, stated.sinks),) * kv_heads


def chooses(stated: Retention, kv_heads: int, tokens: int) -> bool:
    """Whether a layer that reads `tokens` tokens ever evicts one of several, so that its rule decides which."""
    rule, slots = stated.rule, slots_of(stated, kv_heads)
    ranks = rule.priority_fn is not None or rule.scored or rule.bias is not None
    if rule.threshold is not None:
        return ranks and any(max(r + s, C) < tokens for C, r, s in slots)
    return ranks and any(r + s < C < tokens for head, (C, r, s) in enumerate(slots) if head not in rule.full_heads)
