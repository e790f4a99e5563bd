"""Budgets of base `seen`: every backend against the reference, chunks, forks, rows; and what may be cached at each step."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a2sf import Budget, Schedule, attend, make_policy
from a2sf.engine import kernels
from a2sf.engine.kernels.phases import phases_of
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Options, Segments
from a2sf.hf.settings import retention_of
from baselines.calibrated import Calibrated
from baselines.h2o import H2O
from tests.policies import cases, label, tiered
from tests.tiers import examples

T, K, H, D, LAYERS = 30, 2, 4, 6, 3
CASES = [(p, s) for p, s in cases() if p.uses_budget]
EVERY = pytest.mark.parametrize(("policy", "schedule"), tiered(CASES, each=1), ids=label)
FEW = settings(max_examples=examples(4), deadline=None, suppress_health_check=[HealthCheck.too_slow])
RATIOS = st.sampled_from([0.03, 0.2, 0.29, 0.5, 0.75, 0.9, 1.0])
BY_HEAD = Calibrated(
    file={
        "name": "by head",
        "layers": [
            {"share": s, "heads": [{"share": 0.4, "forgetting_factor": 0.6}, {"share": 1.6, "sinks": 1}]}
            for s in (1.4, 0.7, 0.9)
        ],
    }
)


def vectors(seed: int, rows: int = 1, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, T, D, generator=g, dtype=dtype) for heads in (H, K, K)]


def of(policy, schedule, ratio, prompt, **more):
    """The arguments of `attend`."""
    prompts = prompt if schedule.prompt else None
    return {
        "policy": policy,
        "budget": Budget(ratio=ratio, base="seen"),
        "schedule": schedule,
        "prompt": prompts,
        "layers": LAYERS,
        **more,
    }


def same(a, b) -> None:
    """Two results of `attend`."""
    torch.testing.assert_close(a[0], b[0], atol=1e-9, rtol=0)
    n = max(a[1].positions.shape[-1], b[1].positions.shape[-1])
    assert torch.equal(a[1].pad(n).positions, b[1].pad(n).positions)
    assert torch.equal(a[1].seen, b[1].seen)


@EVERY
@FEW
@given(
    seed=st.integers(0, 999), ratio=RATIOS, prompts=st.lists(st.integers(1, T), min_size=3, max_size=3), data=st.data()
)
def test_torch_is_the_reference_and_rows_do_not_change_each_other(policy, schedule, seed, ratio, prompts, data):
    q, k, v = vectors(seed, rows=3)
    lengths = data.draw(st.lists(st.integers(0, T), min_size=3, max_size=3))
    layer = data.draw(st.integers(0, LAYERS - 1))
    ran = {}
    for backend in ("reference", "torch"):
        arguments = of(policy, schedule, ratio, torch.tensor(prompts), layer=layer, lengths=torch.tensor(lengths))
        ran[backend] = attend(query=q, key=k, value=v, backend=backend, **arguments)
    same(ran["torch"], ran["reference"])
    for row, (n, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        if n == 0:
            continue
        arguments = of(policy, schedule, ratio, prompt, layer=layer)
        alone = attend(query=q[[row], :, :n], key=k[[row], :, :n], value=v[[row], :, :n], backend="torch", **arguments)
        output, state = ran["torch"]
        same((output[[row], :, :n], state.select(torch.tensor([row]))), alone)


@pytest.mark.parametrize(
    ("policy", "schedule"), tiered(((p, s) for p, s in CASES if p.causal), each=1, turn=1), ids=label
)
@FEW
@given(
    seed=st.integers(0, 999),
    ratio=RATIOS,
    prompt=st.integers(1, T),
    layer=st.integers(0, LAYERS - 1),
    cuts=st.lists(st.integers(1, T - 1), max_size=4),
)
def test_chunks_and_single_tokens_equal_one_call_within_the_budget(policy, schedule, seed, ratio, prompt, layer, cuts):
    """After each single token, at most the budget of its step is cached."""
    tensors = vectors(seed)
    arguments = of(policy, schedule, ratio, prompt, layer=layer)
    at_once = attend(arguments.pop("policy"), *tensors, backend="torch", **arguments)
    for ends in (sorted({*cuts, T}), range(1, T + 1)):
        outputs, state, begin = [], None, 0
        for end in ends:
            part = [x[:, :, begin:end] for x in tensors]
            output, state = attend(policy, *part, state=state, backend="torch", **arguments)
            outputs.append(output)
            begin = end
            check_cached(state, end - 1, policy, schedule, ratio, prompt, layer)
        same((torch.cat(outputs, 2), state), at_once)


def check_cached(state, t, policy, schedule, ratio, prompt, layer) -> None:
    """What may be cached after the token at position `t`."""
    cut = prompt if schedule.prompt else None
    if cut is not None and (t < cut - 1 or (t >= cut and schedule.then == "keep")):
        return
    C = max(1, math.floor(Fraction(str(ratio)) * (t + 1)))
    stated = policy.keeps(C, layer, LAYERS, cut)
    spare = 0 if cut is not None and t == cut - 1 else schedule.spare
    full = set(stated.rule.full_heads)
    counts = [int(n) for h, n in enumerate(state.counts[0]) if h not in full]
    # with shares of heads: in the sum over the heads
    assert stated.rule.threshold is not None or sum(counts) <= len(counts) * (stated.budget + spare)
    if policy.divided_budget(9, layer, LAYERS, cut) == 9 and not stated.rule.heads and not stated.rule.cut:
        assert max(counts, default=0) <= C + spare
    newest = range(t + 1 - stated.recent, t + 1)
    for head in state.positions[0].tolist():
        assert set(newest) <= set(head)


@pytest.mark.parametrize(("policy", "schedule"), [(BY_HEAD, s) for p, s in CASES if p.name == "a2sf"][:6], ids=label)
@FEW
@given(seed=st.integers(0, 999), ratio=RATIOS, prompt=st.integers(1, T), layer=st.integers(0, LAYERS - 1))
def test_heads_with_numbers_of_their_own(policy, schedule, seed, ratio, prompt, layer):
    arguments = of(policy, schedule, ratio, prompt, layer=layer)
    each = [
        attend(query=q, key=k, value=v, backend=b, **arguments)
        for q, k, v in [vectors(seed)]
        for b in ("reference", "torch")
    ]
    same(*each)
    C = max(1, math.floor(Fraction(str(ratio)) * T))
    held = each[0][1].counts[0].double().mean()
    if not schedule.prompt:
        assert held <= policy.layer_budget(C, layer, LAYERS) + schedule.spare


@FEW
@given(
    seed=st.integers(0, 999),
    name=st.sampled_from(["h2o", "a2sf", "window", "streaming", "mean_attention", "tova", "vatp", "snapkv", "heads"]),
    ratios=st.lists(RATIOS, min_size=4, max_size=4),
    schedule=st.sampled_from(sorted({label(s): s for _, s in CASES}.values(), key=label)),
    data=st.data(),
)
def test_a_tree_of_segments_is_each_sequence_by_itself(seed, name, ratios, schedule, data):
    """Sequences of one budget share what they read, forks at any token; with the compiled kernel where it knows the rule."""
    policy = make_policy(name)
    if schedule.when not in policy.schedules:
        return
    q, k, v = vectors(seed, dtype=torch.float32)
    a, b = sorted(data.draw(st.lists(st.integers(1, T - 1), min_size=2, max_size=2, unique=True)))
    c = data.draw(st.integers(b, T))
    prompt = data.draw(st.integers(1, a))
    # a root [0, a), its children [a, b) and [b, c), and a child of the first of these, [c, T)
    start, length, parent = [0, a, b, c], [a, b - a, c - b, T - c], [-1, 0, 0, 1]
    limit = Budget(ratio=ratios[0], base="seen")
    retention = [retention_of(policy, limit, T, prompt, LAYERS, schedule)[0]] * 4
    numbers = BatchRetention.of(retention, schedule, [prompt] * 4)
    places = {n: torch.tensor(x) for n, x in (("start", start), ("length", length), ("parent", parent))}
    segments = Segments(**numbers.retention(), row=torch.zeros(4, dtype=torch.int64), **places)
    with torch.no_grad():
        tree = kernels.attend(q, k, v, segments, Options(D**-0.5, return_state=True, trace=True))
    assert tree.state is not None
    for end, path in ((1, [0, 1]), (2, [0, 2]), (3, [0, 1, 3])):
        at = torch.cat([torch.arange(start[i], start[i] + length[i]) for i in path])
        arguments = of(policy, schedule, ratios[0], prompt, backend="reference")
        output, state = attend(
            query=q[:, :, at].double(), key=k[:, :, at].double(), value=v[:, :, at].double(), **arguments
        )
        torch.testing.assert_close(tree.output[:, :, at].double(), output, atol=2e-5, rtol=0)
        positions = tree.state.select(torch.tensor([end])).trim().positions
        assert torch.equal(positions, state.positions)


@FEW
@given(seed=st.integers(0, 999), ratio=RATIOS, prompt=st.integers(1, T))
@pytest.mark.parametrize(
    ("policy", "schedule"), [c for c in CASES if c[0].name in ("h2o", "streaming", "tova", "adakv")], ids=label
)
def test_keep_after_the_prompt_is_base_context(policy, schedule, seed, ratio, prompt):
    if not schedule.prompt or schedule.then != "keep":
        return
    tensors = vectors(seed)
    C = max(1, math.floor(Fraction(str(ratio)) * prompt))
    arguments = of(policy, schedule, ratio, prompt, layer=2)
    got = attend(query=tensors[0], key=tensors[1], value=tensors[2], **arguments)
    want = attend(query=tensors[0], key=tensors[1], value=tensors[2], **(arguments | {"budget": C}))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1].positions, want[1].positions)


class Waving(H2O):
    """A layer's budget that is at times smaller than before."""

    name, label = "waving", "Waving"

    def layer_budget(self, budget, layer, layers, prompt=None):
        return budget if budget % 3 else max(1, budget - 3)


