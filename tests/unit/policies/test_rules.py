"""Policies' settings, schedules and rules of one's own: what they say, and what is refused in one sentence."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from a2sf import Policy, Retention, Rule, Schedule, Step, attend, make_policy
from a2sf.engine import kernels
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import EvictionState, Options, Segments
from a2sf.errors import ConfigError
from a2sf.policies.base import check_name
from a2sf.policies.find import find_policies
from a2sf.policies.ranking import of_columns
from a2sf.policies.rule import Cut
from a2sf.policies.schedule import schedule_for
from tests.own_policies import Steady


def tensors(tokens: int = 12):
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 4, tokens, 8, generator=g),
        *(torch.randn(1, 2, tokens, 8, generator=g) for _ in range(2)),
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"when": "often"}, "schedule.when=often is not allowed: give one of step, every, prompt"),
        ({"when": "every", "every": 0}, "schedule.every=0 is not allowed: .*at least 1"),
        ({"when": "every", "every": 2.5}, "schedule.every=2.5"),
        ({"when": "prompt", "then": "stop"}, "schedule.then=stop is not allowed: give one of keep, step"),
    ],
)
def test_schedules_that_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Schedule(**settings)


@pytest.mark.parametrize("more", [{"shared": True}, {"cut": Cut(floor=0.5)}])
def test_heads_that_keep_everything_share_nothing(more):
    with pytest.raises(ValueError, match="full_heads cannot be combined"):
        Rule(full_heads=(0,), **more)
    assert Rule(full_heads=(0,), cut=Cut()).full_heads == (0,)


def test_a_policy_is_refused_with_a_schedule_that_it_does_not_know():
    for cls in find_policies().values():
        policy = cls()
        assert schedule_for(policy, None).when == ("step" if "step" in cls.schedules else cls.schedules[0])
        for when in ("step", "every", "prompt"):
            if when in cls.schedules:
                assert schedule_for(policy, Schedule(when)).when == when
                continue
            with pytest.raises(
                ConfigError, match=f"schedule.when={when} is not allowed: the policy {cls.name} supports only"
            ):
                attend(policy, *tensors(), budget=4, schedule=Schedule(when), prompt=3)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("snapkv", {"window": 0}, "policy.window=0 is not allowed: .*at least 1"),
        ("snapkv", {"kernel": 0}, "policy.kernel=0 is not allowed: give an odd number"),
        ("pyramidkv", {"kernel": 4}, "policy.kernel=4 is not allowed: give an odd number"),
        ("pyramidkv", {"beta": 0}, "policy.beta=0"),
        ("adakv", {"floor": 1.5}, "policy.floor=1.5 is not allowed: give a number from 0 to 1"),
        ("adakv", {"floor": -0.1}, "policy.floor=-0.1"),
        ("h2o", {"recent_share": 2}, "policy.recent_share=2"),
        ("vatp", {"recent_share": float("nan")}, "policy.recent_share=nan"),
        ("vatp", {"sinks": -1}, "policy.sinks=-1"),
        ("a2sf", {"recent": -1}, "policy.recent=-1"),
        ("a2sf", {"recent": 3, "recent_share": 0.5}, "policy.recent=3 is not allowed: give recent or recent_share"),
        ("random", {"seed": -1}, "policy.seed=-1"),
        ("heads", {"heads": [[0]]}, r"policy.heads=\[\[0\]\] is not allowed: give a list of \[layer, head\] pairs"),
        ("heads", {"heads": "nowhere.json"}, "policy.heads=nowhere.json is not allowed: .*No such file"),
        ("mean_attention", {"forgetting_factor": 2}, "forgetting_factor=2"),
        ("h2o", {"recent_shares": 0.5}, "policy.recent_shares=0.5 is not allowed: h2o has .*did you mean recent_share"),
        ("h2", {}, r"policy=h2 is not allowed: give one of .*\(did you mean h2o"),
    ],
)
def test_settings_that_are_refused(name, settings, said):
    with pytest.raises(ConfigError, match=said):
        make_policy(name, **settings)


def test_heads_must_fit_the_model(tmp_path):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps([[1, 0], [0, 1], [0, 1]]))
    policy = make_policy("heads", heads=str(path), sinks=1)
    path.unlink()  # read once
    assert policy.heads == ((0, 1), (1, 0))
    policy.check(2, 2)
    with pytest.raises(ConfigError, match=r"policy.heads=\[1, 0\] is not allowed: the model has 1 layers of 2"):
        attend(policy, *tensors(), budget=4, layer=0, layers=1)
    with pytest.raises(
        ConfigError, match=r"policy.heads=\[0, 1\] is not allowed: the model has 2 layers of 1 key/value"
    ):
        policy.check(2, 1)
    _, state = attend(policy, *tensors(), budget=4, layer=0, layers=2)
    assert state.positions[0].tolist() == [[0, 9, 10, 11] + [-1] * 8, list(range(12))]
    path.write_text("[[1, 0]")
    with pytest.raises(ConfigError, match=r"heads\.json is not allowed"):
        make_policy("heads", heads=str(path))


@pytest.mark.parametrize("layers", [1, 2, 3, 12, 30, 32])
@pytest.mark.parametrize("budget", [1, 5, 33, 64, 205])
def test_shifting_slots_between_layers_keeps_their_sum(layers, budget):
    for cls in find_policies().values():
        policy = cls()
        shares = [policy.layer_budget(budget, layer, layers) for layer in range(layers)]
        assert sum(shares) == layers * budget
        assert min(shares) >= 1
        assert shares == sorted(shares, reverse=True)


def test_the_pyramid_is_linear_from_first_to_last():
    policy = make_policy("pyramidkv", window=4, beta=20)
    shares = [policy.layer_budget(104, layer, 20) for layer in range(20)]
    assert (shares[0], shares[-1]) == (4 + 195, 4 + 5)  # 2 * 100 - 100 / 20, and 100 / 20
    steps = [a - b for a, b in pairwise(shares)]
    assert all(abs(step - 10) <= 1 for step in steps)


PYRAMIDS = json.loads((Path(__file__).parents[2] / "vectors" / "policies" / "pyramidkv_budgets.json").read_text())


@pytest.mark.parametrize("case", PYRAMIDS, ids=lambda c: f"{c['C']}-of-{c['prompt']}")
def test_a_pyramid_holds_no_more_than_the_prompt(case):
    """The first and the last layer as an independent program has them, rounded by less than a slot."""
    policy, layers = make_policy("pyramidkv", window=case["window"], beta=case["beta"]), case["layers"]
    shares = [policy.layer_budget(case["C"], layer, layers, case["prompt"]) for layer in range(layers)]
    assert abs(shares[0] - case["first"]) < 1
    assert abs(shares[-1] - case["last"]) < 1
    assert sum(shares) == case["sum"] == layers * case["C"]


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("prompt", [2, 20, 101])
def test_a_budget_below_the_prompt_is_spent(prompt, layers):
    for cls in find_policies().values():
        for budget in range(1, prompt):
            shares = [cls().layer_budget(budget, layer, layers, prompt) for layer in range(layers)]
            assert sum(shares) == sum(min(prompt, n) for n in shares) == layers * budget
            assert shares == sorted(shares, reverse=True)
        for budget in (prompt, prompt + 7):  # nothing is cut
            assert [cls().layer_budget(budget, layer, layers, prompt) for layer in range(layers)] == [budget] * layers


def test_a_layer_is_cut_to_what_its_prompt_leaves_it():
    """Budgets of four fifths are spent by `attend`, row by row: each has its own prompt."""
    policy, q, k, v = make_policy("pyramidkv", window=4), *(torch.cat([x, x.flip(2)]) for x in tensors(60))
    budget, prompt = torch.tensor([40, 32]), torch.tensor([50, 40])
    held = torch.zeros(2, dtype=torch.int64)
    for layer in range(5):
        _, state = attend(policy, q, k, v, budget=budget, prompt=prompt, layer=layer, layers=5)
        held += (state.positions >= 0).sum(-1)[:, 0]
    assert held.tolist() == [5 * (40 + 10), 5 * (32 + 20)]


def divided(rule: Rule) -> list[list[int]]:
    """What each head keeps of a prompt at a cut of that rule."""
    known = type("Named", (), {"name": "own", "label": "Own", "schedules": ("prompt",)})

    @dataclass(frozen=True, kw_only=True)
    class Own(known, Policy):
        def retention(self, budget: int, layer: int) -> Retention:
            return Retention(budget=budget, recent=4, rule=rule)

    _, state = attend(Own(), *tensors(40), budget=14, prompt=40)
    return [[p for p in head if p >= 0] for head in state.positions[0].tolist()]


@pytest.mark.parametrize("floor", [None, 0.0, 0.2, 1.0])
def test_a_cut_ranks_by_the_rule(floor):
    def long(keys, values, positions):
        return 100 * values.norm(dim=-1)

    def short(keys, values, positions):
        return -long(keys, values, positions)

    cut = Cut(floor=floor)
    kinds = (
        [Rule(cut=cut)],
        [Rule(weight=f, cut=cut) for f in (long, short)],
        [Rule(bias=f, scored=False, cut=cut) for f in (long, short)],
        [Rule(priority_fn=lambda step, f=f: f(step.keys, step.values, None), cut=cut) for f in (long, short)],
    )
    (plain,), (heavy, light), (longest, shortest), (same, other) = ([divided(r) for r in kind] for kind in kinds)
    assert all(a != b for a, b in pairwise([plain, heavy, light, longest, shortest, heavy]))
    assert (same, other) == (longest, shortest)
    assert sum(map(len, plain)) == 28


def test_ties_go_to_the_newest_and_then_to_the_lower_head():
    """Two heads of equal priorities: the slot that is left over is the lower one's, and both keep the newest."""

    def none(keys, values, positions):
        return torch.zeros_like(keys[..., 0])

    for floor in (0.0, 0.5):
        kept = divided(Rule(bias=none, scored=False, cut=Cut(floor=floor)))
        assert kept == [list(range(26, 40))] * 2

    def odd(keys, values, positions):  # head 0 wins 11 of 20, so that the shares are 10.5 and 9.5
        return (positions < 1).to(keys.dtype) * (torch.arange(2) == 0)[:, None]

    kept = divided(Rule(bias=odd, scored=False, cut=Cut(floor=0.5)))
    assert kept == [[0, *range(26, 40)], list(range(27, 40))]


