"""The invariants of docs/semantics.md, for every policy there is, without naming any."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2sf import A2SF, Policy, evicting_attention
from a2sf.policies.base import UNLIMITED
from a2sf.policies.find import find_policies

POLICIES = [cls() for cls in find_policies().values()]
PER_POLICY = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
SOME = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 10_000)


def tensors(seed: int, rows: int = 2, tokens: int = 24, heads: int = 4, kv_heads: int = 2, size: int = 8):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, heads, tokens, size, generator=g)
    k, v = (torch.randn(rows, kv_heads, tokens, size, generator=g) for _ in range(2))
    return q, k, v


def run(policy: Policy, budget: int, q, k, v, **more):
    kept = policy.retention(budget, 0)
    numbers = {"recent": kept.recent, "sinks": kept.sinks, "forgetting_factor": kept.forgetting_factor}
    return evicting_attention(q, k, v, budget=kept.budget, **numbers, **more)


def full_attention(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@PER_POLICY
@SOME
@given(seed=seeds, beyond=st.integers(0, 5))
def test_1_a_budget_of_the_whole_sequence_is_full_attention(policy, seed, beyond):
    q, k, v = tensors(seed)
    out, _ = run(policy, 24 + beyond, q, k, v)
    torch.testing.assert_close(out, full_attention(q, k, v), atol=2e-5, rtol=1e-4)


@SOME
@given(seed=seeds, budget=st.integers(1, 12), factor=st.floats(0, 1))
def test_2_special_cases_coincide(seed, budget, factor):
    q, k, v = tensors(seed)
    given_ = {"budget": budget, "sinks": 0}
    policies = {p.name: p for p in POLICIES}
    heavy, _ = evicting_attention(q, k, v, **given_, recent=budget // 2, forgetting_factor=1.0)
    torch.testing.assert_close(heavy, run(policies["h2o"], budget, q, k, v)[0], atol=0, rtol=0)
    window, _ = evicting_attention(q, k, v, **given_, recent=budget, forgetting_factor=factor)
    torch.testing.assert_close(window, run(policies["window"], budget, q, k, v)[0], atol=1e-5, rtol=1e-4)
    # a factor of 0: only the last query's attention counts
    _, state = evicting_attention(q, k, v, **given_, recent=0, forgetting_factor=0.0)
    _, before = evicting_attention(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1], **given_, recent=0, forgetting_factor=0.0)
    for row in range(2):
        for head in range(2):
            old = before.positions[row, head].tolist()
            cached = [p for p in old if p >= 0] + [23]
            logits = q[row, 2 * head : 2 * head + 2, -1] @ k[row, head, cached].T * 8**-0.5
            attention = logits.softmax(-1).sum(0)
            if len(cached) > budget:
                cached.pop(int(attention.argmin()))
            assert [p for p in state.positions[row, head].tolist() if p >= 0] == cached


@PER_POLICY
@SOME
@given(seed=seeds, budget=st.integers(1, 12), lengths=st.lists(st.integers(1, 24), min_size=3, max_size=3))
def test_3_batch_padding_and_order_do_not_change_a_row(policy, seed, budget, lengths):
    q, k, v = tensors(seed, rows=3)
    out, state = run(policy, budget, q, k, v, lengths=torch.tensor(lengths))
    order = torch.tensor([2, 0, 1])
    turned, _ = run(policy, budget, q[order], k[order], v[order], lengths=torch.tensor(lengths)[order])
    assert torch.equal(turned, out[order])
    for row, n in enumerate(lengths):
        alone, its = run(policy, budget, *(x[row : row + 1, :, :n] for x in (q, k, v)))
        assert torch.equal(alone[0], out[row, :, :n])
        assert not out[row, :, n:].any()
        assert torch.equal(its.positions[0], state.positions[row, :, : its.positions.shape[-1]])


@PER_POLICY
@SOME
@given(seed=seeds, budget=st.integers(1, 12), cut=st.integers(1, 23))
def test_4_chunks_and_forks_equal_the_whole(policy, seed, budget, cut):
    q, k, v = tensors(seed)
    whole, end = run(policy, budget, q, k, v)
    first, state = run(policy, budget, *(x[:, :, :cut] for x in (q, k, v)))
    rest, continued = run(policy, budget, *(x[:, :, cut:] for x in (q, k, v)), state=state)
    torch.testing.assert_close(torch.cat([first, rest], 2), whole, atol=2e-5, rtol=1e-4)
    assert torch.equal(continued.positions, end.positions)
    # a fork: both rows go on from row 0's state, one with its own tokens
    forked, _ = run(policy, budget, *(x[:, :, cut:] for x in (q, k, v)), state=state.select(torch.tensor([0, 0])))
    torch.testing.assert_close(forked[0], rest[0], atol=2e-5, rtol=1e-4)


@PER_POLICY
@SOME
@given(seed=seeds, budget=st.integers(1, 12), t=st.integers(0, 22))
def test_5_later_tokens_change_nothing_earlier(policy, seed, budget, t):
    q, k, v = tensors(seed)
    out, _ = run(policy, budget, q, k, v)
    others = [torch.cat([x[:, :, : t + 1], torch.randn_like(x[:, :, t + 1 :])], 2) for x in (q, k, v)]
    changed, _ = run(policy, budget, *others)
    torch.testing.assert_close(changed[:, :, : t + 1], out[:, :, : t + 1], atol=1e-6, rtol=1e-5)


@PER_POLICY
@SOME
@given(seed=seeds, budgets=st.tuples(st.integers(6, 12), st.integers(6, 12)))
def test_6_budgets_do_not_matter_until_one_is_full(policy, seed, budgets):
    q, k, v = (x[:, :, : min(budgets)] for x in tensors(seed))
    a, b = (run(policy, c, q, k, v) for c in budgets)
    torch.testing.assert_close(a[0], b[0], atol=0, rtol=0)
    assert torch.equal(a[1].positions, b[1].positions)
    torch.testing.assert_close(a[1].scores, b[1].scores)


@PER_POLICY
@SOME
@given(seed=seeds, budget=st.integers(1, 12), tokens=st.integers(1, 24))
def test_7_what_is_kept(policy, seed, budget, tokens):
    q, k, v = (x[:, :, :tokens] for x in tensors(seed))
    kept = policy.retention(budget, 0)
    _, state = run(policy, budget, q, k, v)
    for positions in state.positions.reshape(-1, state.positions.shape[-1]).tolist():
        there = [p for p in positions if p >= 0]
        assert there == sorted(set(there))
        assert len(there) == min(tokens, kept.budget if kept.budget != UNLIMITED else tokens)
        protected = {*range(min(kept.sinks, tokens)), *range(max(0, tokens - kept.recent), tokens)}
        assert protected <= set(there)


@PER_POLICY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_8_low_precision_is_accumulated_in_float32(policy, dtype):
    q, k, v = (x.to(dtype) for x in tensors(3, tokens=64))
    out, state = run(policy, 16, q, k, v)
    exact, exact_state = run(policy, 16, *(x.double() for x in (q, k, v)))
    assert out.dtype == dtype
    assert torch.equal(state.positions, exact_state.positions)
    torch.testing.assert_close(out.double(), exact, atol=torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)


def test_rows_of_one_batch_may_follow_different_policies():
    q, k, v = tensors(0, rows=len(POLICIES))
    kept = [p.retention(6, 0) for p in POLICIES]
    together, _ = evicting_attention(
        q,
        k,
        v,
        budget=torch.tensor([r.budget for r in kept]),
        recent=torch.tensor([r.recent for r in kept]),
        sinks=torch.tensor([r.sinks for r in kept]),
        forgetting_factor=torch.tensor([r.forgetting_factor for r in kept]),
    )
    for row, policy in enumerate(POLICIES):
        alone, _ = run(policy, 6, *(x[row : row + 1] for x in (q, k, v)))
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
