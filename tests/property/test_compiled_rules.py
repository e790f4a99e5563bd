"""Every policy and schedule on the compiled kernel of the CPU against the reference in float64: rows, trees, chunks.

The examples are the same in every run, because in float32 a near tie of two priorities may go the other way.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from a2sf import Policy, Rule, Schedule
from a2sf.engine import priorities
from a2sf.engine.eviction import reference
from a2sf.engine.kernels import attend, knows
from a2sf.engine.kernels.cpu import SlotCache
from a2sf.engine.kernels.cpu import rank as cpu_rank
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Attended, Options, Segments
from tests.policies import cases, instances, label, tiered
from tests.tiers import examples

PER_CASE = pytest.mark.parametrize(("policy", "schedule"), tiered(cases()), ids=label)
CAUSAL = pytest.mark.parametrize(("policy", "schedule"), tiered(c for c in cases() if c[0].causal), ids=label)
SOME = settings(max_examples=examples(3), deadline=None, derandomize=True)
D, V, K, G = 20, 24, 2, 2
seeds = st.integers(0, 10_000)


def tensors(seed: int, rows: int, tokens: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((K * G, D), (K, D), (K, V))
    return [torch.randn(rows, tokens, n, s, generator=g).transpose(1, 2) * (2 if n > K else 1) for n, s in shapes]


def segments(
    policy: Policy, schedule: Schedule, shape: list[tuple[int, ...]], budget: list[int], prompt: list[int]
) -> Segments:
    """`shape`: (row, start, length, parent) of each segment."""
    kept = [policy.keeps(b) for b in budget]
    row, start, length, parent = (torch.tensor(c) for c in zip(*shape, strict=True))
    numbers = BatchRetention.of(kept, schedule, prompt).retention()
    return Segments(**numbers, row=row, start=start, length=length, parent=parent)


def assert_same(got: Attended, want: Attended) -> None:
    assert (got.output - want.output).abs().max() < 2e-5
    assert got.evicted.equal(want.evicted)
    assert sorted(got.cuts.tolist()) == sorted(want.cuts.tolist())
    slots = max(got.state.positions.shape[-1], want.state.positions.shape[-1])
    a, b = got.state.pad(slots), want.state.pad(slots)
    assert a.positions.equal(b.positions)
    assert a.seen.equal(b.seen)
    for name in ("scores", "keys", "values"):
        torch.testing.assert_close(getattr(a, name).double(), getattr(b, name), atol=5e-5, rtol=5e-5)


def both(qkv: list[Tensor], s: Segments, state=None, scale: float = 0.3) -> tuple[Attended, Attended]:
    options = Options(scale, return_state=True, trace=True)
    exact = None if state is None else state[1]
    return (
        attend(*qkv, s, options, None if state is None else state[0]),
        reference(*(x.double() for x in qkv), s, options, exact),
    )


@PER_CASE
@SOME
@given(seed=seeds, data=st.data())
def test_rows(policy, schedule, seed, data):
    lengths = data.draw(st.lists(st.integers(0, 60), min_size=3, max_size=3))
    budget, prompt = (data.draw(st.lists(st.integers(1, n), min_size=3, max_size=3)) for n in (40, 62))
    s = segments(policy, schedule, [(b, 0, n, -1) for b, n in enumerate(lengths)], budget, prompt)
    assert_same(*both(tensors(seed, 3, 60), s))


@CAUSAL
@SOME
@given(seed=seeds, data=st.data())
def test_trees(policy, schedule, seed, data):
    """Choices after a context, some empty; the prompt ends with the context, or in a segment that follows on."""
    context = data.draw(st.integers(1, 30))
    choices = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    prompt = context + data.draw(st.sampled_from([0, 0, 3]))
    shape, at = [(0, 0, context, -1)], context
    for i, n in enumerate(choices):
        shape.append((0, at, n, 0))
        at += n
        if i == 0:
            shape.append((0, at, 5, 1))  # a grandchild
            at += 5
    # the parts agree where budgets do, so that one may evict before it forks
    budget = data.draw(st.integers(1, 20))
    s = segments(policy, schedule, shape, [budget] * len(shape), [prompt] * len(shape))
    assert_same(*both(tensors(seed, 1, at), s))


@CAUSAL
@SOME
@given(seed=seeds, data=st.data())
def test_chunks(policy, schedule, seed, data):
    qkv, state = tensors(seed, 2, 50), None
    budget, prompt = (data.draw(st.lists(st.integers(1, n), min_size=2, max_size=2)) for n in (25, 52))
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, 49), min_size=1, max_size=3))), 50]
    for begin, end in pairwise(edges):
        s = segments(policy, schedule, [(b, begin, end - begin, -1) for b in range(2)], budget, prompt)
        got, want = both(qkv, s, state)
        assert_same(got, want)
        state = got.state, want.state


@pytest.mark.parametrize(
    ("policy", "spare"),
    [(p, n) for p in instances() if knows(p.keeps(9).rule) for n in (0, 2) if not n or "every" in p.schedules],
    ids=label,
)
def test_token_by_token(policy, spare):
    """`SlotCache`: some chunks, a state loaded in the middle, rows in another order."""
    kept = policy.keeps(9)
    schedule = Schedule("every", every=spare + 1) if spare else Schedule()
    qkv = tensors(5, 2, 50)
    rows = BatchRetention.of([kept] * 2, schedule)
    slots = min(kept.budget + spare, 50)
    cache, order, outputs = SlotCache(2, K, G, slots, D, V, kept.rule, spare), torch.tensor([0, 1]), []
    for begin, end in ((0, 20), (20, 21), (21, 22), (22, 40), (40, 50)):
        part = [x[order, :, begin:end] for x in qkv]
        outputs.append(cache.attend(*part, rows, scale=0.3)[order])
        if begin == 20:
            cache.reorder(torch.tensor([1, 0]))
            order = torch.tensor([1, 0])
        if begin == 21:
            state, cache = cache.state(), SlotCache(2, K, G, slots, D, V, kept.rule, spare)
            cache.load(state, kept.forgetting_factor)
    s = segments(policy, schedule, [(b, 0, 50, -1) for b in range(2)], [9, 9], [1, 1])
    _, want = both(qkv, s)
    assert (torch.cat(outputs, 2) - want.output).abs().max() < 2e-5
    assert cache.state().select(order).positions.equal(want.state.positions)


@pytest.mark.parametrize("when", ["every", "prompt"])
def test_nothing_bad_outlives_its_token(when):
    """NaN in a value reaches the outputs that it is in, also where several tokens go at once, and none after."""
    q, k, v = tensors(7, 1, 40)
    able = (p for p in instances() if {"every", "prompt"} <= set(p.schedules) and p.keeps(8).rule.merge_fn is None)
    policy = next(p for p in able if p.keeps(8).recent == 4)
    s = segments(policy, Schedule(when, every=4, then="step"), [(0, 0, 40, -1)], [8], [15])
    outlived = []
    for at in range(3, 12):
        bad = v.clone()
        bad[0, 0, at] = float("nan")
        got = attend(q, k, bad, s, Options(0.3, return_state=True))
        want = reference(q.double(), k.double(), bad.double(), s, Options(0.3, return_state=True))
        assert got.output.isnan().equal(want.output.isnan())
        assert got.state.positions.equal(want.state.positions)
        outlived.append(bool(got.output[0, :, -1].isfinite().all()))
    assert any(outlived)


def test_a_share_is_the_same_in_every_backend():
    assert np.float32(priorities.SHARE) == cpu_rank.SHARE
    # equal logits: every token has its share, whatever 1 / n is in binary
    q, k, v = tensors(1, 1, 60)
    above_uniform = next(p for p in instances() if p.keeps(60).rule.count_above_uniform)
    numbers = segments(above_uniform, Schedule(), [(0, 0, 60, -1)], [60], [1])
    rule = Rule(count_above_uniform=True)
    s = replace(numbers, rule=rule, forgetting_factor=torch.ones(1, dtype=torch.float64))
    for backend in ("reference", "torch", "numba"):
        scores = attend(torch.zeros_like(q), k, v, s, Options(0.3, return_state=True), backend=backend).state.scores
        assert scores[0, 0].tolist() == [G * n for n in range(60, 0, -1)]
