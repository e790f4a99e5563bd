"""The scan that is written to be read (`a2sf.bench.scan`) retains the same tokens as the CPU's kernel and the reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from a2sf import Policy, Rule, Schedule, make_policy
from a2sf.bench.scan import speed
from a2sf.bench.scan.columns import Columns, attend_in_chunks
from a2sf.engine import kernels
from a2sf.engine.eviction import reference
from a2sf.engine.kernels.registry import Numba
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Attended, EvictionState, Options, Segments
from tests.policies import instances, label

RULES = {p.keeps(9).rule: p for p in reversed(instances()) if kernels.knows(p.keeps(9).rule)}
CASES = [(p, n) for p in RULES.values() for n in (0, 3) if not n or "every" in p.schedules]
PLAIN = RULES[Rule()]
OPTIONS = Options(scale=0.25, return_state=True, trace=True)
POLICY_VECTORS = sorted((Path(__file__).parents[1] / "vectors" / "policies").glob("*.npz"))


def tensors(rows: int, tokens: int, heads: int = 3, group: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(rows + tokens)
    shapes = ((heads * group, 16), (heads, 16), (heads, 20))
    return [torch.randn(rows, tokens, n, s, generator=g).transpose(1, 2) * (1 + (n > heads)) for n, s in shapes]


def rows_of(policy: Policy, budgets: list[int], length: list[int], spare: int = 0) -> Segments:
    schedule = Schedule("every", every=spare + 1) if spare else Schedule()
    retention = BatchRetention.of([policy.keeps(b) for b in budgets], schedule)
    return Segments.of_rows(retention, torch.tensor(length))


def assert_same(got: Attended, want: Attended) -> None:
    assert got.evicted.equal(want.evicted)
    assert sorted(got.cuts.tolist()) == sorted(want.cuts.tolist())
    assert_same_end(got, want)


def assert_same_end(got: Attended, want: Attended) -> None:
    assert (got.output - want.output).abs().max() < 2e-5
    assert got.state.positions.equal(want.state.positions)
    assert got.state.seen.equal(want.state.seen)
    for name in ("scores", "keys", "values"):
        torch.testing.assert_close(getattr(got.state, name), getattr(want.state, name).float(), atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize(("policy", "spare"), CASES, ids=label)
def test_rules(policy, spare):
    qkv, s = tensors(3, 100), rows_of(policy, [20, 31, 9], [100, 67, 3], spare)
    got = attend_in_chunks(*qkv, s, OPTIONS)
    assert_same(got, reference(*(x.double() for x in qkv), s, OPTIONS))
    assert_same(got, kernels.attend(*qkv, s, OPTIONS, backend="numba"))
    # rows as they are, which a trace packs
    assert_same_end(attend_in_chunks(*qkv, s, replace(OPTIONS, trace=False)), got)


@pytest.mark.parametrize("policy", RULES.values(), ids=label)
def test_a_context_and_its_choices_that_continue_a_state(policy):
    qkv = tensors(2, 90)
    before = rows_of(policy, [12, 12], [40, 25])
    first, exact = (f(*qkv, before, OPTIONS) for f in (attend_in_chunks, reference))
    tree = replace(
        before.select(torch.tensor([0, 1, 0, 0])),
        row=torch.tensor([0, 1, 0, 0]),
        start=torch.tensor([40, 25, 55, 60]),
        length=torch.tensor([15, 65, 5, 30]),
        parent=torch.tensor([-1, -1, 0, 0]),
    )
    assert_same(attend_in_chunks(*qkv, tree, OPTIONS, first.state), reference(*qkv, tree, OPTIONS, exact.state))


@pytest.mark.parametrize("path", POLICY_VECTORS, ids=lambda p: p.stem)
def test_vectors(path):
    case = np.load(path)
    policy = make_policy(str(case["policy"]), **json.loads(str(case["settings"])))
    schedule, budgets = Schedule(**json.loads(str(case["schedule"]))), case["budget"].tolist()
    if schedule.prompt or not kernels.knows(policy.keeps(9).rule):
        pytest.skip("the kernel does not run it step by step either")
    qkv = [torch.from_numpy(case[n]) for n in ("query", "key", "value")]
    s = rows_of(policy, budgets, case["lengths"].tolist(), schedule.spare)
    got = attend_in_chunks(*qkv, s, replace(OPTIONS, scale=qkv[0].shape[-1] ** -0.5))
    for b, n in enumerate(case["lengths"].tolist()):
        np.testing.assert_allclose(got.output[b, :, :n], case["output"][b, :, :n], atol=2e-6, rtol=2e-6)
        for h in range(qkv[1].shape[1]):
            kept = [p for p in got.state.positions[b, h].tolist() if p >= 0]
            assert kept == sorted(p for p in case["kept_final"][b, h].tolist() if p >= 0)


def test_some_vectors_are_of_such_rules():
    policies = {str(np.load(p)["policy"]) for p in POLICY_VECTORS}
    assert {"mean_attention", "tova", "vatp", "key_norm", "h2o", "a2sf"} <= policies


def test_token_by_token():
    """As while decoding: columns that died stay until there is no more room."""
    qkv, s = tensors(2, 120), rows_of(PLAIN, [30, 17], [120, 120])
    start = EvictionState.empty(qkv[1], qkv[2])
    columns = Columns(BatchRetention(**s.retention()), start, 40, OPTIONS.scale)
    output = torch.cat([columns.read(*(x[:, :, t : t + 1] for x in qkv)) for t in range(120)], 2)
    assert_same_end(Attended(output, columns.state()), reference(*(x.double() for x in qkv), s, OPTIONS))


def test_almost_all_attention_went_to_tokens_that_are_evicted():
    q, k, v = tensors(1, 60, group=1)
    q[:] = q.abs() * 8
    k[:, :, 5] = 9.0  # far above all others, evicted soon because only the newest are retained
    s = rows_of(make_policy("window"), [8], [60])
    assert_same(attend_in_chunks(q, k, v, s, OPTIONS), reference(q.double(), k.double(), v.double(), s, OPTIONS))


def test_equal_priorities_evict_the_oldest():
    q, k, v = tensors(1, 50)
    q[:], k[:] = 0, 0
    s = rows_of(PLAIN, [9], [50])
    assert_same(attend_in_chunks(q, k, v, s, OPTIONS), kernels.attend(q, k, v, s, OPTIONS, backend="numba"))


def test_it_retains_the_same_among_many_random_tokens():
    """How many of all evictions rounding decides otherwise than in the kernel: none here."""
    qkv, s = tensors(4, 1024), rows_of(PLAIN, [204, 100, 50, 20], [1024] * 4)
    got, want = attend_in_chunks(*qkv, s, OPTIONS), kernels.attend(*qkv, s, OPTIONS, backend="numba")
    assert int((got.evicted != want.evicted).sum()) == 0


def test_a_sweep_is_timed_with_both(monkeypatch):
    """Both compute each call; the cell continues with the kernel's result."""
    qkv, s = tensors(2, 30), rows_of(PLAIN, [9, 9], [30, 20])
    want, given = kernels.attend(*qkv, s, OPTIONS), []
    monkeypatch.setattr(speed.groups, "run", lambda *_, **__: given.append(kernels.attend(*qkv, s, OPTIONS)))
    before = Numba.attend
    found = speed.in_a_sweep(None, documents=1)
    assert Numba.attend is before
    assert all(a.output.equal(want.output) for a in given)
    assert len(given) == 2  # one to warm up, which does not count
    assert (found["tokens"], found["other"]) == (50, 0)
    assert min(found["kernel"], found["scan"], found["sweep"]) > 0


def test_decoding_is_timed():
    assert set(speed.decoding(20, 1)) == {"kernel", "scan"}
