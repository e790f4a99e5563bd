"""Published methods against their definitions, which are written with loops and know nothing of the engine."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from a2sf import Policy, PrunedCache, Retention, Rule, Schedule, attend, make_policy
from a2sf.calibration.capture import Captured
from a2sf.calibration.filters import Queries, content
from a2sf.engine import kernels
from a2sf.engine.priorities import call_policy, step_of_rows
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Options, Segments
from a2sf.errors import ConfigError, PolicyError
from a2sf.policies.model.rotary import Projection, Rotary
from a2sf.policies.rule import AttentionRows, Cut, Step
from tests import definitions
from tests.definitions import retained
from tests.models import shared

T, BUDGET = 61, 17
CASES = [
    ("curdkv", {"window": 8, "sinks": 2}, definitions.curdkv(8), {"sinks": 2}),
    ("lagkv", {"lag": 6, "sinks": 3}, definitions.lagkv(6, 3), {"sinks": 3}),
    ("scissorhands", {"window": 9, "recent": 4}, definitions.scissorhands(9), {"recent": 4}),
    ("scissorhands", {"window": 50, "recent": 4}, definitions.scissorhands(50), {"recent": 4}),
    ("roco", {"varying": 0.3, "recent": 3}, definitions.roco(0.3, 3), {"recent": 3}),
    ("roco", {"varying": 0.6, "recent": 20}, definitions.roco(0.6, 20), {"recent": 10}),
    ("rkv", {"window": 4, "mix": 0.7}, definitions.rkv(4, 0.7), {"recent": 4}),
]


def tensors(seed: int, heads: int = 4, kv_heads: int = 2):
    g = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(1, heads, T, 8, generator=g, dtype=torch.float64)
    return q, *(torch.randn(1, kv_heads, T, 8, generator=g, dtype=torch.float64) for _ in range(2))


def held(state) -> list[list[int]]:
    return [[p for p in head if p >= 0] for head in state.positions[0].tolist()]


@pytest.mark.parametrize(
    ("name", "settings", "definition", "protected"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
@pytest.mark.parametrize("prompt", [None, 50])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_method_retains_what_its_definition_does(name, settings, definition, protected, prompt, seed):
    q, k, v = tensors(seed)
    more = {} if prompt is None else {"schedule": "prompt", "prompt": prompt}
    _, state = attend(make_policy(name, **settings), q, k, v, budget=BUDGET, **more)
    plain = (x[0].numpy() for x in (q, k, v))
    assert held(state) == retained(definition, *plain, BUDGET, prompt=prompt, **protected)


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_expected_attention_is_that_of_queries_at_the_next_positions(covariance, scaling):
    """Against an average over positions one by one; a scaled embedding gives what scaled keys and queries give."""
    q, k, v = tensors(7)
    settings = {"future": 7, "covariance": covariance, "sinks": 2, "window": 30}
    rotary = Rotary(torch.tensor([1.0, 0.3, 0.1, 0.03]), scaling)
    policy = make_policy("expected_attention", **settings)
    q, k = q * scaling, k * scaling
    frequencies = rotary.frequencies.double().numpy()
    definition = definitions.expected_attention(frequencies, **settings)
    queries = q.unflatten(1, (2, 2))
    seen = definitions.Seen(
        *(x[0, 1].numpy() for x in (k, v)), queries[0, 1].numpy(), list(range(T)), [(T - 1, [], np.zeros(0))]
    )
    positions = torch.arange(T).expand(1, 2, T)
    none = torch.zeros(1, 2, T, dtype=torch.float64)
    step = Step(none, k, v, positions, positions >= 0, torch.tensor([[[T - 1]]]), none, none)
    step = replace(step, queries=queries[:, :, :, -30:], rotary=rotary, scale=8**-0.5)
    np.testing.assert_allclose(policy.priorities(step)[0, 1].numpy()[2:], definition(seen)[2:], rtol=1e-5)


@pytest.mark.parametrize("covariance", [True, False])
def test_expected_attention_of_a_row_is_the_same_in_any_batch_and_width_of_the_window(covariance):
    """The queries before a row's first are 0: as many as other rows need, none if the row is alone at a cut."""
    W, N = 300, 9
    g = torch.Generator().manual_seed(1)
    now = torch.tensor([5, 63, 64, 250])[:, None, None]
    queries = torch.randn(4, 2, 3, W, 8, generator=g)
    for row, last in enumerate(now.flatten().tolist()):
        queries[row, :, :, : W - 1 - last] = 0
    k, v = torch.randn(2, 4, 2, N, 8, generator=g)
    positions = torch.arange(N).expand(4, 2, N)
    none = torch.zeros(4, 2, N)
    rotary = Rotary(torch.tensor([1.0, 0.3, 0.1, 0.03]), 1.0)
    step = Step(none, k, v, positions, positions <= now, now, none, none, queries=queries, scale=8**-0.5, rotary=rotary)
    policy = make_policy("expected_attention", covariance=covariance, window=W)
    together = policy.priorities(step)
    for row, last in enumerate(now.flatten().tolist()):
        alone = step_of_rows(step, slice(row, row + 1))
        assert torch.equal(policy.priorities(alone)[0], together[row])
        assert torch.equal(
            policy.priorities(replace(alone, queries=alone.queries[..., W - 1 - last :, :]))[0], together[row]
        )