@pytest.mark.parametrize("wrong", [{"floor": -0.1}, {"floor": 1.5}, {"kernel_size": 4}, {"kernel_size": 0}])
def test_cuts_that_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        Cut(**wrong)
    with pytest.raises(ValueError, match="shared cannot be combined"):
        Rule(shared=True, cut=Cut(floor=0.5))


def test_a_small_budget_is_shared_without_breaking():
    for cls in find_policies().values():
        for budget in range(1, 8):
            kept = cls().keeps(budget)
            assert kept.recent + kept.sinks <= kept.budget


@pytest.mark.parametrize("share", [0.29, 0.57, 0.58, 1.0])
def test_shares_are_exact_in_decimal(share):
    """0.29 of 100 tokens is 29, though 0.29 * 100 < 29 in binary."""
    for name in ("a2sf", "h2o", "mean_attention", "vatp"):
        assert make_policy(name, recent_share=share).keeps(100).recent == min(
            round(100 * share), 100 - 4 * (name == "vatp")
        )


def own(priorities, memory: int = 0, name: str = "own") -> Policy:
    """A policy of one's own with this rule; its name is inherited, so that other tests do not find it."""
    known = type("Named", (), {"name": name, "label": "Own"})

    @dataclass(frozen=True, kw_only=True)
    class Own(known, Policy):
        def retention(self, budget: int, layer: int) -> Retention:
            return Retention(budget=budget)

    Own.memory, Own.priorities = memory, priorities
    return Own()