@pytest.mark.parametrize(
    "schedule", [Schedule(), Schedule("every", every=3), Schedule("prompt", then="step")], ids=label
)
def test_a_smaller_budget_later_evicts_several_at_once(schedule):
    retention = [retention_of(Waving(), Budget(ratio=0.6, base="seen"), T, 4, 1, schedule)[0]] * 2
    assert retention[0].growth is not None
    budgets = [k.budget for _, k in retention[0].growth.phases(0, T)]
    assert sorted(budgets) != budgets
    segments = Segments.of_rows(BatchRetention.of(retention, schedule, [4, 4]), torch.tensor([T, T - 7]))
    tensors = vectors(1, rows=2, dtype=torch.float32)
    options = Options(D**-0.5, return_state=True, trace=True)
    got, want = (kernels.attend(*tensors, segments, options, backend=b) for b in ("numba", "reference"))
    torch.testing.assert_close(got.output, want.output, atol=2e-5, rtol=0)
    assert torch.equal(got.evicted, want.evicted)
    assert sorted(got.cuts.tolist()) == sorted(want.cuts.tolist())
    assert len(got.cuts)


def test_phases_are_chains_whose_last_states_are_returned():
    retention = retention_of(make_policy("h2o"), Budget(ratio=0.5, base="seen"), 9, 9, 1)
    segments = Segments.of_rows(BatchRetention.of(retention * 2), torch.tensor([9, 0]))
    chains = phases_of(segments)
    assert chains.budget.tolist() == [1, 2, 3, 4, 1]  # of 1 to 3, 4 and 5, 6 and 7, 8 and 9 tokens
    assert chains.start.tolist() == [0, 3, 5, 7, 0]
    assert chains.length.tolist() == [3, 2, 2, 2, 0]
    assert chains.parent.tolist() == [-1, 0, 1, 2, -1]
    assert chains.final is not None
    assert chains.final.tolist() == [False, False, False, True, True]
    assert chains.growth is None
    later = phases_of(replace(segments, length=torch.tensor([3, 2])), seen=(4, 8))
    assert later.budget.tolist() == [2, 3, 4, 5]
    assert later.length.tolist() == [1, 2, 1, 1]