def test_directions_are_those_of_the_queries(tmp_path):
    """A head whose queries lie along one direction has it, on the side of their mean."""
    g = torch.Generator().manual_seed(0)
    want = torch.nn.functional.normalize(torch.randn(2, 4, 8, generator=g), dim=-1)
    summed = Queries()
    for layer in range(2):
        for tokens in (40, 90):
            lengths = 1 + torch.rand(1, 4, tokens, 1, generator=g)
            query = lengths * want[layer, :, None] + 0.01 * torch.randn(1, 4, tokens, 8, generator=g)
            key = torch.zeros(1, 2, tokens, 8)
            summed.add(Captured(layer, query, key, key, Options(1.0), query))
    found = summed.directions()
    torch.testing.assert_close(found, want.unflatten(1, (2, 2)).mean(2), atol=0.01, rtol=0)
    file = tmp_path / "filters.json"
    file.write_text(json.dumps(content(found, "mine", {"tokens": 130})))
    policy = make_policy("qfilter", file=str(file))
    file.unlink()  # read once
    assert torch.equal(policy.directions, found)
    assert set(policy.stored_settings()["file"]) == {"name", "shape", "digest"}
    q, k, v = tensors(8)
    for layer in range(2):
        _, state = attend(policy, q, k, v, budget=BUDGET, layer=layer, layers=2, schedule="prompt", prompt=T)
        best = (k[0] * found[layer].double()[:, None]).sum(-1).topk(BUDGET).indices.sort().values
        assert held(state) == best.tolist()
    with pytest.raises(ConfigError, match=r"policy.file=mine .* a model of 2 layers of 2 .* has 3 of 2"):
        attend(policy, q, k, v, budget=BUDGET, layer=0, layers=3)
    with pytest.raises(ConfigError, match=r"policy.file=mine .* heads of 8 numbers, and this model's have 6"):
        attend(policy, q[..., :6], k[..., :6], v, budget=BUDGET, layer=0, layers=2)


