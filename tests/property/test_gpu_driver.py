"""Laws of the recursion on a GPU's driver, with its launches in plain torch (`PlainSteps`): chunks, groups, states, trees.

The launches themselves are checked in Triton's interpreter (tests/parity/test_triton_kernel.py), which is slow.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from a2sf import Schedule
from a2sf.engine.eviction import Attended, EvictionState, Options, Segments, reference
from a2sf.engine.kernels.gpu import driver, plan, run
from a2sf.engine.kernels.gpu.run import attend_triton
from a2sf.policies.rule import Rule
from tests.plain_steps import PlainSteps
from tests.property.test_kernels import inputs, rows_of, segments
from tests.property.test_kernels import rules as numbers
from tests.tiers import examples

QUICK = settings(
    max_examples=examples(30),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
PARTS = [
    Rule(),
    Rule(mean_over_age=True),
    Rule(count_above_uniform=True),
    Rule(shared=True, weight=lambda k, v, p: v.abs().sum(-1)),
    Rule(scored=False, bias=lambda k, v, p: -k.norm(dim=-1)),
]


@pytest.fixture(autouse=True)
def in_plain_torch(monkeypatch):
    """Small chunks, many launches; no Triton is needed."""
    monkeypatch.setattr(run, "Launches", PlainSteps)
    monkeypatch.setattr(run, "available", lambda device=None: True)
    monkeypatch.setattr(run, "interpreted", lambda: True)
    monkeypatch.setattr(plan, "COLUMNS", (4, 8, 16, 32, 64, 128))
    monkeypatch.setattr(plan, "ROOM", 2)
    monkeypatch.setattr(plan, "SCRATCH", 2**13)  # few tokens, and few rows, at a time
    monkeypatch.setattr(driver, "LONG", 20)


def both(q: Tensor, k: Tensor, v: Tensor, s: Segments, state: EvictionState | None = None) -> Attended:
    """The driver's result, which is the reference's."""
    options = Options(q.shape[-1] ** -0.5, True, True)
    got, want = (
        attend_triton(q, k, v, s, options, state),
        reference(q.double(), k.double(), v.double(), s, options, state),
    )
    assert got.evicted.equal(want.evicted)
    assert sorted(got.cuts.tolist()) == sorted(want.cuts.tolist())
    assert got.state.positions.equal(want.state.positions)
    assert got.state.seen.equal(want.state.seen)
    for name in ("scores", "keys", "values"):
        torch.testing.assert_close(getattr(got.state, name), getattr(want.state, name).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.output, want.output.to(q.dtype), rtol=1e-4, atol=1e-4)
    return got


def of_rule(data: st.DataObject, s: Segments) -> Segments:
    """`s` with a rule and a schedule."""
    schedule = Schedule("every", every=data.draw(st.integers(1, 9))) if data.draw(st.booleans()) else Schedule()
    s = replace(s, rule=data.draw(st.sampled_from(PARTS)), schedule=schedule)
    if s.rule.count_above_uniform:
        # sums of powers of other factors differ in float64, and are equal in float32 after two dozen bits
        s = replace(s, forgetting_factor=s.forgetting_factor.round())
    return s


@QUICK
@given(st.data())
def test_rows_equal_the_reference(data: st.DataObject) -> None:
    q, k, v = data.draw(inputs())
    B, T = q.shape[0], q.shape[2]
    length = [data.draw(st.integers(0, T)) for _ in range(B)]
    both(q, k, v, of_rule(data, rows_of([data.draw(numbers()) for _ in range(B)], [0] * B, length)))


@QUICK
@given(st.data())
def test_chunks_continue_from_states(data: st.DataObject) -> None:
    q, k, v = data.draw(inputs(rows=2))
    T, state = q.shape[2], None
    undivided = of_rule(data, rows_of([data.draw(numbers()) for _ in range(2)], [0] * 2, [T] * 2))
    for a, b in pairwise(sorted({0, T, *data.draw(st.lists(st.integers(0, T), max_size=3))})):
        part = replace(undivided, start=undivided.start + a, length=undivided.length * 0 + b - a)
        state = both(q, k, v, part, state).state


@QUICK
@given(st.data())
def test_a_tree_equals_the_reference(data: st.DataObject) -> None:
    q, k, v = data.draw(inputs(rows=1, tokens=70))
    length, parent = [data.draw(st.integers(0, 30))], [-1]
    for i in range(1, data.draw(st.integers(1, 4))):
        parent.append(data.draw(st.integers(-1, i - 1)))
        length.append(data.draw(st.integers(0, 12)))
    start = [sum(length[:i]) for i in range(len(length))]
    n = len(length)
    both(q, k, v, of_rule(data, segments([0] * n, start, length, parent, [data.draw(numbers())] * n)))


@QUICK
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 30), st.integers(0, 9))
def test_the_number_of_cached_tokens_is_known(held: int, tokens: int, budget: int, spare: int) -> None:
    count = held
    for _ in range(tokens):
        count = budget if count + 1 > budget + spare else count + 1
    assert plan.after(held, tokens, budget, spare) == count
    N = plan.columns(held, tokens, budget, spare)
    if N is not None:
        chunks, end = plan.chunks([held], tokens, budget, spare, N, most=7)
        assert end == [count]
        assert [c.done for c in chunks] == [sum(c.tokens for c in chunks[:i]) for i in range(len(chunks))]
        assert sum(c.tokens for c in chunks) == tokens
        assert all(0 < c.tokens <= min(7, N - c.held) for c in chunks)


def test_a_chunk_is_four_launches_and_nobody_waits(monkeypatch):
    """From the first launch to the last the CPU reads no tensor: with Triton's launches it never waits for the GPU."""
    made = []

    class Counted(PlainSteps):
        def __init__(self, batch) -> None:
            super().__init__(batch)
            made.append(self)

        def __getattribute__(self, name):
            found = super().__getattribute__(name)
            return _allowed(found) if name in ("shares", "scan", "attend", "keep", "received") else found

    waits = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "cpu", "numpy")
    really = {name: getattr(Tensor, name) for name in waits}

    def _allowed(launch):
        def inside(*args, **how):
            with pytest.MonkeyPatch.context() as patch:
                for name, method in really.items():
                    patch.setattr(Tensor, name, method)
                return launch(*args, **how)

        return inside

    def waiting(*args, **how):
        raise AssertionError("the CPU waits for the GPU")

    monkeypatch.setattr(run, "Launches", Counted)
    q, k, v = (torch.randn(3, h, 40, 8, dtype=torch.bfloat16) for h in (4, 2, 2))
    s = rows_of([(9, 3, 1, 0.5), (12, 0, 0, 1.0), (60, 0, 0, 1.0)], [0] * 3, [40, 33, 40])
    evict, read = driver.evict, driver.read

    def checked(of):
        def inside(*args, **how):
            with pytest.MonkeyPatch.context() as patch:
                for name in waits:
                    patch.setattr(Tensor, name, waiting)
                return of(*args, **how)

        return inside

    monkeypatch.setattr(driver, "evict", checked(evict))
    monkeypatch.setattr(driver, "read", checked(read))
    attend_triton(q, k, v, s, Options(8**-0.5))
    launched = made[0].launched
    assert made[0].batch.key.dtype == torch.bfloat16  # no copies in float32
    chunks = launched.count("scan")
    assert chunks > 3
    assert {name: launched.count(name) for name in ("shares", "attend")} == dict.fromkeys(("shares", "attend"), chunks)
    assert launched.count("keep") < chunks  # the last state was not requested
    assert "received" not in launched


