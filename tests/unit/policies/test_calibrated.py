"""Settings per layer and head from a file: what is refused, what they come to, and that heads are computed as alone."""

from __future__ import annotations

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from a2sf import Budget, Schedule, attend, evicting_attention, make_policy
from a2sf.engine.invariants import INVARIANTS, SCHEDULES, case
from a2sf.errors import ConfigError
from a2sf.policies.base import Retention
from a2sf.policies.rule import Head, Rule
from a2sf.policies.slots import apportion, head_slots
from a2sf.scoring.passes.full_cache_prefix import cached_tokens, full_cache_prefix

HEADS = [
    {"forgetting_factor": 0.5, "recent_share": 0.5, "sinks": 1, "mean_over_age": False, "share": 1.4},
    {"forgetting_factor": 0.9, "recent_share": 0.0, "sinks": 0, "mean_over_age": True, "share": 0.6},
]
LAYERS = [{"forgetting_factor": 0.3, "sinks": 2, "share": 0.5}, {"share": 1.5, "heads": HEADS}]
CONTENT = {"name": "small", "layers": LAYERS, "made": {"text": "whatever"}}
EVEN = [{**head, "share": 1.0} for head in HEADS]


@given(total=st.integers(5, 4000), weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5))
def test_slots_are_apportion_to_the_last_one(total, weights):
    slots = apportion(total, tuple(weights))
    assert sum(slots) == total
    assert min(slots) >= 1
    for slot, weight in zip(slots, weights, strict=True):
        assert abs(slot - 1 - (total - len(weights)) * weight / sum(weights)) < 1


def test_a_file_is_read_at_once_and_its_content_is_what_identifies_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(CONTENT))
    policy = make_policy("calibrated", file=str(path))
    path.unlink()
    assert (
        policy.file == make_policy("calibrated", file=CONTENT).file == make_policy("calibrated", file=policy.file).file
    )
    assert set(policy.file) == {"name", "layers"}  # where it came from moves no number
    assert [policy.layer_budget(10, layer, 2) for layer in range(2)] == [6, 14]
    assert policy.keeps(10, 0, 2) == Retention(budget=6, sinks=2, forgetting_factor=0.3)
    kept = policy.keeps(10, 1, 2)
    assert kept == Retention(budget=14, rule=Rule(heads=tuple(Head(**h) for h in HEADS)))
    assert head_slots(kept.rule.heads, 14) == ((19, 9, 1), (9, 0, 0))
    # the smaller head evicts first, and that is where sequences stop to share a beginning
    assert full_cache_prefix([kept], Schedule(), 5, 2) == 9
    assert cached_tokens(kept, Schedule(), 100, 5, 2) == 14
    assert cached_tokens(kept, Schedule(), 12, 5, 2) == (12 + 9) / 2


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, "policy.file=None is not allowed: give a file that `a2sf calibrate` wrote"),
        ("nowhere.yaml", "policy.file=nowhere.yaml is not allowed: give a file .*No such file"),
        ({"layers": LAYERS}, "this has no name, or no list of layers"),
        (
            {"name": "x", "layers": [{"factor": 1}]},
            "layer 0 may have only these settings: share, forgetting_factor, ",
        ),
        (
            {"name": "x", "layers": [{"forgetting_factor": 1.5}]},
            "forgetting_factor 1.5 of layer 0 must be a number from 0",
        ),
        ({"name": "x", "layers": [{"heads": [{"share": 0}]}]}, "share 0 of layer 0, head 0 must be a number above 0"),
        ({"name": "x", "layers": [{"sinks": -1}]}, "layer 0 needs a whole number of sinks"),
        ({"name": "x", "layers": [{"heads": HEADS, "sinks": 1}]}, "layer 0 may have only share and heads"),
    ],
)
def test_files_that_are_refused(file, message):
    with pytest.raises(ConfigError, match=message):
        make_policy("calibrated", file=file)


def test_a_file_must_fit_the_model():
    policy = make_policy("calibrated", file=CONTENT)
    policy.check(2, 2)
    with pytest.raises(
        ConfigError, match=r"policy.file=small is not allowed: it was calibrated for a model of 2 layers"
    ):
        policy.check(3, 2)
    with pytest.raises(ConfigError, match=r"settings for 2 key/value heads a layer, and this model has 3"):
        policy.check(2, 3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), budget=st.integers(2, 9), schedule=st.sampled_from(SCHEDULES))
