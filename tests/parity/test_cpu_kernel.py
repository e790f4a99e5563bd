"""The CPU kernel against independent numbers, and against the reference in float64 on realistic shapes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from a2sf.compat import numba
from a2sf.engine.eviction import Attended, EvictionState, Options, Segments, reference
from a2sf.engine.functional import evicting_attention
from a2sf.engine.kernels import attend, dense
from a2sf.engine.kernels.cpu import SlotCache
from a2sf.engine.kernels.cpu import run as cpu_run
from a2sf.engine.retention import BatchRetention
from a2sf.errors import ConfigError
from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.rule import Rule

VECTORS = sorted((Path(__file__).parent.parent / "vectors").glob("*.npz"))


def tensors(B: int, H: int, K: int, T: int, D: int, V: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as transformers gives them: views of [B, T, heads, size]."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((H, D), (K, D), (K, V))
    q, k, v = (torch.randn(B, T, n, size, generator=g).transpose(1, 2) for n, size in shapes)
    return q * 2, k, v


def segments(rows: list[tuple]) -> Segments:
    """Segments from (row, start, length, parent, budget, recent, sinks, factor)."""
    *others, factor = (torch.tensor(column) for column in zip(*rows, strict=True))
    names = ("row", "start", "length", "parent", "budget", "recent", "sinks")
    return Segments(**dict(zip(names, others, strict=True)), forgetting_factor=factor.double())


def assert_same(got: Attended, want: Attended, tolerance: float = 2e-5) -> None:
    """`want` in float64. Positions equal, everything else to `tolerance`."""
    assert (got.output - want.output).abs().max() < tolerance
    if want.evicted is not None:
        assert got.evicted is not None
        assert got.evicted.equal(want.evicted)
        assert got.evicted.dtype == torch.int32
    if want.state is not None:
        assert got.state is not None
        assert got.state.positions.equal(want.state.positions)
        assert got.state.seen.equal(want.state.seen)
        assert (got.state.scores - want.state.scores).abs().max() < tolerance
        assert got.state.keys.equal(want.state.keys.float())
        assert got.state.values.equal(want.state.values.float())


def both(q: Tensor, k: Tensor, v: Tensor, s: Segments, state: EvictionState | None = None) -> tuple[Attended, Attended]:
    """The kernel in float32 and the reference in float64."""
    options = Options(q.shape[-1] ** -0.5, return_state=True, trace=True)
    return (
        attend(q, k, v, s, options, state, backend="numba"),
        reference(q.double(), k.double(), v.double(), s, options, state),
    )


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_vectors(path: Path, backend: str) -> None:
    case = np.load(path)
    q, k, v = (torch.from_numpy(case[name]).float() for name in ("query", "key", "value"))
    budget, recent, sinks, lengths = (torch.from_numpy(case[n]) for n in ("budget", "recent", "sinks", "lengths"))
    output, state = evicting_attention(
        q, k, v,
        budget=budget, recent=recent, sinks=sinks, lengths=lengths,
        forgetting_factor=torch.from_numpy(case["decay"]), backend=backend,
    )  # fmt: skip
    for b, n in enumerate(lengths.tolist()):
        assert np.abs(output[b, :, :n].numpy() - case["output"][b, :, :n]).max() < 1e-5
        assert (output[b, :, n:] == 0).all()
        for h in range(k.shape[1]):
            kept = {p for p in state.positions[b, h].tolist() if p >= 0}
            wanted = {p for p in np.asarray(case["kept_final"][b, h]).reshape(-1).tolist() if p >= 0}
            assert kept == wanted


@pytest.mark.parametrize(
    ("H", "K", "T", "D", "V", "budget", "recent", "sinks", "factor"),
    [
        (9, 3, 400, 64, 64, 80, 0, 0, 0.1),  # A2SF
        (4, 4, 150, 64, 64, 30, 15, 0, 1.0),  # H2O
        (4, 1, 150, 128, 128, 31, 31, 0, 0.5),  # window
        (4, 2, 150, 80, 48, 33, 29, 4, 0.0),  # streaming, sizes that are not whole tiles
        (2, 1, 90, 5, 3, 1, 0, 0, 0.3),  # smaller than one vector, one slot
        (6, 2, 200, 64, 64, UNLIMITED, 0, 0, 1.0),  # full
    ],
)
def test_rows_equal_the_reference(H, K, T, D, V, budget, recent, sinks, factor) -> None:
    q, k, v = tensors(2, H, K, T, D, V)
    lengths = (T, T // 2)
    rows = [(b, 0, lengths[b], -1, budget, recent, sinks, factor) for b in range(2)]
    assert_same(*both(q, k, v, segments(rows)))


def tree(budget: int, recent: int = 0, sinks: int = 0, factor: float = 0.2) -> Segments:
    """Two packed trees, one of them with grandchildren, and a lone row; the first nodes are longer than the budget."""
    shape = [
        (0, 0, 40, -1), (0, 40, 9, 0), (0, 49, 1, 0), (0, 50, 20, 0),  # a context and its options
        (0, 70, 12, -1), (0, 82, 30, 4), (0, 112, 5, 5), (0, 117, 7, 5), (0, 124, 0, 5), (0, 130, 11, 4),
        (1, 3, 100, -1),
    ]  # fmt: skip
    return segments([(*s, budget, recent, sinks, factor) for s in shape])


@pytest.mark.parametrize(
    ("budget", "recent", "sinks"), [(16, 0, 0), (20, 10, 0), (7, 4, 3), (12, 12, 0), (UNLIMITED, 0, 0)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_trees_equal_the_reference(budget: int, recent: int, sinks: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = attend(*of_tree(), tree(budget, recent, sinks), Options(32**-0.5, True, True), backend="numba")
    finally:
        torch.set_num_threads(before)
    assert_same(got, reference_of_tree(budget, recent, sinks))


@cache
def of_tree() -> tuple[Tensor, Tensor, Tensor]:
    return tensors(2, 6, 3, 145, 32, 40)


@cache
def reference_of_tree(budget: int, recent: int, sinks: int) -> Attended:
    return reference(*(x.double() for x in of_tree()), tree(budget, recent, sinks), Options(32**-0.5, True, True))


def test_scores_are_kept_for_descendants_only_where_they_decide_and_the_result_is_the_same() -> None:
    """Without a state to return, scores are skipped where no later eviction has a choice."""
    q, k, v = tensors(1, 4, 2, 60, 16, 16)
    shape = [(0, 0, 10, -1), (0, 10, 25, 0), (0, 35, 25, 0)]
    # the root does not evict, so its children may differ in budget
    rule = [(30, 0, 0, 0.5), (20, 0, 0, 0.5), (30, 30, 0, 0.5)]
    s = segments([a + b for a, b in zip(shape, rule, strict=True)])
    options = Options(0.25, trace=True)
    got = attend(q, k, v, s, options, backend="numba")
    assert_same(got, reference(q.double(), k.double(), v.double(), s, options))
    assert got.state is None


@pytest.mark.parametrize(
    "rule", [Rule(), Rule(mean_over_age=True), Rule(shared=True)], ids=["scores", "ranks", "shared"]
)
def test_evictions_are_the_same_with_and_without_a_trace(rule: Rule) -> None:
    """Also among equals, where the oldest is evicted: the kernel reads positions only then, and for a trace."""
    q, k, v = tensors(2, 4, 2, 90, 16, 16)
    q[0] = 0
    s = replace(segments([(b, 0, 90, -1, 20, 0, 0, 0.0) for b in range(2)]), rule=rule)
    traced, untraced = (
        attend(q, k, v, s, Options(0.25, return_state=True, trace=trace), backend="numba") for trace in (True, False)
    )
    assert_same(traced, reference(q.double(), k.double(), v.double(), s, Options(0.25, return_state=True, trace=True)))
    assert traced.evicted is not None
    assert traced.evicted[0, 0, 20:].tolist() == list(range(70))
    assert untraced.output.equal(traced.output)
    assert untraced.state is not None
    assert traced.state is not None
    assert untraced.state.positions.equal(traced.state.positions)


def test_states_are_handed_on() -> None:
    q, k, v = tensors(3, 4, 2, 90, 32, 32)
    first = segments([(b, 0, n, -1, 20, 3, 2, 0.4) for b, n in enumerate((50, 13, 0))])
    second = segments([(b, n, 40, -1, 20, 3, 2, 0.4) for b, n in enumerate((50, 13, 0))])
    start, wanted_start = both(q, k, v, first)
    assert_same(start, wanted_start)
    assert start.state is not None
    assert_same(*both(q, k, v, second, start.state))


def test_equal_scores_evict_the_oldest() -> None:
    q, k, v = tensors(1, 2, 1, 120, 8, 8)
    s = segments([(0, 0, 120, -1, 40, 0, 3, 0.0)])
    options = Options(0.0, return_state=True, trace=True)  # every key weighs the same
    got = attend(q, k, v, s, options, backend="numba")
    assert got.evicted is not None
    assert got.evicted[0, 0, 40:].tolist() == list(range(3, 83))
    assert_same(got, reference(q.double(), k.double(), v.double(), s, options))


def test_a_row_that_underflows_in_its_block_is_computed_again() -> None:
    """A key that is not yet there, or there no more, has the largest logit by far."""
    q, k, v = tensors(1, 2, 1, 64, 16, 16)
    k = k.clone()
    k[0, 0, 34] = 150 * q[0, 0, 30] / q[0, 0, 30].norm() ** 2  # four tokens after token 30, in its block
    s = segments([(0, 0, 64, -1, 20, 0, 0, 0.5)])
    q = q * 4
    got, want = both(q, k, v, s)
    logits = q[0, 0, 30] @ k[0, 0].T * 0.25
    assert logits[34] - logits[:31].max() > 100  # relative to it, the row is 0 in float32
    assert (got.output[0, 0, 30] - want.output[0, 0, 30]).abs().max() < 1e-5


def test_half_precision_is_computed_in_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x.to(dtype) for x in tensors(1, 4, 2, 80, 32, 32))
        s = segments([(0, 0, 80, -1, 16, 0, 0, 0.3)])
        got, want = both(q, k, v, s)
        assert got.output.dtype == dtype
        assert got.evicted is not None
        assert want.evicted is not None
        assert got.evicted.equal(want.evicted)
        assert got.output.sub(want.output.to(dtype)).abs().max() <= 2**-7  # one rounding


def test_output_is_laid_out_for_transformers() -> None:
    q, k, v = tensors(2, 4, 2, 30, 16, 24)
    s = segments([(b, 0, 30, -1, 8, 0, 0, 0.3) for b in range(2)])
    assert attend(q, k, v, s, Options(0.25), backend="numba").output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("chunk", [1, 3])
def test_slot_cache_equals_the_whole(chunk: int) -> None:
    B, H, K, T, D, V, budget = 3, 6, 2, 60, 20, 24, 17
    q, k, v = tensors(B, H, K, T, D, V)
    rows = segments([(b, 0, T, -1, budget, 4, 1, 0.1 * b) for b in range(B)])
    cache, out = SlotCache(B, K, H // K, budget, D, V), []
    before = cache.nbytes
    for t in range(0, T, chunk):
        part = (x[:, :, t : t + chunk] for x in (q, k, v))
        out.append(cache.attend(*part, rows))
    want = reference(q.double(), k.double(), v.double(), rows, Options(D**-0.5, return_state=True))
    assert_same(Attended(torch.cat(out, dim=2), cache.state()), want)
    assert cache.nbytes == before
    assert cache.seen.tolist() == [T] * B


def test_slot_cache_reorders_and_loads() -> None:
    q, k, v = tensors(2, 4, 2, 40, 16, 16)
    rule = Retention(budget=9, recent=0, forgetting_factor=0.3)
    cache = SlotCache(2, 2, 2, 9, 16, 16)
    cache.attend(q[:, :, :30], k[:, :, :30], v[:, :, :30], BatchRetention.of([rule] * 2), lengths=torch.tensor([30, 5]))
    state = cache.state()
    picked = torch.tensor([1, 0, 1])
    cache.reorder(picked)
    other = SlotCache(3, 2, 2, 9, 16, 16)
    other.load(state.select(picked))
    part = (x[picked, :, 30:] for x in (q, k, v))
    q3, k3, v3 = part
    three = BatchRetention.of([rule] * 3)
    first, second = cache.attend(q3, k3, v3, three), other.attend(q3, k3, v3, three)
    assert (first - second).abs().max() < 1e-6
    assert first[0].equal(first[2])
    assert cache.state().positions.equal(other.state().positions)
    assert cache.seen.tolist() == [15, 40, 15]


def test_slot_cache_is_small_and_says_when_it_is_full() -> None:
    cache = SlotCache(1, 3, 3, 256, 64, 64)
    assert cache.nbytes <= 1.055 * 4 * 3 * 256 * (64 + 64)
    q, k, v = tensors(1, 9, 3, 258, 64, 64)
    with pytest.raises(ValueError, match="needs 258 slots and the cache has 257"):
        cache.attend(q, k, v, BatchRetention.of([Retention(budget=UNLIMITED)]))


def test_backends_say_what_they_cannot_serve() -> None:
    q, k, v = (x.double() for x in tensors(1, 2, 1, 8, 8, 8))
    s = segments([(0, 0, 8, -1, 4, 0, 0, 0.3)])
    assert attend(q, k, v, s, Options(1.0)).output.dtype == torch.float64
    with pytest.raises(ConfigError, match="float64"):
        attend(q, k, v, s, Options(1.0), backend="numba")
    with pytest.raises(ConfigError, match="give auto or one of reference, numba, triton"):
        attend(q, k, v, s, Options(1.0), backend="cuda")
    meta = [x.float().to("meta") for x in (q, k, v)]
    with pytest.raises(ConfigError, match="numba serves tensors on the CPU"):
        attend(*meta, s, Options(1.0), backend="numba")


@pytest.mark.parametrize(("budget", "recent"), [(UNLIMITED, 0), (60, 0), (12, 12), (1, 1)])
def test_dense_attention_equals_the_reference_where_it_serves(budget: int, recent: int) -> None:
    q, k, v = tensors(2, 6, 3, 145, 32, 40)
    s, options = tree(budget, recent), Options(32**-0.5)
    assert (dense.unsupported(s, options, None) is None) == (budget != 60)  # the longest path has 100 tokens
    if budget != 60:
        want = reference(q.double(), k.double(), v.double(), s, options)
        assert_same(dense.attend_dense(q, k, v, s, options), want)
        half = [x.bfloat16() for x in (q, k, v)]
        assert dense.attend_dense(*half, s, options).output.dtype == torch.bfloat16
    assert dense.unsupported(s, Options(1.0, return_state=True), None) is not None
    assert dense.unsupported(s, Options(1.0, trace=True), None) is not None
    assert dense.unsupported(tree(12, 8, 4), options, None) is not None  # sinks: not a band


@pytest.mark.full
def test_compiled_code_is_kept_on_disk() -> None:
    """What this process has compiled, or an earlier one, another process loads."""
    program = """
import torch
from a2sf import evicting_attention
from a2sf.engine.kernels.cpu import run as cpu_run
x = torch.randn(1, 1, 8, 8)
_, state = evicting_attention(x, x, x, budget=4, recent=0, forgetting_factor=0.5)
assert state.positions.shape[-1] == 4
print(sum(cpu_run.run.stats.cache_hits.values()))
"""
    exec(program, {})
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


def test_it_runs_without_a_place_for_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    compiled = numba.cached(lambda x: x + 1)
    assert compiled(1) == 2
    assert compiled.stats.cache_path is None
    assert cpu_run._make_run(1).stats.cache_path is None


def test_versions_of_the_source_share_no_file_of_compiled_code() -> None:
    """numba fails on a file that names types which another version of the package had."""
    one, other = (cpu_run._make_run(digest)._cache._impl.filename_base for digest in (1, 2))
    assert one != other
