"""The Triton kernels against the reference, in Triton's interpreter (test_triton_compiled.py: as compiled).

Whether Triton interprets is decided when it is first imported, and torch may have imported it in this process already.
So the interpreter lives in a worker process of its own. On a machine with a GPU the same tests also run there.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from a2sf import Budget, Policy, Schedule, make_policy
from a2sf.engine import kernels
from a2sf.engine.eviction import Attended, EvictionState, Options, Segments, reference
from a2sf.engine.invariants import schedules
from a2sf.engine.kernels.gpu import plan
from a2sf.engine.kernels.gpu import run as triton_kernel
from a2sf.engine.retention import BatchRetention
from a2sf.engine.stepwise import torch_rows
from a2sf.engine.tree import PaddedRows, RowResults
from a2sf.errors import ConfigError, Notice, UserError
from a2sf.hf.settings import retention_of
from a2sf.policies.rule import Rule
from tests.own_policies import AboveUniform
from tests.policies import instances, label

VECTORS = sorted((Path(__file__).parents[1] / "vectors").glob("*.npz"))
UNLIMITED = 2**31 - 1
OPTIONS = Options(scale=0.5, return_state=True, trace=True)
NO_TRITON = "Triton is not installed (extra gpu)"

# one row each: budget, recent, sinks, forgetting factor, length
POLICIES = {
    "full": (UNLIMITED, 0, 0, 1.0, 12),
    "window": (4, 4, 0, 0.5, 12),
    "streaming": (5, 3, 2, 1.0, 11),
    "h2o": (6, 3, 0, 1.0, 12),
    "a2sf": (5, 0, 0, 0.3, 9),
    "last query only": (3, 0, 1, 0.0, 12),
    "one slot": (1, 0, 0, 0.9, 5),
    "empty": (4, 1, 0, 0.5, 0),
}

# one policy for each rule: those that the kernel runs itself, those that it runs in parts (one of each kind), and one
# that it does not run
RULES = {p.keeps(9).rule: p for p in reversed(instances()) if p.causal}
KNOWN = [p for rule, p in RULES.items() if kernels.knows(rule)]
BY_SCORES = RULES[Rule()]
PARTS = {
    (r.full_heads, r.cut and r.cut.floor, r.count_above_uniform): p
    for r, p in RULES.items()
    if r.priority_fn is None and not kernels.knows(r)
}
IN_PARTS = [
    (p, s)
    for p in (BY_SCORES, AboveUniform(), *PARTS.values())
    for s in schedules(p)
    if s.prompt or "prompt" not in p.schedules
]
EVERY = Schedule("every", every=4)
OWN = next(p for rule, p in RULES.items() if rule.priority_fn is not None)


def by_name(*args) -> tuple[Attended, set[str]]:
    """What Triton gives where it is requested by its name, and what ran."""
    with kernels.backends_run() as ran:
        return kernels.attend(*args, backend="triton"), ran


def in_small_chunks(*args) -> Attended:
    """`attend_triton` with as many chunks as can be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "COLUMNS", (16, 32, 64, 128))
        patch.setattr(plan, "ROOM", 4)
        patch.setattr(plan, "most_tokens", lambda N, heads: 7)
        return triton_kernel.attend_triton(*args)


@pytest.fixture(scope="module", params=["interpreter"] + ["cuda"] * torch.cuda.is_available())
def attend(request):
    """`attend_triton`, or another function `by`, with everything on the CPU for the caller."""
    pytest.importorskip("triton", reason=NO_TRITON)
    if request.param == "cuda":
        yield lambda *args, by=triton_kernel.attend_triton: _to("cpu", by(*(_to("cuda", a) for a in args)))
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as worker:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            worker.submit(os.getpid).result()  # the worker has started, with this environment
        yield lambda *args, by=triton_kernel.attend_triton: worker.submit(by, *args).result()


def _to(device: str, x):
    """`x` with its tensors on `device`; segments stay on the CPU by contract."""
    if isinstance(x, tuple):
        return tuple(_to(device, part) for part in x)
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Attended | EvictionState):
        return replace(x, **{name: _to(device, part) for name, part in vars(x).items()})
    return x


def rows(*policies: tuple[int, int, int, float, int]) -> Segments:
    budget, recent, sinks, factor, length = (torch.tensor(column) for column in zip(*policies, strict=True))
    retention = BatchRetention(budget=budget, recent=recent, sinks=sinks, forgetting_factor=factor.double())
    return Segments.of_rows(retention, length)