def changes(self, step: Step):
    step.keys.mul_(2)
    return step.scores


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("rule", "memory", "said"),
    [
        (
            lambda self, step: step.scores.sum(-1),
            0,
            r"returns priorities of shape \(1, 2\), and \(1, 2, \d+\) is needed",
        ),
        (lambda self, step: None, 0, "returns priorities of shape NoneType"),
        (lambda self, step: step.scores * torch.nan, 0, "returns NaN among its priorities"),
        (lambda self, step: (step.scores, step.memory * torch.nan), 1, "returns NaN among its memory"),
        (lambda self, step: (step.scores, step.scores), 1, r"returns memory of shape \(1, 2, \d+\)"),
        (changes, 0, "changes the step's keys in place, and must not; work on a copy"),
    ],
)
def test_own_rules_that_misbehave(rule, memory, said, backend, inference):
    with torch.inference_mode(inference), pytest.raises(ValueError, match=said):
        attend(own(rule, memory), *tensors(), budget=4, backend=backend)


def test_nan_where_nothing_is_cached_is_no_error():
    def some(self, step: Step):
        return step.scores / step.cached  # 0 / 0

    out, _ = attend(own(some), *tensors(), budget=4)
    want, _ = attend(make_policy("a2sf", forgetting_factor=1.0), *tensors(), budget=4)
    torch.testing.assert_close(out, want)