@pytest.mark.parametrize("prompt", [None, 50])
def test_whole_chunks_are_retained(prompt):
    q, k, v = tensors(3, heads=2, kv_heads=1)
    more = {} if prompt is None else {"schedule": "prompt", "prompt": prompt}
    policy = make_policy("chunkkv", by={"name": "h2o", "recent_share": 0}, chunk=5)
    _, state = attend(policy, q, k, v, budget=BUDGET, **more)
    definition = definitions.chunks(5, definitions.accumulated)
    assert held(state) == retained(definition, *(x[0].numpy() for x in (q, k, v)), BUDGET, prompt=prompt)
    if prompt is not None:
        per_chunk = [sum(p // 5 == c for p in held(state)[0]) for c in range(10)]
        assert sorted(per_chunk) == [0] * 6 + [2] + [5] * 3
        # the chunk that fits in part retains its newest tokens
        c = per_chunk.index(2)
        assert {5 * c + 3, 5 * c + 4} <= set(held(state)[0])


@pytest.mark.parametrize("projected", [True, False])
def test_the_second_half_is_by_the_projected_value(projected):
    """Of 17 slots, the window has four, the four best others are retained; nine more by score times norm."""
    q, k, v = tensors(9)
    weights = torch.randn(2, 2, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    projection = Projection(weights) if projected else None
    snapkv = {"name": "snapkv", "window": 4, "kernel": 3}
    policy = make_policy("criticalkv", by=snapkv, epsilon=1e-4)
    rows = BatchRetention.of([policy.keeps(BUDGET, 0, 1, T)], Schedule("prompt"), [T])
    options = Options(scale=8**-0.5, return_state=True, projection=projection)
    state = kernels.attend(q, k, v, Segments.of_rows(rows, torch.tensor([T])), options).state
    for head, kept in enumerate(held(state)):
        norms = v[0, head].abs().sum(-1)
        if projected:
            norms = torch.stack([(v[0, head] @ weights[head, g]).abs().sum(-1) for g in range(2)]).mean(0)
        scores = torch.zeros(T - 4, dtype=torch.float64)
        for t in range(T - 4, T):
            logits = q[0, 2 * head : 2 * head + 2, t] @ k[0, head, : t + 1].T * 8**-0.5
            scores += logits.softmax(-1).sum(0)[: T - 4]
        scores = torch.nn.functional.avg_pool1d(scores[None], 3, stride=1, padding=1)[0]
        first = scores.topk(4).indices.tolist()
        product = ((scores + 1e-4) * norms[: T - 4]).index_fill(0, torch.tensor(first), -1)
        assert kept == sorted([*first, *product.topk(9).indices.tolist(), *range(T - 4, T)])


def test_priorities_below_0_cannot_be_multiplied():
    policy = make_policy("criticalkv", by="keydiff")
    with pytest.raises(ConfigError, match=r"policy.by=keydiff is not allowed: its priorities may be negative"):
        attend(policy, *tensors(0), budget=BUDGET)


def test_all_heads_retain_the_same_chunks():
    q, k, v = tensors(4)
    _, state = attend(make_policy("chunkkv", by="keydiff", chunk=4), q, k, v, budget=12, schedule="prompt", prompt=T)
    a, b = held(state)
    assert a == b
    assert all(len([p for p in a if p // 4 == c]) in (0, 4) for c in {p // 4 for p in a})


def test_a_cut_takes_the_maximum_of_neighbours():
    q, k, v = tensors(5)
    window, kernel, prompt = 6, 5, 50
    kept = {}
    for pooling in ("mean", "max"):
        policy = make_policy("snapkv", window=window, kernel=kernel, pooling=pooling)
        for backend, dtype in (("auto", torch.float32), ("auto", torch.float64), ("reference", torch.float64)):
            given = (x.to(dtype) for x in (q, k, v))
            _, state = attend(policy, *given, budget=BUDGET, prompt=prompt, backend=backend)
            assert kept.setdefault(pooling, held(state)) == held(state)
    assert kept["mean"] != kept["max"]
    for head in range(2):
        scores = np.zeros(prompt - window)
        for h in (2 * head, 2 * head + 1):
            for t in range(prompt - window, prompt):
                logits = (q[0, h, t] @ k[0, head, : t + 1].T).numpy() * 8**-0.5
                scores += definitions.softmax(logits)[: prompt - window]
        best = [max(scores[max(0, j - 2) : j + 3]) for j in range(len(scores))]
        order = sorted(range(len(best)), key=lambda j: (best[j], j))
        assert kept["max"][head] == sorted([*order[len(order) - (BUDGET - window) :], *range(prompt - window, T)])


def test_noise_follows_from_seed_and_positions_and_is_gumbel():
    """Its mean is Euler's constant and its variance pi^2 / 6, and no two of seed, query, key and head share it."""
    positions = torch.arange(400).expand(1, 2, 400)
    p = torch.full((1, 2, 2, 400), 1 / 400, dtype=torch.float64)

    def noise(seed: int, now: int) -> torch.Tensor:
        rows = AttentionRows(p[:, :, :, None], positions, torch.tensor([[[now]]]), p[:, :, 0, :, None])
        return make_policy("keyformer", seed=seed).noise(rows)[:, :, :, 0]

    made = torch.stack([noise(0, now) for now in range(400, 450)])
    assert abs(float(made.mean()) - 0.5772) < 0.01
    assert abs(float(made.var()) - np.pi**2 / 6) < 0.03
    assert torch.equal(noise(0, 400), made[0])
    flat = torch.cat([made.movedim(4, 0).flatten(1).T, noise(1, 400).flatten(0, 2)]).flatten(0, -2)
    correlated = np.corrcoef(flat.numpy()) - np.eye(len(flat))
    assert abs(correlated).max() < 0.3


def test_noise_decides_between_equal_tokens():
    """With a high temperature nearly all tokens get the same attention; with a low one it is H2O's ranking."""
    q, k, v = tensors(6)
    settings = {"recent_share": 0.5}
    kept = [
        held(attend(make_policy("keyformer", tau=tau, seed=seed, **settings), q, k, v, budget=BUDGET)[1])
        for tau, seed in ((1.0, 0), (1.0, 1), (50.0, 0))
    ]
    assert len({str(x) for x in kept}) == 3
    quiet = make_policy("keyformer", **settings)
    object.__setattr__(quiet, "noise", lambda step: 0)
    h2o = attend(make_policy("h2o"), q, k, v, budget=BUDGET)[1]
    assert held(attend(quiet, q, k, v, budget=BUDGET)[1]) == held(h2o)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("curdkv", {"window": 0}, "policy.window=0 is not allowed: .*at least 1"),
        ("lagkv", {"lag": 0}, "policy.lag=0"),
        ("lagkv", {"sinks": -1}, "policy.sinks=-1"),
        ("scissorhands", {"window": 0}, "policy.window=0"),
        ("scissorhands", {"recent": 1.5}, "policy.recent=1.5"),
        ("keyformer", {"tau": 0}, "policy.tau=0 is not allowed: give a number above 0"),
        ("keyformer", {"recent_share": 2}, "policy.recent_share=2"),
        ("keyformer", {"seed": -1}, "policy.seed=-1"),
        ("snapkv", {"pooling": "median"}, "policy.pooling=median is not allowed: give one of mean, max"),
        ("roco", {"varying": 1.5}, "policy.varying=1.5"),
        ("roco", {"recent": -1}, "policy.recent=-1"),
        ("rkv", {"window": 0}, "policy.window=0"),
        ("rkv", {"window": 10**9}, "policy.window=1000000000 is not allowed: .*at most 65,536"),
        ("expected_attention", {"window": 10**9}, "policy.window=1000000000 .*at most 65,536"),
        ("expected_attention", {"future": 10**20}, "policy.future=.*at most 65,536"),
        ("cake", {"window": 10**9}, "policy.window=1000000000"),
        ("scissorhands", {"window": 10**9}, "policy.window=1000000000"),
        ("dms", {"window": 10**20}, "policy.window=1.* is not allowed: .*at most 2,147,483,647"),
        ("roco", {"recent": 10**20}, "policy.recent=1.*at most 2,147,483,647"),
        ("rkv", {"mix": -0.1}, "policy.mix=-0.1"),
        ("expected_attention", {"future": 0}, "policy.future=0"),
        ("expected_attention", {"sinks": -1}, "policy.sinks=-1"),
        ("expected_attention", {"window": 0}, "policy.window=0"),
        ("expected_attention", {"covariance": 1}, "policy.covariance=1 is not allowed: give true or false"),
        ("qfilter", {"file": "nowhere.json"}, "policy.file=nowhere.json is not allowed: .*a2sf calibrate --filters"),
        ("qfilter", {"file": None}, "policy.file=None is not allowed: .*a2sf calibrate --filters"),
        ("qfilter", {"file": {"name": "a", "shape": [1, 1, 2], "filters": "AAAA"}}, "policy.file=.*of that shape"),
        ("chunkkv", {"chunk": 0}, "policy.chunk=0"),
        ("criticalkv", {"first": 2}, "policy.first=2"),
        ("criticalkv", {"epsilon": -1}, "policy.epsilon=-1 is not allowed: give a number, at least 0"),
        ("criticalkv", {"by": "cam"}, "policy.by=cam is not allowed: cam is built on another policy itself"),
        ("chunkkv", {"by": "kvzip"}, "policy.by=kvzip is not allowed: kvzip reads a prompt before it is cut"),
        ("chunkkv", {"by": "cake"}, "policy.by=cake is not allowed: cake reads a prompt before it is cut"),
        ("criticalkv", {"by": "simlayerkv"}, "policy.by=simlayerkv is not allowed: simlayerkv reads a prompt before"),
        ("chunkkv", {"by": "chunkkv"}, "policy.by=chunkkv is not allowed: chunkkv is built on another policy itself"),
        ("chunkkv", {"by": "future"}, "policy.by=future is not allowed: future sees later tokens"),
        ("chunkkv", {"by": "full"}, "policy.by=full is not allowed: full evicts nothing"),
        ("chunkkv", {"by": "snap"}, "policy.by=snap is not allowed: give one of .*did you mean snapkv"),
        ("chunkkv", {"by": 3}, "policy.by=3 is not allowed: give the name of a policy, or a mapping"),
        ("chunkkv", {"by": {"window": 3}}, "policy.by=.* give the name of a policy, or a mapping"),
        ("chunkkv", {"by": {"name": "h2o", "window": 3}}, "policy.by.window=3 is not allowed: h2o has recent_share"),
        ("chunkkv", {"by": {"name": "snapkv", "window": 0}}, "policy.window=0"),
    ],
)
def test_settings_that_are_refused(name, settings, said):
    with pytest.raises(ConfigError, match=said):
        make_policy(name, **settings)


def test_a_policy_whose_heads_differ_cannot_be_ranked_otherwise():
    policy = make_policy("chunkkv", by={"name": "heads", "heads": [[0, 1]]})
    with pytest.raises(ConfigError, match=r"policy.by=heads is not allowed: its key/value heads differ"):
        attend(policy, *tensors(0), budget=BUDGET)


@dataclass(frozen=True, kw_only=True)
class Sees(Policy):
    """Fails where it does not see what it asks for."""

    name, label, unrotated, projected = "sees", "Sees", True, True

    def retention(self, budget, layer):
        return Retention(budget=budget // 2, recent=1)

    def priorities(self, step):
        assert step.rotary is not None
        return step.scores * step.projection.lengths(step.values)


@dataclass(frozen=True, kw_only=True)
class BelowZero(Policy):
    name, label, uses_budget = "below_zero", "Below zero", False

    def retention(self, budget, layer):
        return Retention(budget=4, recent=4, rule=Rule(threshold=0.5))


@pytest.mark.parametrize("name", ["chunkkv", "criticalkv", "cam"])
def test_a_policy_under_another_sees_what_it_asks_for_and_has_its_budget(name):
    model = shared("llama")
    cache = PrunedCache(model, make_policy(name, by=f"{__name__}:Sees"), 12)
    with torch.no_grad():
        model(torch.arange(3, 33)[None], cache=cache)
    assert {n for i in range(3) for n in cache.state(i).counts[0].tolist()} == {6}
    with pytest.raises(ConfigError, match=r"policy.by=below_zero is not allowed: below_zero has no budget"):
        make_policy(name, by=f"{__name__}:BelowZero")


def test_an_error_in_an_object_that_is_called_names_its_class():
    step = Step(*(torch.zeros(1, 1, 4) for _ in range(8)))
    with pytest.raises(PolicyError, match=r"^InTwoParts fails: AssertionError"):
        call_policy(make_policy("criticalkv", by="h2o").retention(2, 0).rule.priority_fn, step)


def test_of_equal_priorities_criticalkv_evicts_the_oldest_whatever_the_order_of_columns():
    step = Step(
        probabilities=torch.ones(1, 1, 1, 4),
        keys=torch.ones(1, 1, 4, 2),
        values=torch.ones(1, 1, 4, 2),
        positions=torch.tensor([[[2, 0, 3, 1]]]),
        cached=torch.ones(1, 1, 4, dtype=torch.bool),
        now=torch.tensor([[[3]]]),
        scores=torch.ones(1, 1, 4),
        memory=torch.ones(1, 1, 4, 0),
        budget=torch.tensor([[[2]]]),
        evictable=torch.ones(1, 1, 4, dtype=torch.bool),
    )
    priority, _ = make_policy("criticalkv", by="h2o").retention(2, 0).rule.priority_fn(step)
    assert priority.isinf().tolist() == [[[False, False, True, False]]]


def test_a_policy_that_uses_another_has_its_schedules_and_identity():
    policy = make_policy("chunkkv", by={"name": "h2o", "recent_share": 0.25})
    assert policy.schedules == make_policy("h2o").schedules
    assert make_policy("chunkkv").schedules == ("prompt",)
    assert policy == make_policy("chunkkv", by={"recent_share": 0.25, "name": "h2o"})
    assert hash(policy) != hash(make_policy("chunkkv", by="h2o"))
    assert policy.stored_settings() == {"by": {"name": "h2o", "recent_share": 0.25, "version": 1}, "chunk": 20}
    assert make_policy("chunkkv", by="pyramidkv").layer_budget(64, 0, 4) > 64
    with pytest.raises(ValueError, match="pooling must be one of mean, max"):
        Cut(pooling="median")


@pytest.mark.parametrize(("name", "setting"), [("dms", "window"), ("snapkv", "window"), ("curdkv", "window")])
def test_a_window_longer_than_the_text_is_the_text(name, setting):
    q, k, v = tensors(8)
    ends = []
    for window in (T, 2**31 - 1):
        policy = make_policy(name, **{setting: window})
        budget = BUDGET if policy.uses_budget else None
        more = {"schedule": "prompt", "prompt": T} if "step" not in policy.schedules else {}
        ends.append(attend(policy, q, k, v, budget=budget, **more)[1])
    assert torch.equal(ends[0].positions, ends[1].positions)


def test_a_policy_of_ones_own_that_sees_too_many_queries_is_refused():
    policy = make_policy("rkv")
    object.__setattr__(policy, "window", 10**9)
    with pytest.raises(ConfigError, match="queries of 1,000,000,000 last tokens, and at most 65,536 are stored"):
        policy.keeps(BUDGET)
