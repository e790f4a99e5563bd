"""Numbers that a policy of one's own gives: whole numbers of tokens, and no more of them than its budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from a2sf import Budget, Policy, PrunedCache, Retention, Schedule, attend
from a2sf.errors import PolicyError, UserError
from a2sf.hf.settings import retention_of
from a2sf.policies.find import find_policies
from a2sf.policies.rule import Cut, Head, Rule
from tests.models import shared

HERE = r"test_own_numbers.py, line \d+"


def own(retention: Any, layer_budget: Any = None, **more: Any) -> Policy:
    """A policy of one's own; its name is inherited, so that other tests do not find it."""
    known = type("Named", (), {"name": "own_numbers", "label": "Own numbers"})

    @dataclass(frozen=True, kw_only=True)
    class Own(known, Policy):
        uses_budget: ClassVar[bool] = more.get("uses_budget", True)

        def retention(self, budget: int, layer: int) -> Retention:
            return retention(budget, layer)

    if layer_budget is not None:
        Own.layer_budget = layer_budget
    return Own()


@pytest.mark.parametrize("field", ["budget", "recent", "sinks"])
@pytest.mark.parametrize("value", [2.5, 5.0, np.float64(2.5), torch.tensor(2.5), "2", None])
def test_numbers_of_tokens_are_whole(field, value):
    with pytest.raises(ValueError, match=rf"^{field} must be a whole number, got "):
        Retention(**{"budget": 10, field: value})


@pytest.mark.parametrize("six", [6, np.int64(6), torch.tensor(6), np.array(6)])
def test_whole_numbers_of_other_types_are_ints(six):
    made = Retention(budget=six, recent=six)
    assert made == Retention(budget=6, recent=6)
    assert type(made.budget) is type(made.recent) is int


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Rule(queries=1.5), "queries must be a whole number, got 1.5"),
        (lambda: Rule(memory=1.5), "memory must be a whole number, got 1.5"),
        (lambda: Rule(full_heads=(0.0,)), "a head of full_heads must be a whole number, got 0.0"),
        (lambda: Head(sinks=0.5), "sinks must be a whole number, got 0.5"),
        (lambda: Cut(kernel_size=5.0), "kernel_size must be a whole number, got 5.0"),
    ],
)
def test_numbers_of_rules_are_whole(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("slots", [5, 10])
def test_a_share_that_is_not_rounded_is_refused_with_its_line(slots):
    """At 10 tokens 5.0, which an earlier version took, and at 5 tokens 2.5, which it took as 2."""
    said = rf"policy own_numbers does not fit a budget of {slots} tokens: budget must be a whole number, got "
    halved = own(lambda budget, layer: Retention(budget=budget / 2))
    with pytest.raises(UserError, match=rf"{said}{slots / 2}; .* \(.*{HERE}, in <lambda>\)"):
        retention_of(halved, Budget(tokens=slots), 20, 12, 2)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("prompt")])
@pytest.mark.parametrize(
    ("retention", "layer_budget", "said"),
    [
        (
            lambda budget, layer: Retention(budget=2 * budget),
            None,
            r"it may hold 6 tokens in a layer and states 12 tokens",
        ),
        (
            lambda budget, layer: Retention(budget=2**31 - 1),
            None,
            "it may hold 6 tokens in a layer and states no limit",
        ),
        (
            lambda budget, layer: Retention(budget=budget),
            lambda self, budget, layer, layers, prompt=None: budget + (layer == 0),
            r"3 layers that may hold 6 tokens each hold 19 in all, and at most 18 are allowed",
        ),
    ],
)
def test_a_policy_that_holds_more_than_its_budget_is_refused(retention, layer_budget, said, schedule):
    """In a sweep, in a cache and in `attend`; before, results had the budget that was asked for as its label."""
    policy = own(retention, layer_budget)
    said = rf"^policy own_numbers: {said} \(.*{HERE}\)$"
    with pytest.raises(PolicyError, match=said):
        retention_of(policy, Budget(tokens=6), 20, 12, 3, schedule)
    query, key = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    with pytest.raises(PolicyError, match=said):
        attend(policy, query, key, key, budget=6, layer=1, layers=3, schedule=schedule, prompt=9)
    model = shared("llama")
    cache = PrunedCache(model, policy, 6, schedule=schedule)
    with pytest.raises(PolicyError, match=said):
        model(torch.arange(9)[None], past_key_values=cache)


def test_less_than_the_budget_and_none_at_all_are_allowed():
    less = own(
        lambda budget, layer: Retention(budget=budget), lambda self, budget, layer, layers, prompt=None: budget - layer
    )
    assert [r.budget for r in retention_of(less, Budget(tokens=6), 20, 12, 2)] == [6, 5]
    full = own(lambda budget, layer: Retention(budget=2**31 - 1), uses_budget=False)
    assert retention_of(full, None, 20, 12, 1)[0].budget == 2**31 - 1
    threshold = own(lambda budget, layer: Retention(budget=budget + 3, rule=Rule(threshold=0.1)))
    assert retention_of(threshold, Budget(tokens=6), 20, 12, 1)[0].budget == 9
    pyramid = find_policies()["pyramidkv"](window=3, kernel=3)
    prompts = Schedule("prompt")
    assert sum(r.budget for r in retention_of(pyramid, Budget(tokens=7), 40, 30, 3, prompts)) == 21