def test_own_policies_need_a_name_that_is_free():
    with pytest.raises(ConfigError, match="needs a name and a label"):
        attend(own(lambda self, step: step.scores, name=""), *tensors(), budget=4)
    with pytest.raises(
        ConfigError, match=r"policy=h2o is not allowed: .*needs another name, because baselines\.h2o\.H2O"
    ):
        attend(own(lambda self, step: step.scores, name="h2o"), *tensors(), budget=4)
    for cls in find_policies().values():
        check_name(cls)


def test_what_is_needed_is_reported():
    q, k, v = tensors()
    policy = make_policy("h2o")
    with pytest.raises(ConfigError, match="budget=None is not allowed: the policy h2o needs"):
        attend(policy, q, k, v)
    with pytest.raises(ConfigError, match="budget=0 is not allowed"):
        attend(policy, q, k, v, budget=0)
    with pytest.raises(ConfigError, match="prompt=None is not allowed"):
        attend(policy, q, k, v, budget=3, schedule=Schedule("prompt"))
    with pytest.raises(ConfigError, match="prompt=0 is not allowed"):
        attend(policy, q, k, v, budget=3, schedule=Schedule("prompt"), prompt=0)
    with pytest.raises(ConfigError, match="layer=3 is not allowed"):
        attend(policy, q, k, v, budget=3, layer=3, layers=3)
    with pytest.raises(ConfigError, match="one factor per layer"):
        attend(make_policy("a2sf", forgetting_factor=[0.1, 0.2]), q, k, v, budget=3)
    out, _ = attend(make_policy("full"), q, k, v)
    assert out.shape == q.shape


def test_a_state_continues_with_the_policy_that_made_it():
    q, k, v = tensors()
    _, plain = attend(make_policy("h2o"), q, k, v, budget=4)
    _, remembered = attend(Steady(), q, k, v, budget=4)
    assert remembered.memory.shape == (1, 2, 4, 1)
    for policy, state in ((Steady(), plain), (make_policy("h2o"), remembered)):
        with pytest.raises(ValueError, match="made by another policy"):
            attend(policy, q, k, v, budget=4, state=state)
    with pytest.raises(ValueError, match="one set of tokens per layer"):
        attend(make_policy("tova"), q, k, v, budget=4, state=plain)
    with pytest.raises(ValueError, match="is not one of 2 rows"):
        attend(make_policy("h2o"), *(x.expand(2, -1, -1, -1) for x in (q, k, v)), budget=4, state=plain)
    for backend in ("torch", "numba"):
        with pytest.raises(ValueError, match="keys of 2"):
            attend(make_policy("h2o"), q[..., :2], k[..., :2], v, budget=4, state=plain, backend=backend)


def test_memory_travels_with_its_tokens():
    q, k, v = tensors()
    _, state = attend(Steady(), *(torch.cat([x, x.flip(2)]) for x in (q, k, v)), budget=4)
    turned = EvictionState.stack([state.select(torch.tensor([1])), state.select(torch.tensor([0])).pad(6)])
    assert torch.equal(turned.memory[:, :, :4], state.memory[[1, 0]])
    assert not turned.memory[:, :, 4:].any()
    assert torch.equal(state.heads(torch.tensor([1])).memory, state.memory[:, 1:])