def tokens(seed: int, B: int, K: int, G: int, T: int, D: int, V: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key and value; as a model gives them, with time before heads in memory."""
    random = torch.Generator().manual_seed(seed)
    shapes = (B, T, K * G, D), (B, T, K, D), (B, T, K, V)
    return tuple(torch.randn(s, generator=random).to(dtype).transpose(1, 2) for s in shapes)


def assert_same(got: Attended, want: Attended, tolerance: float) -> None:
    def close(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

    close(got.output, want.output)
    assert (got.evicted is None) == (want.evicted is None)
    if want.evicted is not None:
        assert got.evicted.equal(want.evicted)
        assert sorted(got.cuts.tolist()) == sorted(want.cuts.tolist())
    assert (got.state is None) == (want.state is None)
    if want.state is not None:
        assert got.state.positions.equal(want.state.positions)
        assert got.state.seen.equal(want.state.seen)
        close(got.state.scores, want.state.scores)
        close(got.state.keys, want.state.keys)
        close(got.state.values, want.state.values)


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_vectors(attend, path):
    case = {name: torch.from_numpy(x) for name, x in np.load(path).items()}
    query, key, value = case["query"], case["key"], case["value"]
    columns = (case[name].tolist() for name in ("budget", "recent", "sinks"))
    factor = [case["decay"].item()] * len(query)
    segments = rows(*zip(*columns, factor, case["lengths"].tolist(), strict=True))
    got = attend(query, key, value, segments, Options(scale=query.shape[-1] ** -0.5, return_state=True))
    torch.testing.assert_close(got.output, case["output"], rtol=1e-5, atol=1e-5)
    kept = got.state.pad(case["kept_final"].shape[-1]).positions
    for row in range(len(query)):
        for head in range(key.shape[1]):
            want = [p for p in case["kept_final"][row, head].tolist() if p >= 0]
            assert [p for p in kept[row, head].tolist() if p >= 0] == sorted(want)
    assert got.evicted is None


@pytest.mark.parametrize(
    ("K", "G", "D", "V", "dtype", "tolerance"),
    [
        pytest.param(2, 1, 8, 8, torch.float32, 1e-5, id="mha"),
        pytest.param(2, 3, 5, 7, torch.float32, 1e-5, id="gqa, sizes that are no power of two"),
        pytest.param(1, 4, 8, 3, torch.float32, 1e-5, id="mqa"),
        pytest.param(1, 2, 4, 4, torch.bfloat16, 1e-2, id="bfloat16"),
        pytest.param(1, 2, 4, 4, torch.float16, 2e-3, id="float16"),
    ],
)
def test_policies_in_one_batch(attend, K, G, D, V, dtype, tolerance):
    args = (*tokens(1, len(POLICIES), K, G, 12, D, V, dtype), rows(*POLICIES.values()), OPTIONS)
    assert_same(attend(*args), reference(*args), tolerance)


def test_caches_wider_than_a_tile(attend):
    K, G, T, D = 1, 3, 70, 4
    args = (*tokens(2, 2, K, G, T, D, D, torch.float32), rows((UNLIMITED, 0, 0, 0.9, T), (66, 5, 1, 0.3, T)), OPTIONS)
    assert_same(attend(*args, by=in_small_chunks), reference(*args), 1e-5)


@pytest.mark.parametrize("budget", [31, 32, 63, 64, 128])
def test_budgets_at_the_edge_of_a_tile(attend, budget):
    T = budget + 3
    args = (*tokens(20, 1, 1, 2, T, 4, 4, torch.float32), rows((budget, 0, 0, 0.5, T)), OPTIONS)
    assert_same(attend(*args), reference(*args), 1e-5)


@pytest.mark.parametrize("G", [16, 40, 71])
def test_many_query_heads(attend, G):
    args = (*tokens(21, 1, 1, G, 9, 4, 4, torch.float32), rows((4, 0, 0, 0.5, 9)), OPTIONS)
    assert_same(attend(*args), reference(*args), 1e-5)


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_of_equal_scores_the_oldest_is_evicted(attend, factor):
    query, key, value = tokens(3, 2, 1, 2, 10, 4, 4, torch.float32)
    args = (torch.zeros_like(query), key, value, rows((4, 0, 0, factor, 10), (4, 1, 1, factor, 10)), OPTIONS)
    assert_same(attend(*args), reference(*args), 1e-5)


@pytest.mark.parametrize("budget", [4, 66], ids=["one tile", "three tiles"])
def test_of_all_equal_scores_the_oldest_is_evicted(attend, budget):
    # vacated slots are refilled, so that age and place in the buffer part ways; nothing is left to rounding
    T = budget + 6
    query, key, value = tokens(10, 1, 1, 2, T, 4, 4, torch.float32)
    args = (torch.zeros_like(query), key, value, rows((budget, 0, 0, 0.0, T)), OPTIONS)
    got = attend(*args, by=in_small_chunks)
    assert got.evicted[0, 0].tolist() == [-1] * budget + list(range(6))


def test_chunks_equal_the_whole(attend):
    policies = list(POLICIES.values())
    query, key, value = tokens(4, len(policies), 1, 2, 12, 4, 5, torch.float32)
    want = reference(query, key, value, rows(*policies), OPTIONS)
    state, outputs, traces = None, [], []
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        chunk = rows(*((*p[:4], min(max(p[4] - begin, 0), end - begin)) for p in policies))
        got = attend(*(x[:, :, begin:end] for x in (query, key, value)), chunk, OPTIONS, state)
        state = got.state
        outputs.append(got.output)
        traces.append(got.evicted)
    at_once = Attended(torch.cat(outputs, 2), state, torch.cat(traces, 2), want.cuts)
    assert not len(want.cuts)
    assert_same(at_once, want, 1e-5)


def test_a_tree_of_segments(attend):
    # a shared beginning, two continuations packed behind it in another row and column, and a grandchild
    segments = Segments(
        row=torch.tensor([0, 0, 1, 1]),
        start=torch.tensor([0, 6, 2, 7]),
        length=torch.tensor([6, 4, 5, 3]),
        parent=torch.tensor([-1, 0, 0, 2]),
        budget=torch.tensor([4, 4, 4, 4]),
        recent=torch.tensor([1, 1, 1, 1]),
        sinks=torch.tensor([1, 1, 1, 1]),
        forgetting_factor=torch.full((4,), 0.4).double(),
    )
    args = (*tokens(5, 2, 2, 2, 10, 4, 4, torch.float32), segments, OPTIONS)
    assert_same(attend(*args), reference(*args), 1e-5)


@pytest.mark.parametrize("schedule", [Schedule(), EVERY, Schedule("prompt", then="step")], ids=label)
def test_a_budget_that_grows(attend, schedule):
    stated = [
        retention_of(make_policy("a2sf", recent_share=share, sinks=1), Budget(ratio=r, base="seen"), T, 5, 1, schedule)[
            0
        ]
        for T, r, share in ((20, 0.3, 0.4), (13, 0.9, 0.0))
    ]
    segments = Segments.of_rows(BatchRetention.of(stated, schedule, [5, 5]), torch.tensor([20, 13]))
    vectors = tokens(5, 2, 2, 2, 20, 4, 5, torch.float32)
    got, ran = attend(*vectors, segments, OPTIONS, by=by_name)
    assert ran == {"triton"}
    assert_same(got, reference(*vectors, segments, OPTIONS), 1e-5)


def test_a_forest_of_two_tiles_without_end_states(attend):
    segments = replace(
        rows((20, 0, 0, 0.5, 18), (20, 0, 0, 0.5, 9), (4, 0, 0, 0.5, 7), (70, 0, 0, 0.5, 30), (70, 1, 0, 0.5, 5)),
        row=torch.tensor([0, 0, 0, 1, 1]),
        start=torch.tensor([0, 18, 27, 0, 30]),
        parent=torch.tensor([-1, 0, -1, -1, 3]),
    )
    args = (*tokens(22, 2, 1, 2, 35, 4, 4, torch.float32), segments, Options(scale=0.5))
    assert_same(attend(*args), reference(*args), 1e-5)


def test_a_state_above_the_budget_is_cut_to_it(attend):
    query, key, value = tokens(6, 1, 1, 2, 10, 4, 4, torch.float32)
    head, tail = ([x[:, :, part] for x in (query, key, value)] for part in (slice(0, 6), slice(6, 10)))
    state = reference(*head, rows((UNLIMITED, 0, 0, 0.5, 6)), OPTIONS).state
    args = (*tail, rows((3, 1, 0, 0.5, 4)), OPTIONS, state)
    assert_same(attend(*args), reference(*args), 1e-5)


def test_a_row_does_not_depend_on_its_batch(attend):
    query, key, value = tokens(7, 2, 1, 2, 12, 4, 4, torch.float32)
    alone = attend(query[:1], key[:1], value[:1], rows(POLICIES["a2sf"]), OPTIONS)
    beside = attend(query, key, value, rows(POLICIES["a2sf"], POLICIES["full"]), OPTIONS)
    assert beside.output[:1].equal(alone.output)  # to the last bit
    assert beside.evicted[:1].equal(alone.evicted)
    # beside a row that begins above its budget
    before = reference(query, key, value, rows((UNLIMITED, 0, 0, 0.3, 9), (UNLIMITED, 0, 0, 0.3, 9)), OPTIONS).state
    one = attend(query[:1], key[:1], value[:1], rows((12, 0, 0, 0.3, 12)), OPTIONS, before.select(torch.tensor([0])))
    two = attend(query, key, value, rows((12, 0, 0, 0.3, 12), (5, 0, 0, 0.3, 12)), OPTIONS, before)
    assert two.output[:1].equal(one.output)
    assert two.evicted[:1].equal(one.evicted)


def test_state_and_trace_only_on_request(attend):
    args = (*tokens(8, 1, 1, 1, 3, 4, 4, torch.float32), rows((2, 0, 0, 0.5, 3)), Options(scale=0.5))
    assert_same(attend(*args), reference(*args), 1e-5)


def of_policy(policy: Policy, schedule: Schedule, budget: list[int], length: list[int], prompt: int = 0) -> Segments:
    kept = [policy.keeps(b) for b in budget]
    s = rows(*((k.budget, k.recent, k.sinks, k.forgetting_factor, n) for k, n in zip(kept, length, strict=True)))
    return replace(s, rule=kept[0].rule, schedule=schedule, prompt=torch.tensor([prompt] * len(budget)))


@pytest.mark.parametrize("policy", KNOWN, ids=label)
def test_rules(attend, policy):
    args = (*tokens(11, 2, 2, 2, 11, 4, 5, torch.float32), of_policy(policy, Schedule(), [5, 4], [11, 9]), OPTIONS)
    assert_same(attend(*args), reference(*args), 1e-5)


@pytest.mark.parametrize("policy", [BY_SCORES, AboveUniform()], ids=label)
def test_several_at_once(attend, policy):
    s = of_policy(policy, Schedule("every", every=3), [3, 5], [14, 12])
    args = (*tokens(12, 2, 2, 2, 14, 4, 5, torch.float32), s, OPTIONS)
    assert_same(attend(*args), reference(*args), 1e-5)


def test_a_first_tile_without_a_token(attend):
    T = 42
    # of equal scores the oldest goes: after the cut slots 37 and 38 are filled, and the next token takes slot 36
    s = replace(rows((2, 2, 0, 0.0, T)), schedule=Schedule("every", every=37))
    query, key, value = tokens(13, 1, 1, 2, T, 4, 4, torch.float32)
    args = (torch.zeros_like(query), key, value, s, OPTIONS)
    assert_same(attend(*args, by=in_small_chunks), reference(*args), 1e-5)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("every", every=2)], ids=label)
def test_what_is_not_a_number_goes_last_and_the_protected_stay(attend, schedule):
    query, key, value = tokens(17, 1, 1, 2, 12, 4, 4, torch.float32)
    key[0, 0, 6] = float("nan")
    args = (query, key, value, replace(rows((4, 1, 1, 0.5, 12)), schedule=schedule), OPTIONS)
    got, want = attend(*args), reference(*args)
    assert got.output.isnan().equal(want.output.isnan())
    assert got.state.positions.equal(want.state.positions)
    assert got.evicted.equal(want.evicted)


def test_sums_that_underflow_are_computed_again(attend):
    query, key, value = tokens(23, 1, 1, 2, 14, 4, 4, torch.float32)
    query, key[0, 0, 3] = query.abs(), 400.0  # token 3 has all attention, and the window lets it go
    args = (query, key, value, rows((5, 5, 0, 0.5, 14)), OPTIONS)
    assert_same(attend(*args, by=in_small_chunks), reference(*args), 1e-5)


@pytest.mark.parametrize("budget", [4, 20], ids=["evicting", "reading"])
def test_a_value_that_is_not_finite_reaches_its_readers_alone(attend, budget):
    query, key, value = tokens(24, 1, 1, 2, 12, 4, 4, torch.float32)
    value[0, 0, 5] = float("nan")
    args = (query, key, value, rows((budget, 4, 0, 0.5, 12)), OPTIONS)
    got, want = attend(*args), reference(*args)
    assert got.output.isnan().equal(want.output.isnan())
    assert not want.output[:, :, :5].isnan().any()
    torch.testing.assert_close(got.output, want.output, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_forks_in_half_precision(attend):
    # a beginning that evicts, and its two continuations, which start from states in bfloat16
    segments = replace(
        rows(*[(5, 1, 1, 0.8, n) for n in (9, 6, 4)]),
        row=torch.tensor([0, 0, 0]),
        start=torch.tensor([0, 9, 15]),
        parent=torch.tensor([-1, 0, 0]),
    )
    args = (*tokens(25, 1, 1, 2, 19, 8, 8, torch.bfloat16), segments, OPTIONS)
    got, want = attend(*args), reference(*args)
    assert got.state.keys.dtype == torch.float32
    assert got.state.positions.equal(want.state.positions)
    torch.testing.assert_close(got.state.scores, want.state.scores, rtol=1e-5, atol=1e-5)  # no sum in bfloat16
    torch.testing.assert_close(got.output, want.output, rtol=1e-2, atol=1e-2)


def in_few_columns(*args) -> tuple[Attended, set[str]]:
    """`by_name` where the scan holds few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "COLUMNS", (16,))
        return by_name(*args)


