"""Policies and budgets: the numbers of docs/semantics.md, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2sf import A2SF, Budget, Schedule
from a2sf.engine.retention import BatchRetention
from a2sf.errors import ConfigError
from a2sf.hf.settings import check_settings
from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.budget import Growth, check_list, growing
from a2sf.policies.find import find_policies

POLICIES = find_policies()


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("full", {}, Retention(budget=UNLIMITED)),
        ("window", {}, Retention(budget=9, recent=9)),
        ("streaming", {"sinks": 4}, Retention(budget=9, recent=5, sinks=4)),
        ("h2o", {}, Retention(budget=9, recent=4, forgetting_factor=1.0)),
        ("a2sf", {"forgetting_factor": 0.3}, Retention(budget=9, forgetting_factor=0.3)),
    ],
)
def test_the_table_of_policies(name, settings, expected):
    assert POLICIES[name](**settings).retention(9, 0) == expected


@given(ratio=st.integers(1, 100), total=st.integers(1, 5000))
def test_a_ratio_is_exact_in_decimal(ratio, total):
    """0.29 of 100 tokens is 29, though 0.29 * 100 < 29 in binary."""
    assert Budget(ratio=ratio / 100).slots(total=total, context=0, layer=0) == max(1, ratio * total // 100)


def test_the_base_of_a_ratio_and_lists_of_one_per_layer():
    assert Budget(ratio=0.5, base="context").slots(total=100, context=40, layer=0) == 20
    assert Budget(tokens=7).slots(total=100, context=40, layer=3) == 7
    assert Budget(tokens=7, base="context") == Budget(tokens=7)  # one cell, because a number has no base
    assert [Budget(ratio=[0.1, 0.2]).slots(total=50, context=0, layer=i) for i in range(2)] == [5, 10]


@given(ratio=st.integers(1, 100), position=st.integers(0, 400), prompt=st.one_of(st.none(), st.integers(1, 300)))
def test_a_budget_of_the_tokens_seen_is_that_share_at_each_position(ratio, position, prompt):
    growth = Growth(POLICIES["h2o"](), Budget(ratio=ratio / 100, base="seen"), 0, 1, prompt)
    C = max(1, ratio * (max(position, (prompt or 1) - 1) + 1) // 100)
    assert growth.at(position) == Retention(budget=C, recent=C // 2)
    assert growth.at(position // 2) == Growth(growth.policy, growth.budget, 0, 1, prompt).at(position // 2)
    later = growth.phases(position, position + 90)
    assert later[0] == (position, growth.at(position))
    assert all(growth.at(p) == k != growth.at(p - 1) for p, k in later[1:])
    changes = [p for p in range(position + 1, position + 90) if growth.at(p) != growth.at(p - 1)]
    assert changes == [p for p, _ in later[1:]]


@given(ratio=st.integers(1, 100), spare=st.integers(0, 5), prompt=st.one_of(st.none(), st.integers(1, 60)))
def test_what_is_cached_of_a_growing_budget(ratio, spare, prompt):
    """Against the schedule, spelled out."""
    growth = Growth(POLICIES["window"](), Budget(ratio=ratio / 100, base="seen"), 0, 1, prompt)
    held, want, given_back = 0, [], []
    for t in range(90):
        C, held, evicted = max(1, ratio * (t + 1) // 100), held + 1, 0
        if (prompt is None or t >= prompt) and held > C + spare:
            evicted = held - C
        elif prompt is not None and t == prompt - 1:
            evicted = max(0, held - C)
        held -= evicted
        want.append(held)
        given_back.append(evicted)
    assert growth.cached(30, spare)[:30] == want[:30]
    assert growth.cached(90, spare)[:90] == want
    assert [growth.given_back(t, spare) for t in range(90)] == given_back


def test_a_copy_of_a_growing_budget_is_equal_and_found_again():
    growth = Growth(POLICIES["h2o"](), Budget(ratio=0.3, base="seen"), 1, 4)
    growth.at(50)
    for twin in (copy.deepcopy(growth), pickle.loads(pickle.dumps(growth))):
        assert twin == growth
        assert hash(twin) == hash(growth)
        assert twin.at(70) == growth.at(70)


@pytest.mark.parametrize("name", ["roco", "criticalkv"])
def test_rows_of_growing_budgets_have_one_rule_whatever_equal_policies_did_before(name):
    budget, schedule = Budget(ratio=0.3, base="seen"), Schedule("prompt", then="step")
    growing(POLICIES[name](), budget, 2, schedule, 41)
    policy = POLICIES[name]()
    BatchRetention.of([growing(policy, budget, 2, schedule, prompt)[0] for prompt in (41, 42)], schedule, [41, 42])


@given(policy=st.sampled_from(sorted(POLICIES)), budget=st.integers(1, 500))
def test_every_policy_states_numbers_that_fit_any_budget(policy, budget):
    made = POLICIES[policy]()
    kept = made.keeps(budget)
    assert kept.recent + kept.sinks <= kept.budget
    assert kept.budget in (budget, UNLIMITED) or not made.uses_budget  # all policies that have one get the same


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), "half", True, [], [0.2, 2.0]])
def test_ratios_that_are_refused(ratio):
    with pytest.raises(ConfigError, match=r"budget\.ratio=.*is not allowed: .*(0 < ratio <= 1|empty)"):
        Budget(ratio=ratio)


@pytest.mark.parametrize("tokens", [0, -3, 2.5, "ten", True])
def test_token_budgets_that_are_refused(tokens):
    with pytest.raises(ConfigError, match=r"budget\.tokens=.*at least 1"):
        Budget(tokens=tokens)


@pytest.mark.parametrize("factor", [-0.1, 1.1, float("nan"), "often", [0.1, 7], []])
def test_factors_that_are_refused(factor):
    with pytest.raises(ConfigError, match="forgetting_factor="):
        A2SF(forgetting_factor=factor)


def test_lists_must_have_one_entry_per_layer():
    with pytest.raises(ConfigError, match="one factor per layer, 3 for this model, and this one has 2"):
        A2SF(forgetting_factor=[0.1, 0.2]).check(3)
    with pytest.raises(ConfigError, match=r"budget\.ratio=.*one entry per layer, 3"):
        Budget(ratio=[0.1, 0.2]).check(3)


def test_ratio_and_tokens_exclude_each_other():
    for given_ in ({}, {"ratio": 0.2, "tokens": 5}):
        with pytest.raises(ConfigError, match="exactly one"):
            Budget(**given_)


@pytest.mark.parametrize("policy", ["pyramidkv", "h2o", "cake"])
def test_a_list_of_budgets_is_refused_where_the_policy_divides_them_itself(policy):
    """pyramidkv takes each number for the mean over the layers: of 600 and 100 tokens, two layers would hold over 1,000."""
    made = POLICIES[policy]()
    listed, equal = Budget(tokens=[600, 100]), Budget(tokens=[300, 300])
    check_list(made, equal, 2)
    check_list(made, Budget(ratio=0.2), 2)
    if policy != "pyramidkv":
        check_list(made, listed, 2)
        return
    assert sum(made.layer_budget(n, i, 2) for i, n in enumerate((600, 100))) > 1000
    for check in (lambda: check_list(made, listed, 2), lambda: check_settings(made, listed, 2)):
        with pytest.raises(
            ConfigError, match=r"budget.tokens=\[600, 100\] is not allowed: pyramidkv divides the slots"
        ):
            check()
