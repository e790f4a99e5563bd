"""Names of the previous version in a user's own policy: they work, with one notice each that gives the new name."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from a2sf import Rule, attend, make_policy
from a2sf.errors import Notice
from a2sf.policies.find import find_policy
from a2sf.policies.renamed import notice
from a2sf.policies.rule import Cut, Head
from baselines.pyramidkv import PyramidKV

OLD = """
from dataclasses import dataclass
from a2sf import Policy, Retention, Rule

@dataclass(kw_only=True)
class Old(Policy):
    name, label = "old", "Old"

    @property
    def least_budget(self):
        return 3

    def of_layer(self, budget, layer, layers, prompt=None):
        return budget + 1 - 2 * (layer % 2) if layers == 2 else budget

    def retention(self, budget, layer):
        return Retention(budget=budget, recent=2, rule=Rule(counted=True, by_age=True, whole=(1,)))

@dataclass(kw_only=True)
class Seer(Policy):
    name, label, causal, schedules = "seer", "Seer", False, ("step",)

    def retention(self, budget, layer):
        return Retention(budget=budget)

    def foresee(self, sequence):
        return sequence.value[..., :1, None].expand(-1, -1, -1, -1, 1)[..., 0]

    def priorities(self, step):
        return step.memory[..., 0]
"""
NEW = (
    OLD.replace("least_budget", "min_budget")
    .replace("of_layer", "layer_budget")
    .replace("counted", "count_above_uniform")
    .replace("by_age", "mean_over_age")
    .replace("whole", "full_heads")
    .replace("foresee", "precompute")
    .replace("(kw_only", "(frozen=True, kw_only")
    .replace('"old"', '"new"')
    .replace('"seer"', '"new seer"')
)


@pytest.fixture(autouse=True)
def _nothing_was_noticed():
    notice.cache_clear()


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "old_names.py").write_text(OLD)
    (tmp_path / "new_names.py").write_text(NEW)
    yield tmp_path
    for name in ("old_names", "new_names"):
        sys.modules.pop(name, None)


def test_a_users_file_with_old_names(site):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 20, 8, generator=g) for n in (4, 2, 2))

    def outputs(module):
        policies = [find_policy(f"{module}:{name}")() for name in ("Old", "Seer")]
        return policies, [attend(p, q, k, v, budget=8, layer=i, layers=2)[0] for p in policies for i in (0, 1, 0)]

    with pytest.warns(Notice) as notices:
        (old, _), got = outputs("old_names")
    texts = [str(w.message).partition(";")[0] for w in notices]
    assert len(texts) == len(set(texts))  # one for each name
    assert set(texts) == {
        "Old.least_budget is now called min_budget",
        "Old.of_layer is now called layer_budget",
        "Seer.foresee is now called precompute",
        "Rule(counted=…) is now called count_above_uniform",
        "Rule(by_age=…) is now called mean_over_age",
        "Rule(whole=…) is now called full_heads",
    }
    (new, _), want = outputs("new_names")  # a notice would be an error
    assert all(map(torch.equal, got, want))
    assert (new.min_budget, new.layer_budget(8, 0, 2)) == (old.min_budget, old.layer_budget(8, 0, 2)) == (3, 9)


def test_a_subclass_calls_the_old_name_of_what_it_overrides():
    with pytest.warns(Notice, match=r"Steep\.of_layer is now called layer_budget"):

        class Steep(PyramidKV):
            name, label = "steep", "Steep"

            def of_layer(self, budget, layer, layers, prompt=None):
                return super().of_layer(budget, layer, layers, prompt)

    plain = make_policy("pyramidkv", window=2)
    assert [Steep(window=2).keeps(10, i, 4) for i in range(4)] == [plain.keeps(10, i, 4) for i in range(4)]


def test_fields_are_read_and_replaced_by_their_old_names():
    def first(step):
        return step.scores

    def old_names():
        rule = Rule(priority_fn=first, full_heads=(1,))
        return [
            (rule.own, rule.whole, Cut(5).pooled),
            (replace(rule, own=None, counted=True), Cut(pooled=5), Head(by_age=True)),
        ]

    with pytest.warns(Notice) as notices:
        read, made = old_names()
    assert len(notices) == 7
    assert read == (first, (1,), 5)
    assert made == (Rule(count_above_uniform=True, full_heads=(1,)), Cut(5), Head(mean_over_age=True))
    with pytest.raises(TypeError, match="unexpected keyword argument 'unknown'"):
        Rule(unknown=1)


def test_a_calibrated_file_of_the_previous_version():
    with pytest.warns(Notice, match=r"by_age in policy\.file is now called mean_over_age") as notices:
        old = make_policy("calibrated", file={"name": "x", "layers": [{"by_age": True}, {"by_age": False}]})
    assert len(notices) == 1
    assert old == make_policy("calibrated", file={"name": "x", "layers": [{"mean_over_age": True}, {}]})