def test_more_tokens_than_the_scan_holds_are_for_torch(attend):
    for budget, ran_then in ((8, "triton"), (12, "torch"), (30, "triton")):  # of 30 tokens none is evicted
        args = (*tokens(26, 1, 1, 1, 20, 4, 4, torch.float32), rows((budget, 0, 0, 0.5, 20)), OPTIONS)
        got, ran = attend(*args, by=in_few_columns)
        assert ran == {ran_then}
        assert_same(got, reference(*args), 1e-5)


def test_float64_is_refused(monkeypatch):
    monkeypatch.setattr(triton_kernel, "available", lambda device=None: True)
    with pytest.raises(ConfigError, match="float32"):
        triton_kernel.attend_triton(*tokens(27, 1, 1, 1, 2, 4, 4, torch.float64), rows((2, 0, 0, 0.5, 2)), OPTIONS)


def test_rules_continue_from_a_state(attend):
    policy, schedule, length = AboveUniform(), Schedule("every", every=2), [13, 8]
    query, key, value = tokens(14, 2, 2, 1, 13, 4, 5, torch.float32)
    got = want = None
    for begin, end in ((0, 6), (6, 7), (7, 13)):
        here = [min(max(n - begin, 0), end - begin) for n in length]
        args = (*(x[:, :, begin:end] for x in (query, key, value)), of_policy(policy, schedule, [4, 3], here), OPTIONS)
        got, want = (by(*args, x and x.state) for by, x in ((attend, got), (reference, want)))
        assert_same(got, want, 1e-5)