def test_an_upper_mark_sees_whole_sequences_only():
    kept = make_policy("future").keeps(4)
    one = torch.tensor([0, 0])
    rows = Segments.of_rows(BatchRetention.of([kept] * 2), torch.tensor([6, 6]), torch.tensor([0, 6]))
    tree = replace(rows, row=one, parent=torch.tensor([-1, 0]))
    with pytest.raises(ValueError, match="each sequence as one segment"):
        kernels.attend(*tensors(), tree, Options(1.0))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_traces_of_steps_that_evict_several(backend):
    q, k, v = tensors(20)
    kept = make_policy("a2sf").keeps(5)
    for schedule, prompt in ((Schedule("every", every=4), None), (Schedule("prompt", then="step"), torch.tensor([12]))):
        segments = Segments.of_rows(BatchRetention.of([kept], schedule, prompt), torch.tensor([20]))
        got = kernels.attend(q, k, v, segments, Options(0.3, True, True), backend=backend)
        steps, times = got.cuts[got.cuts[:, 1] == 0, 2].unique(return_counts=True)
        if prompt is None:
            assert steps.tolist() == [8, 12, 16]
            assert times.tolist() == [4, 4, 4]
            assert (got.evicted == -1).all()
        else:
            assert (steps.tolist(), times.tolist()) == ([11], [7])
            assert (got.evicted[0, 0] >= 0).tolist() == [False] * 12 + [True] * 8
        for head in range(2):
            evicted = {*got.evicted[0, head].tolist()} | {*got.cuts[got.cuts[:, 1] == head, 3].tolist()}
            assert sorted({*range(20)} - evicted) == [p for p in got.state.positions[0, head].tolist() if p >= 0]


def test_the_examples_of_the_docs_run():
    text = (Path(__file__).parents[3] / "docs" / "rules.md").read_text()
    examples = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    q, k, v = (torch.cat([x, x.flip(2)]) for x in tensors(30))
    made = []
    for example in examples:
        names: dict = {"__name__": __name__}
        exec(example, names)
        made += [x for x in names.values() if isinstance(x, type) and issubclass(x, Policy) and x is not Policy]
        _, state = attend(made[-1](), q, k, v, budget=torch.tensor([6, 7]))
        assert (state.positions >= 0).sum(-1).tolist() == [[6, 6], [7, 7]]
    assert [cls.name for cls in made] == ["long_values", "steady", "summed"]
    assert len(examples[1].split("@dataclass")[1].strip().splitlines()) <= 20
    out, want = (attend(policy, q, k, v, budget=6)[0] for policy in (made[1](), Steady()))
    assert torch.equal(out, want)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("schedule", [Schedule(), Schedule("every", every=4), Schedule("prompt", then="step")])
def test_what_a_step_shows(schedule, backend):
    """Columns without a token are empty, also where one was; what is kept per token starts at 0."""
    steps = []

    def look(self, step: Step):
        steps.append(step)
        away = ~step.cached
        assert (step.positions == -1).equal(away)
        for name in ("keys", "values", "scores", "memory"):
            assert not getattr(step, name)[away].any()
        assert not step.probabilities.sum(2)[away].any()
        torch.testing.assert_close(step.probabilities.sum(-1), torch.ones(1, 2, 2))
        newest = step.cached & (step.ages == 0)
        assert newest.sum(-1).eq(1).all()
        assert not step.memory[newest].any()
        assert (step.memory[..., 0] == step.ages.where(step.cached, 0)).all()
        return step.scores, (step.memory + 1).where(step.cached[..., None], torch.nan)

    attend(own(look, memory=1), *tensors(24), budget=5, schedule=schedule, prompt=13, backend=backend)
    assert len(steps) == 24


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 7, 4), (1, 1, 7, 2, 3), (2, 3, 0, 4)])
def test_tokens_in_another_order_are_what_gather_gives(shape):
    x = torch.arange(math.prod(shape)).reshape(shape).float()
    x = torch.cat([x, x], 2)[:, :, : shape[2]]  # a view of a part
    order = torch.rand(shape[:3]).argsort(-1)[:, :, :5]
    index = order[(..., *[None] * (x.ndim - 3))].expand(*order.shape, *shape[3:])
    assert torch.equal(of_columns(x, order), x.gather(2, index))
