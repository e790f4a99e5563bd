"""Laws of the recursion (docs/semantics.md), on the compiled kernel and random inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from a2sf.engine.eviction import Attended, EvictionState, Options, Segments, reference
from a2sf.engine.kernels import attend
from a2sf.engine.kernels.cpu import SlotCache
from a2sf.engine.retention import BatchRetention
from a2sf.policies.base import UNLIMITED, Retention
from tests.tiers import examples

QUICK = settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.too_slow])
TOLERANCE, NEAR = 2e-5, 1e-5


@st.composite
def rules(draw: st.DrawFn) -> tuple[int, int, int, float]:
    """Budget, recent, sinks, forgetting factor."""
    budget = draw(st.one_of(st.integers(1, 40), st.just(UNLIMITED)))
    most = min(budget, 40)
    recent = draw(st.one_of(st.sampled_from([0, most]), st.integers(0, most)))
    sinks = draw(st.integers(0, most - recent))
    return budget, recent, sinks, draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0)))


@st.composite
def inputs(draw: st.DrawFn, rows: int | None = None, tokens: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value; continuous, so that ties are as rare as the rounding of scores allows."""
    B, K, G = rows or draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    T = draw(st.integers(1, 60)) if tokens is None else tokens
    D, V = draw(st.sampled_from([1, 8, 16, 20, 64])), draw(st.sampled_from([3, 16, 33, 64]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sharpness = draw(st.sampled_from([0.3, 1.0, 4.0]))
    if draw(st.booleans()):  # a model's layout
        q, k, v = (torch.randn(B, T, n, s, generator=g).transpose(1, 2) for n, s in ((K * G, D), (K, D), (K, V)))
    else:
        q, k, v = (torch.randn(B, n, T, s, generator=g) for n, s in ((K * G, D), (K, D), (K, V)))
    return q * sharpness, k, v


def rows_of(rule: list[tuple[int, int, int, float]], start: list[int], length: list[int]) -> Segments:
    B = len(rule)
    return segments(range(B), start, length, [-1] * B, rule)


def retention_of(rule: list[tuple[int, int, int, float]]) -> BatchRetention:
    return BatchRetention.of([Retention(budget=C, recent=r, sinks=s, forgetting_factor=a) for C, r, s, a in rule])


def segments(
    row: Iterable[int], start: list[int], length: list[int], parent: list[int], rule: list[tuple[int, int, int, float]]
) -> Segments:
    columns = (torch.tensor(list(x), dtype=torch.int64) for x in (row, start, length, parent))
    places = dict(zip(("row", "start", "length", "parent"), columns, strict=True))
    return Segments(**retention_of(rule).retention(), **places)


def run(q: Tensor, k: Tensor, v: Tensor, s: Segments, state: EvictionState | None = None) -> Attended:
    return attend(q, k, v, s, Options(q.shape[-1] ** -0.5, True, True), state, backend="numba")


def oracle(q: Tensor, k: Tensor, v: Tensor, s: Segments, state: EvictionState | None = None) -> Attended:
    return reference(q.double(), k.double(), v.double(), s, Options(q.shape[-1] ** -0.5, True, True), state)


def check(q: Tensor, k: Tensor, v: Tensor, s: Segments, state: EvictionState | None = None) -> Attended:
    """The kernel agrees with the oracle; a case where a near tie of two scores decides is dropped."""
    got, want = run(q, k, v, s, state), oracle(q, k, v, s, state)
    assert got.evicted is not None
    assert want.evicted is not None
    assert got.state is not None
    assert want.state is not None
    differs = (got.evicted != want.evicted).nonzero()
    if len(differs):
        row, head, token = min(differs.tolist(), key=lambda at: at[2])
        assume(_gap(q, k, v, s, state, row, head, token, got, want) > NEAR)
    assert got.evicted.equal(want.evicted)
    assert got.state.positions.equal(want.state.positions)
    assert (got.state.scores - want.state.scores).abs().max() < TOLERANCE
    assert (got.output - want.output).abs().max() < TOLERANCE
    return got


def _gap(q, k, v, s, state, row: int, head: int, token: int, got: Attended, want: Attended) -> float:
    """How far apart the two victims' scores are at a step, by the oracle with nothing evicted there."""
    i = next(j for j in range(s.count) if s.row[j] == row and s.start[j] <= token < s.start[j] + s.length[j])
    assert int(s.parent[i]) < 0
    before = s.length.clone()
    before[i] = token - int(s.start[i])
    start = oracle(q, k, v, replace(s, length=before), state).state
    assert start is not None
    after = before * 0
    after[i] = 1
    alone = replace(s, start=s.start + before, length=after, budget=s.budget * 0 + UNLIMITED)
    end = oracle(q, k, v, alone, start).state
    assert end is not None
    scores = dict(zip(end.positions[i, head].tolist(), end.scores[i, head].tolist(), strict=True))
    victims = [int(x.evicted[row, head, token]) for x in (got, want) if x.evicted is not None]
    return abs(scores[victims[0]] - scores[victims[1]]) if min(victims) >= 0 else 1.0


@QUICK
@given(st.data())
def test_rows_equal_the_oracle(data: st.DataObject) -> None:
    q, k, v = data.draw(inputs())
    B, T = q.shape[0], q.shape[2]
    rule = [data.draw(rules()) for _ in range(B)]
    length = [data.draw(st.integers(0, T)) for _ in range(B)]
    got = check(q, k, v, rows_of(rule, [0] * B, length))
    for b, n in enumerate(length):
        assert (got.output[b, :, n:] == 0).all()


@QUICK
@given(st.data())
def test_chunks_equal_the_whole(data: st.DataObject) -> None:
    q, k, v = data.draw(inputs(rows=1))
    T, rule = q.shape[2], [data.draw(rules())]
    cuts = sorted({0, T, *data.draw(st.lists(st.integers(0, T), max_size=4))})
    state, out = None, []
    for a, b in pairwise(cuts):
        s = rows_of(rule, [a], [b - a])
        part = check(q, k, v, s, state)
        state = part.state
        out.append(part.output[:, :, a:b])
    at_once = check(q, k, v, rows_of(rule, [0], [T]))
    assert at_once.state is not None
    assert state is not None
    assume(state.positions.equal(at_once.state.positions))  # both agree with the oracle where rounding does not decide
    assert (torch.cat(out, dim=2) - at_once.output).abs().max() < TOLERANCE


@QUICK
@given(st.data())
def test_rows_do_not_see_each_other(data: st.DataObject) -> None:
    """A row alone gives the same bits as in a batch with other lengths, budgets and policies."""
    q, k, v = data.draw(inputs(rows=3))
    T = q.shape[2]
    rule = [data.draw(rules()) for _ in range(3)]
    length = [data.draw(st.integers(0, T)) for _ in range(3)]
    together = run(q, k, v, rows_of(rule, [0] * 3, length))
    for b in range(3):
        alone = run(q[b : b + 1], k[b : b + 1], v[b : b + 1], rows_of(rule[b : b + 1], [0], length[b : b + 1]))
        assert alone.output[0].equal(together.output[b])
        assert alone.evicted is not None
        assert together.evicted is not None
        assert alone.evicted[0].equal(together.evicted[b])


@QUICK
@given(st.data())
def test_later_tokens_do_not_matter(data: st.DataObject) -> None:
    q, k, v = data.draw(inputs(rows=1))
    T, rule = q.shape[2], [data.draw(rules())]
    cut = data.draw(st.integers(0, T - 1))
    changed = [x.clone() for x in (q, k, v)]
    bad = data.draw(st.sampled_from([1e4, float("nan"), float("inf")]))
    for x in changed:
        x[:, :, cut + 1 :] = bad
    s = rows_of(rule, [0], [T])
    first, second = run(q, k, v, s), run(*changed, s)
    assert first.evicted is not None
    assert second.evicted is not None
    differs = (first.evicted != second.evicted)[:, :, : cut + 1].nonzero()
    if len(differs):
        row, head, token = min(differs.tolist(), key=lambda at: at[2])
        assume(_gap(q, k, v, s, None, row, head, token, first, second) > NEAR)
    assert not len(differs)
    assert (first.output[:, :, : cut + 1] - second.output[:, :, : cut + 1]).abs().max() < TOLERANCE


@QUICK
@given(st.data())
def test_a_tree_equals_its_paths(data: st.DataObject) -> None:
    """Forking after a shared beginning gives what each sequence gives from scratch."""
    q, k, v = data.draw(inputs(rows=1, tokens=80))
    rule = data.draw(rules())
    length, parent = [data.draw(st.integers(0, 30))], [-1]
    for i in range(1, data.draw(st.integers(1, 5))):
        parent.append(data.draw(st.integers(-1, i - 1)))
        length.append(data.draw(st.integers(0, 10)))
    start = [sum(length[:i]) for i in range(len(length))]
    n = len(length)
    s = segments([0] * n, start, length, parent, [rule] * n)
    tree = run(q, k, v, s)
    for i in range(n):
        path = [i]
        while parent[path[0]] >= 0:
            path.insert(0, parent[path[0]])
        pick = torch.cat([torch.arange(start[j], start[j] + length[j]) for j in path])
        if not len(pick):
            continue
        alone = run(q[:, :, pick], k[:, :, pick], v[:, :, pick], rows_of([rule], [0], [len(pick)]))
        assert tree.state is not None
        assert alone.state is not None
        positions = tree.state.pad(alone.state.positions.shape[-1]).positions[i]
        want = alone.state.pad(positions.shape[-1]).positions[0]
        if not positions.equal(want):  # a near tie, if the oracle does not agree with both
            check(q[:, :, pick], k[:, :, pick], v[:, :, pick], rows_of([rule], [0], [len(pick)]))
            assume(False)
        assert (tree.output[:, :, pick] - alone.output).abs().max() < TOLERANCE


@QUICK
@given(st.data())
def test_nothing_bad_is_hidden(data: st.DataObject) -> None:
    """NaN and infinity in a key or value that a token attends to reach its output."""
    q, k, v = data.draw(inputs(rows=1))
    T, H, K = q.shape[2], q.shape[1], k.shape[1]
    at, head = data.draw(st.integers(0, T - 1)), data.draw(st.integers(0, K - 1))
    bad = data.draw(st.sampled_from([float("nan"), float("inf")]))
    where = data.draw(st.sampled_from(["query", "key", "value"]))
    q, k, v = q.clone(), k.clone(), v.clone()
    heads = torch.arange(H // K) + head * (H // K)
    if where == "query":
        q[0, heads, at] = float("nan")
    else:
        {"key": k, "value": v}[where][0, head, at] = float("nan") if where == "key" else bad
    out = run(q, k, v, rows_of([data.draw(rules())], [0], [T])).output[0]
    assert not out[heads, at].isfinite().any()
    others = [h for h in range(H) if h not in heads.tolist()]
    assert out[others].isfinite().all()
    assert out[:, :at].isfinite().all()


@QUICK
@given(st.data())
def test_nothing_bad_outlives_its_token(data: st.DataObject) -> None:
    q, k, v = data.draw(inputs(rows=1))
    T, budget = q.shape[2], data.draw(st.integers(1, 20))
    at = data.draw(st.integers(0, T - 1))
    v = v.clone()
    v[0, :, at] = float("nan")
    out = run(q, k, v, rows_of([(budget, budget, 0, 1.0)], [0], [T])).output
    assert out[:, :, at : at + budget + 1].isnan().all()
    assert out[:, :, at + budget + 1 :].isfinite().all()


@QUICK
@given(st.data())
def test_half_precision_is_only_rounded_at_the_ends(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    q, k, v = (x.to(dtype) for x in data.draw(inputs(rows=1)))
    s = rows_of([data.draw(rules())], [0], [q.shape[2]])
    half, single = run(q, k, v, s), run(q.float(), k.float(), v.float(), s)
    assert half.output.dtype == dtype
    assert half.output.equal(single.output.to(dtype))
    check(q.float(), k.float(), v.float(), s)


@QUICK
@given(st.data())
def test_token_by_token_equals_the_whole(data: st.DataObject) -> None:
    q, k, v = data.draw(inputs(rows=2))
    (B, H, T, D), K, V = q.shape, k.shape[1], v.shape[-1]
    rule = [data.draw(rules()) for _ in range(B)]
    cache, out, t = SlotCache(B, K, H // K, min(max(C for C, *_ in rule), T), D, V), [], 0
    while t < T:
        n = data.draw(st.integers(1, 5))
        part = (x[:, :, t : t + n] for x in (q, k, v))
        out.append(cache.attend(*part, retention_of(rule)))
        t += n
    at_once = check(q, k, v, rows_of(rule, [0] * B, [T] * B))
    state = cache.state()
    assert at_once.state is not None
    assume(state.positions.equal(at_once.state.positions))
    assert (torch.cat(out, dim=2) - at_once.output).abs().max() < TOLERANCE
    assert (state.scores - at_once.state.scores).abs().max() < TOLERANCE


@QUICK
@given(st.data())
def test_the_budget_holds_and_the_protected_stay(data: st.DataObject) -> None:
    q, k, v = data.draw(inputs())
    B, T = q.shape[0], q.shape[2]
    rule = [data.draw(rules()) for _ in range(B)]
    length = [data.draw(st.integers(0, T)) for _ in range(B)]
    state = run(q, k, v, rows_of(rule, [0] * B, length)).state
    assert state is not None
    for b, ((budget, recent, sinks, _), n) in enumerate(zip(rule, length, strict=True)):
        for positions in state.positions[b].tolist():
            kept = [p for p in positions if p >= 0]
            assert positions == kept + [-1] * (len(positions) - len(kept))
            assert kept == sorted(set(kept))
            assert len(kept) == min(budget, n)
            assert set(kept) >= set(range(min(sinks, n))) | set(range(max(0, n - recent), n))