def test_each_head_is_as_if_it_were_alone(seed, budget, schedule):
    """The oracle is the readable reference, one head at a time."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, 20, 8, generator=g) for n in (4, 2, 2))
    policy = make_policy("calibrated", file={"name": "x", "layers": [LAYERS[1]]})
    prompt = torch.tensor([7, 25])
    output, state = attend(policy, q, k, v, budget=budget, schedule=schedule, prompt=prompt)
    for h, (C, recent, sinks) in enumerate(head_slots(policy.layers[0].heads, budget)):
        one = {**HEADS[h], "share": 1.0}
        name, numbers = "mean_attention" if one["mean_over_age"] else "a2sf", {"recent": recent, "sinks": sinks}
        alone = make_policy(name, forgetting_factor=one["forgetting_factor"], recent_share=0.0, **numbers)
        parts = (q[:, 2 * h : 2 * h + 2], k[:, h : h + 1], v[:, h : h + 1])
        settings_ = {"budget": C, "schedule": schedule, "prompt": prompt, "backend": "reference"}
        want, its = attend(alone, *parts, **settings_)
        torch.testing.assert_close(output[:, 2 * h : 2 * h + 2], want, atol=1e-5, rtol=1e-4)
        slots = its.positions.shape[-1]
        assert torch.equal(state.positions[:, h, :slots], its.positions[:, 0])
        assert bool((state.positions[:, h, slots:] == -1).all())


@pytest.mark.parametrize("name", [n for n in INVARIANTS if not n.startswith(("1", "6"))])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_invariants_with_heads_of_their_own(name, schedule):
    """The first and sixth hold where all shares are equal (below), since a small share evicts earlier."""
    INVARIANTS[name](case(make_policy("calibrated", file={"name": "x", "layers": [LAYERS[1]]}), schedule, 3))


@pytest.mark.parametrize("name", [n for n in INVARIANTS if n.startswith(("1", "6"))])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_invariants_of_full_budgets(name, schedule):
    INVARIANTS[name](case(make_policy("calibrated", file={"name": "x", "layers": [{"heads": EVEN}]}), schedule, 3))


def test_heads_with_the_same_numbers_are_the_layer_itself():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 30, 8, generator=g) for n in (4, 2, 2))
    policy = make_policy("calibrated", file={"name": "x", "layers": [{"heads": [HEADS[0], HEADS[0]]}]})
    output, _ = attend(policy, q, k, v, budget=8)
    want, _ = evicting_attention(q, k, v, budget=8, recent=4, sinks=1, forgetting_factor=0.5)
    assert torch.equal(output, want)


@pytest.mark.parametrize("more", [{"shared": True}, {"full_heads": (0,)}, {"mean_over_age": True}])
def test_heads_of_their_own_share_nothing(more):
    with pytest.raises(ValueError, match="heads cannot be combined"):
        Rule(heads=(Head(), Head()), **more)


def test_a_bounded_cache_holds_heads_of_their_own():
    """Reading a text through a cache, in two chunks and a token, is reading it at once."""
    from a2sf import PrunedCache, pruning
    from tests.models import small

    model = small("llama")
    layers = [{"forgetting_factor": 0.3}, {"heads": HEADS}, {"mean_over_age": True, "recent_share": 0.5}]
    policy, budget = make_policy("calibrated", file={"name": "x", "layers": layers}), Budget(tokens=6)
    ids = torch.randint(3, 97, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        with pruning(model, policy, budget):
            want = model(ids, use_cache=False).logits
        cache = PrunedCache(model, policy, budget)
        got = [model(ids[:, a:b], cache=cache).logits for a, b in ((0, 10), (10, 23), (23, 24))]
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-4, rtol=1e-3)
    assert (cache.state(1).positions >= 0).sum(-1).tolist() == [
        [C for C, _, _ in head_slots(policy.layers[1].heads, 6)]
    ]


def test_a_cell_is_named_by_what_the_file_holds(tmp_path):
    """Not by its path: another file of the same content is the same cell, the same path with other content is not."""
    from a2sf.hf.loading import ModelSpec
    from a2sf.sweep.cell import Cell
    from a2sf.tasks.spec import DataSpec
    from tests.conftest import SMOLLM2

    def cell(name: str, content: dict) -> str:
        (tmp_path / name).write_text(yaml.safe_dump(content))
        policy, data = make_policy("calibrated", file=str(tmp_path / name)), DataSpec(source="bundle", content="x")
        return Cell("small", ModelSpec(SMOLLM2), policy, Budget(ratio=0.2), "piqa", 0, 5, 0, data).id

    first = cell("a.yaml", CONTENT)
    assert cell("b.yaml", CONTENT | {"made": {}}) == first
    assert cell("a.yaml", CONTENT | {"layers": [*LAYERS, *LAYERS]}) != first
