"""The invariants of docs/semantics.md, for every policy and schedule there is, without naming any.

Where rounding could decide between two tokens, the arithmetic is float64.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2sf import A2SF, EvictionState, Policy, Schedule, attend, evicting_attention, make_policy
from a2sf.policies.base import UNLIMITED
from tests.policies import cases, instances, label

PER_CASE = pytest.mark.parametrize(("policy", "schedule"), cases(), ids=label)
SOME = settings(max_examples=6, deadline=None)
T, K = 24, 2
seeds = st.integers(0, 10_000)
budgets = st.integers(1, 12)
prompts = st.integers(1, T + 3)


def tensors(seed: int, rows: int = 2, tokens: int = T, heads: int = 4, size: int = 8, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(rows, heads, tokens, size, generator=g)
    k, v = (torch.randn(rows, K, tokens, size, generator=g) for _ in range(2))
    return tuple(x.to(dtype) for x in (q, k, v))


def run(policy: Policy, schedule: Schedule, budget, prompt, q, k, v, **more) -> tuple[torch.Tensor, EvictionState]:
    return attend(policy, q, k, v, budget=budget, schedule=schedule, prompt=prompt, **more)


def full_attention(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def same_state(a: EvictionState, b: EvictionState) -> None:
    slots = max(a.positions.shape[-1], b.positions.shape[-1])
    a, b = a.pad(slots), b.pad(slots)
    assert torch.equal(a.positions, b.positions)
    for name, x in vars(a).items():
        torch.testing.assert_close(x, getattr(b, name), msg=lambda text, name=name: f"{name}: {text}")


def kept(state: EvictionState) -> list[list[list[int]]]:
    return [[[p for p in head if p >= 0] for head in row] for row in state.positions.tolist()]


@PER_CASE
@SOME
@given(seed=seeds, beyond=st.integers(0, 5), prompt=prompts)
def test_1_a_budget_of_the_whole_sequence_is_full_attention(policy, schedule, seed, beyond, prompt):
    q, k, v = tensors(seed)
    out, _ = run(policy, schedule, T + beyond, prompt, q, k, v)
    torch.testing.assert_close(out, full_attention(q, k, v))


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


@pytest.mark.parametrize(
    "policy", [p for p in instances() if {"step", "every", "prompt"} <= set(p.schedules)], ids=label
)
@SOME
@given(seed=seeds, budget=budgets)
def test_2_schedules_that_come_to_the_same(policy, seed, budget):
    q, k, v = tensors(seed)
    want, state = run(policy, Schedule(), budget, None, q, k, v)
    for other, prompt in ((Schedule("every", every=1), None), (Schedule("prompt", then="step"), 1)):
        got, its = run(policy, other, budget, prompt, q, k, v)
        torch.testing.assert_close(got, want)
        same_state(its, state)
    # a sequence that ends with its prompt: one cut of full attention, whatever comes then
    ends = [run(policy, Schedule("prompt", then=then), budget, T, q, k, v) for then in ("keep", "step")]
    torch.testing.assert_close(ends[0][0], full_attention(q, k, v))
    same_state(ends[0][1], ends[1][1])


@PER_CASE
@SOME
@given(
    seed=seeds,
    budget=st.lists(budgets, min_size=3, max_size=3),
    lengths=st.lists(st.integers(1, T), min_size=3, max_size=3),
    prompt=st.lists(prompts, min_size=3, max_size=3),
)
def test_3_batch_padding_and_order_do_not_change_a_row(policy, schedule, seed, budget, lengths, prompt):
    q, k, v = tensors(seed, rows=3, dtype=torch.float32)
    budget, lengths, prompt = torch.tensor(budget), torch.tensor(lengths), torch.tensor(prompt)
    out, state = run(policy, schedule, budget, prompt, q, k, v, lengths=lengths)
    order = torch.tensor([2, 0, 1])
    turned, _ = run(
        policy, schedule, budget[order], prompt[order], q[order], k[order], v[order], lengths=lengths[order]
    )
    assert torch.equal(turned, out[order])
    for row, n in enumerate(lengths.tolist()):
        one = (x[row : row + 1, :, :n] for x in (q, k, v))
        alone, its = run(policy, schedule, budget[row : row + 1], prompt[row : row + 1], *one)
        assert torch.equal(alone[0], out[row, :, :n])
        assert not out[row, :, n:].any()
        assert kept(its)[0] == kept(state)[row]


@PER_CASE
@SOME
@given(seed=seeds, budget=budgets, cuts=st.sets(st.integers(1, T - 1), min_size=1, max_size=3), prompt=prompts)
def test_4_chunks_and_forks_equal_the_whole(policy, schedule, seed, budget, cuts, prompt):
    q, k, v = tensors(seed)
    if not policy.causal:
        _, state = run(policy, schedule, budget, prompt, q, k, v)
        with pytest.raises(ValueError, match="whole sequence at once"):
            run(policy, schedule, budget, prompt, q, k, v, state=state)
        return
    whole, end = run(policy, schedule, budget, prompt, q, k, v)
    edges, state, parts = [0, *sorted(cuts), T], None, []
    for begin, stop in pairwise(edges):
        before, chunk = state, tuple(x[:, :, begin:stop] for x in (q, k, v))
        out, state = run(policy, schedule, budget, prompt, *chunk, state=before)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    same_state(state, end)
    # a fork: both rows go on from row 0's state, one with its own tokens
    forked, ends = run(policy, schedule, budget, prompt, *chunk, state=before.select(torch.tensor([0, 0])))
    torch.testing.assert_close(forked[0], parts[-1][0])
    own = [torch.cat([x[:1, :, :begin], x[1:, :, begin:]], 2) for x in (q, k, v)]
    scratch, its = run(policy, schedule, budget, prompt, *own)
    torch.testing.assert_close(forked[1], scratch[0, :, begin:])
    same_state(ends.select(torch.tensor([1])), its)


@PER_CASE
@SOME
@given(seed=seeds, budget=budgets, t=st.integers(0, T - 2), prompt=prompts)
def test_5_later_tokens_change_nothing_earlier(policy, schedule, seed, budget, t, prompt):
    if not policy.causal:
        return
    q, k, v = tensors(seed)
    out, _ = run(policy, schedule, budget, prompt, q, k, v)
    others = [torch.cat([x[:, :, : t + 1], torch.randn_like(x[:, :, t + 1 :])], 2) for x in (q, k, v)]
    changed, _ = run(policy, schedule, budget, prompt, *others)
    torch.testing.assert_close(changed[:, :, : t + 1], out[:, :, : t + 1])


@PER_CASE
@SOME
@given(seed=seeds, sizes=st.tuples(st.integers(6, 12), st.integers(6, 12)), prompt=prompts)
def test_6_budgets_do_not_matter_until_one_is_full(policy, schedule, seed, sizes, prompt):
    q, k, v = (x[:, :, : min(sizes)] for x in tensors(seed, dtype=torch.float32))
    a, b = (run(policy, schedule, c, prompt, q, k, v) for c in sizes)
    torch.testing.assert_close(a[0], b[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(a[1].positions, b[1].positions)


@PER_CASE
@SOME
@given(seed=seeds, budget=budgets, tokens=st.integers(1, T), prompt=prompts)
def test_7_what_is_kept(policy, schedule, seed, budget, tokens, prompt):
    q, k, v = (x[:, :, :tokens] for x in tensors(seed))
    stated = policy.keeps(budget)
    rule, C = stated.rule, stated.budget
    assert C in (budget, UNLIMITED)  # all policies get the same
    _, state = run(policy, schedule, budget, prompt, q, k, v)
    for row in kept(state):
        for head, there in enumerate(row):
            assert there == sorted(set(there))
            protected = {*range(min(stated.sinks, tokens)), *range(max(0, tokens - stated.recent), tokens)}
            assert protected <= set(there)
            if head in rule.whole:
                assert len(there) == tokens
            elif schedule.when == "step":
                assert len(there) == min(tokens, C)
            elif schedule.when == "every":
                assert min(tokens, C) <= len(there) <= min(tokens, C + schedule.every - 1)
        held = sum(map(len, row))
        if schedule.prompt:
            most = tokens if tokens < prompt else min(C, prompt) + tokens - prompt
            assert held == K * (min(most, C) if schedule.then == "step" and tokens >= prompt else most)
            if rule.cut is None or rule.cut.floor is None:
                assert len({len(head) for head in row}) == 1


@PER_CASE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_8_low_precision_is_accumulated_in_float32(policy, schedule, dtype):
    q, k, v = (x.to(dtype) for x in tensors(3, tokens=64))
    out, state = run(policy, schedule, 16, 40, q, k, v)
    exact, exact_state = run(policy, schedule, 16, 40, *(x.double() for x in (q, k, v)))
    assert out.dtype == dtype
    assert torch.equal(state.positions, exact_state.positions)
    torch.testing.assert_close(out.double(), exact, atol=torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)


@PER_CASE
def test_backends_agree(policy, schedule):
    q, k, v = tensors(11, rows=4)
    numbers = {"budget": torch.tensor([5, 9, 1, 30]), "prompt": torch.tensor([10, 20, 3, 12])}
    lengths = torch.tensor([24, 21, 7, 24])
    outs, states = zip(
        *(
            run(policy, schedule, *numbers.values(), q, k, v, lengths=lengths, backend=b)
            for b in ("reference", "torch")
        ),
        strict=True,
    )
    torch.testing.assert_close(outs[0], outs[1])
    same_state(*states)
    single, its = run(policy, schedule, *numbers.values(), *(x.float() for x in (q, k, v)), lengths=lengths)
    torch.testing.assert_close(single.double(), outs[0], atol=2e-5, rtol=1e-4)
    assert kept(its) == kept(states[0])


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