@pytest.mark.parametrize(("policy", "schedule"), IN_PARTS, ids=label)
def test_prompts_and_other_parts(attend, policy, schedule):
    args = (*tokens(15, 2, 2, 2, 12, 4, 5, torch.float32), of_policy(policy, schedule, [4, 5], [12, 10], 7), OPTIONS)
    got, ran = attend(*args, by=by_name)
    assert_same(got, reference(*args), 1e-5)
    # a function of a step is for torch, where it is called after the prompt too
    later = {"torch"} if args[3].rule.calls and schedule.then != "keep" else set()
    assert ran == ({"triton"} | later if kernels.splitter_for(args[3]) else {"torch"})


def test_a_rule_of_ones_own_is_for_torch(attend):
    args = (*tokens(16, 1, 2, 1, 9, 4, 4, torch.float32), of_policy(OWN, Schedule(), [3], [9]), OPTIONS)
    got, ran = attend(*args, by=by_name)
    assert_same(got, reference(*args), 1e-5)
    assert ran == {"torch"}


def proved(*args) -> Attended:
    """`attend_triton` after the self-check that only a compiled kernel gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernel, "available", lambda device=None: True)
        patch.setattr(triton_kernel, "interpreted", lambda: False)
        patch.setattr(triton_kernel, "_found", {})
        found = triton_kernel.attend_triton(*args)
        assert set(triton_kernel._found.values()) == {None}
    return found


@pytest.mark.parametrize(
    ("policy", "schedule"), [*((p, Schedule()) for p in KNOWN), (AboveUniform(), EVERY)], ids=label
)
def test_a_sound_kernel_passes_its_self_check(attend, policy, schedule):
    args = (*tokens(18, 1, 2, 2, 6, 4, 5, torch.float32), of_policy(policy, schedule, [4], [6]), OPTIONS)
    assert_same(attend(*args, by=proved), reference(*args), 1e-5)


def rounded(x: Tensor) -> Tensor:
    """To TF32's ten bits."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def newest_first(rows: PaddedRows, options: Options, *compiled, **how) -> RowResults:
    return torch_rows(replace(rows, rule=replace(rows.rule, bias=lambda k, v, positions: -9.0 * positions)), options)


