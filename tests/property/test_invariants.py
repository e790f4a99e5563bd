"""The invariants of docs/semantics.md, for every policy and schedule there is, without naming any.

They are in `a2sf.engine.invariants`, where `a2sf check` finds them too; here are more trials of each, and what concerns only
the numbers of the recursion.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2sf import A2SF, EvictionState, attend, evicting_attention, make_policy
from a2sf.engine.invariants import INVARIANTS, Excepted
from a2sf.engine.invariants.cases import case
from tests.policies import cases, instances, label, tiered
from tests.tiers import examples, is_left_out

SOME = settings(max_examples=examples(3), deadline=None)
T, K = 24, 2
seeds = st.integers(0, 10_000)
budgets = st.integers(1, 12)


def each_invariant() -> list[Any]:
    """Every invariant with the cases of each tier; in `make test` under one of a rule's schedules, in turn."""
    made, of_rule = tiered(cases(prepared=True)), {}
    for case_ in made:
        if not case_.marks:
            of_rule.setdefault(repr(case_.values[0]), []).append(case_)
    found = []
    for turn, name in enumerate(INVARIANTS):
        quick = {id(each[(turn + i) % len(each)]) for i, each in enumerate(of_rule.values())}
        for case_ in made:
            marks = case_.marks or (() if id(case_) in quick else [pytest.mark.full])
            if not (marks and is_left_out("full")):
                found.append(pytest.param(*case_.values, name, marks=marks))
    return found


@pytest.mark.parametrize(("policy", "schedule", "name"), each_invariant(), ids=label)
@SOME
@given(seed=seeds)
def test_every_policy_holds_every_invariant(policy, schedule, name, seed):
    try:
        INVARIANTS[name](case(policy, schedule, seed))
    except Excepted as why:
        assert not policy.causal or "step" not in policy.schedules
        pytest.skip(str(why))


def tensors(seed: int, rows: int = 2, tokens: int = T, heads: int = 4, size: int = 8, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(rows, heads, tokens, size, generator=g)
    k, v = (torch.randn(rows, K, tokens, size, generator=g) for _ in range(2))
    return tuple(x.to(dtype) for x in (q, k, v))


def same_state(a: EvictionState, b: EvictionState) -> None:
    slots = max(a.positions.shape[-1], b.positions.shape[-1])
    a, b = a.pad(slots), b.pad(slots)
    assert torch.equal(a.positions, b.positions)
    for name, x in vars(a).items():
        torch.testing.assert_close(x, getattr(b, name), msg=lambda text, name=name: f"{name}: {text}")


def kept(state: EvictionState) -> list[list[list[int]]]:
    return [[[p for p in head if p >= 0] for head in row] for row in state.positions.tolist()]


@SOME
@given(seed=seeds, budget=budgets, factor=st.floats(0, 1))
def test_2_special_cases_coincide(seed, budget, factor):
    q, k, v = tensors(seed)
    given_ = {"budget": budget, "sinks": 0}

    def by_name(name: str) -> torch.Tensor:
        return attend(make_policy(name), q, k, v, budget=budget)[0]

    heavy, _ = evicting_attention(q, k, v, **given_, recent=budget // 2, forgetting_factor=1.0)
    torch.testing.assert_close(heavy, by_name("h2o"), atol=0, rtol=0)
    window, _ = evicting_attention(q, k, v, **given_, recent=budget, forgetting_factor=factor)
    torch.testing.assert_close(window, by_name("window"))
    # a factor of 0: only the last query's attention counts
    _, state = evicting_attention(q, k, v, **given_, recent=0, forgetting_factor=0.0)
    _, before = evicting_attention(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1], **given_, recent=0, forgetting_factor=0.0)
    for row in range(2):
        for head in range(2):
            cached = [*kept(before)[row][head], T - 1]
            logits = q[row, 2 * head : 2 * head + 2, -1] @ k[row, head, cached].T * 8**-0.5
            attention = logits.softmax(-1).sum(0)
            if len(cached) > budget:
                cached.pop(int(attention.argmin()))
            assert kept(state)[row][head] == cached


@SOME
@given(seed=seeds, budget=budgets, factor=st.floats(0, 1), data=st.data())
def test_2_settings_of_a2sf_are_the_numbers_of_the_recursion(seed, budget, factor, data):
    q, k, v = tensors(seed, dtype=torch.float32)
    sinks = data.draw(st.integers(0, budget))
    recent = data.draw(st.integers(0, budget - sinks))
    numbers = {"recent": recent, "sinks": sinks, "forgetting_factor": factor}
    want, state = evicting_attention(q, k, v, budget=budget, **numbers)
    got, its = attend(A2SF(**numbers), q, k, v, budget=budget)
    assert torch.equal(got, want)
    same_state(its, state)


def test_rows_of_one_batch_may_follow_different_numbers():
    stated = [p.keeps(6) for p in instances() if p.keeps(6).rule == A2SF().keeps(6).rule]
    q, k, v = tensors(0, rows=len(stated), dtype=torch.float32)
    names = ("budget", "recent", "sinks", "forgetting_factor")
    together, _ = evicting_attention(q, k, v, **{n: torch.tensor([getattr(r, n) for r in stated]) for n in names})
    for row, numbers in enumerate(stated):
        one = (x[row : row + 1] for x in (q, k, v))
        alone, _ = evicting_attention(*one, **{n: getattr(numbers, n) for n in names})
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": 0},
        {"budget": 4, "recent": 5},
        {"budget": 4, "recent": 2, "sinks": 3},
        {"budget": 4, "forgetting_factor": 1.1},
        {"budget": 4, "forgetting_factor": float("nan")},
        {"budget": 4, "lengths": torch.tensor([25, 1])},
        {"budget": torch.tensor([4, 4, 4])},
    ],
)
def test_numbers_out_of_range_are_refused(wrong):
    q, k, v = tensors(0)
    with pytest.raises(ValueError, match=r"must|needs"):
        evicting_attention(q, k, v, **({"recent": 0, "forgetting_factor": 0.5} | wrong))


def test_one_factor_per_layer():
    policy = A2SF(forgetting_factor=[0.0, 0.5, 1.0])
    assert [policy.retention(8, layer).forgetting_factor for layer in range(3)] == [0.0, 0.5, 1.0]