def test_who_is_read_alone_follows_from_the_row(monkeypatch):
    alone, sdpa = [], driver._sdpa
    monkeypatch.setattr(
        driver, "_sdpa", lambda batch, group, scale: alone.append(group.members) or sdpa(batch, group, scale)
    )
    q, k, v = (torch.randn(3, h, 30, 8) for h in (4, 2, 2))
    everything = [(2**31 - 1, 0, 0, 1.0)] * 3
    before = both(q, k, v, replace(rows_of(everything, [0] * 3, [0, 3, 0]), rule=Rule(scored=False))).state
    # one is long and begins, one continues a state, one is short
    both(q, k, v, replace(rows_of(everything, [0, 3, 0], [30, 25, 9]), rule=Rule(scored=False)), before)
    assert alone == [[0]]


@pytest.mark.parametrize("given", [False, True])
def test_tables_go_to_the_gpu_once_for_all_layers(monkeypatch, given):
    """A second layer copies nothing from the CPU; after a given state, which tables depend on, each layer copies its own."""
    copies, to = [], Tensor.to

    def counting(self, *args, **how):
        if "non_blocking" in how:
            copies.append(self.shape)
        return to(self, *args, **how)

    monkeypatch.setattr(Tensor, "to", counting)
    s = segments([0, 0, 1], [0, 40, 0], [40, 9, 30], [-1, 0, -1], [(9, 3, 1, 0.5), (9, 3, 1, 0.5), (60, 0, 0, 1.0)])
    torch.manual_seed(0)  # others have scores that are equal in float32 and not in the reference's float64
    layers = [[torch.randn(2, h, 49, 8) for h in (4, 2, 2)] for _ in range(2)]
    before = None
    if given:
        before = reference(*layers[0], rows_of([(9, 3, 1, 0.5)] * 2, [0] * 2, [12, 3]), Options(1, True)).state
    found = []
    for q, k, v in layers:
        done = len(copies)
        both(q, k, v, s, before)
        found.append(len(copies) - done)
    assert found[0] >= 8
    assert found[1] == 0 if not given else found[1] > 0