def forgetful(rows: PaddedRows, options: Options, *compiled, **how) -> RowResults:
    ran = torch_rows(rows, options)
    return replace(ran, state=replace(ran.state, scores=torch.zeros_like(ran.state.scores)))


def one_tile(rows: PaddedRows, options: Options, columns: list[int], *compiled, **how) -> RowResults:
    """As if only the first columns were looked at."""
    held = rows.state.positions < columns[0] // 4
    positions = torch.where(held, rows.state.positions, -1)
    return torch_rows(replace(rows, state=replace(rows.state, positions=positions)), options)


def underflowing(rows: PaddedRows, options: Options, *compiled, **how) -> RowResults:
    """As if sums were never taken anew."""
    ran = torch_rows(rows, options)
    output = ran.output.clone()
    output[2, :, 2:] = 0
    return replace(ran, output=output)


def does_not_compile(rows: PaddedRows, options: Options, *compiled, **how) -> RowResults:
    raise RuntimeError("out of resource: shared memory\nwith details")


def torch_with(**changed):
    return lambda r, o, *compiled, **how: torch_rows(replace(r, **{n: f(r) for n, f in changed.items()}), o)


WRONG = {
    "nothing goes": torch_with(budget=lambda r: torch.full_like(r.budget, UNLIMITED)),
    "the newest goes": newest_first,
    "values in TF32": torch_with(value=lambda r: rounded(r.value)),
    "keys in TF32": torch_with(key=lambda r: rounded(r.key)),
    "scores are not handed on": forgetful,
    "one tile": one_tile,
    "what underflows": underflowing,
    "out of resource: shared memory": does_not_compile,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_kernel_that_was_compiled_wrong_is_found_out(wrong, monkeypatch):
    pytest.importorskip("triton", reason=NO_TRITON)
    monkeypatch.setattr(triton_kernel, "run", WRONG[wrong])
    monkeypatch.setattr(triton_kernel, "interpreted", lambda: False)
    monkeypatch.setattr(triton_kernel, "available", lambda device=None: True)
    monkeypatch.setattr(triton_kernel, "_found", {})
    monkeypatch.setattr(kernels, "REGISTRY", tuple(b for b in kernels.REGISTRY if b.name in ("triton", "torch")))
    args = (*tokens(19, 2, 2, 2, 12, 4, 5, torch.float32), rows((4, 0, 0, 0.5, 12), (5, 1, 1, 0.5, 9)), OPTIONS)
    with pytest.raises(UserError, match="fails its self-check on cpu") as raised:
        kernels.attend(*args, backend="triton")
    assert "\n" not in str(raised.value)
    assert (wrong in str(raised.value)) == ("resource" in wrong)
    with (
        kernels.backends_run() as ran,
        pytest.warns(Notice, match="fails its self-check on cpu .* It runs now, and is slower"),
    ):
        assert_same(kernels.attend(*args), reference(*args), 1e-5)
    assert ran == {"torch"}


def test_what_it_needs_is_reported(monkeypatch):
    args = (*tokens(9, 1, 1, 1, 2, 4, 4, torch.float32), rows((2, 0, 0, 0.5, 2)), OPTIONS)
    ours = [name for name in sys.modules if name.startswith("a2sf.engine.kernels.gpu")]
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    without = importlib.import_module(triton_kernel.__name__)
    for name in [name for name in sys.modules if name.startswith("a2sf.engine.kernels.gpu")]:
        monkeypatch.delitem(sys.modules, name)  # the others come back with the patch
    assert not without.available()
    assert not without.available(torch.device("cuda"))
    with pytest.raises(ConfigError, match="Triton is not installed"):
        without.attend_triton(*args)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on the CPU")
def test_the_cpu_is_refused():
    pytest.importorskip("triton", reason=NO_TRITON)
    args = (*tokens(9, 1, 1, 1, 2, 4, 4, torch.float32), rows((2, 0, 0, 0.5, 2)), OPTIONS)
    assert not triton_kernel.available(torch.device("cpu"))
    assert triton_kernel.available() == torch.cuda.is_available()
    with pytest.raises(ConfigError, match="the tensors are on cpu"):
        triton_kernel.attend_triton(*args)