def test_forks_that_evicted_with_another_budget_are_not_masked_attention():
    """A window that grows sees at its first token what the smaller one left."""
    from a2sf.engine.kernels.dense import unsupported

    retention = retention_of(make_policy("window"), Budget(ratio=0.5, base="seen"), 9, 9, 1)
    segments = Segments.of_rows(BatchRetention.of(retention), torch.tensor([9]))
    assert unsupported(segments, Options(1.0), None) is not None
    assert unsupported(phases_of(segments), Options(1.0), None) is not None
    constant = Segments.of_rows(BatchRetention.of([make_policy("window").keeps(3)]), torch.tensor([9]))
    assert unsupported(constant, Options(1.0), None) is None


def test_rows_whose_budgets_do_not_grow_stay_as_they_are():
    """Beside others that do, or among themselves at one depth of a tree."""
    fixed = retention_of(H2O(), Budget(tokens=6), 20, 10, 1)[0]
    grown = retention_of(H2O(), Budget(ratio=0.5, base="seen"), 20, 10, 1)[0]
    both = BatchRetention.of([fixed, grown])
    assert both.at(torch.tensor([3, 7])).budget.tolist() == [6, 4]
    alone = replace(both.select(slice(0, 1)), growth=(None,))
    assert alone.at(torch.tensor([3])).budget.tolist() == [6]
