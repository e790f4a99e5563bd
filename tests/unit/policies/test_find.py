"""Policies from outside: found by class, by entry point, by name; what goes wrong with them is one sentence."""

from __future__ import annotations

import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from lm_eval.utils import simple_parse_args_string

from a2sf import A2SF, Budget
from a2sf.errors import ConfigError, UserError
from a2sf.hf.loading import ModelSpec
from a2sf.policies.find import built_in, configurations, find_policies, find_policy, installed, load, source_digest
from a2sf.scoring.lm import PrunedLM
from a2sf.shipped import shipped
from a2sf.sweep.cell import CUT_VERSION, Cell
from a2sf.sweep.config import schema
from a2sf.sweep.config.settings import read
from a2sf.tasks.spec import DataSpec
from tests.outside import MODEL, installed_package, policy

EMPTY = """class Mine(Policy):
    name, label = "mine", "x"

    def retention(self, budget, layer):
        return Retention(budget=budget)
"""
OF_H2O = """from dataclasses import dataclass
from a2sf import H2O
@dataclass(kw_only=True)
class Mine(H2O):
    name, label, more = "mine", "x", 1
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path, whose modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("mine", "someone", "another"):
        sys.modules.pop(name, None)


def test_a_class_in_a_file(site):
    (site / "mine.py").write_text(policy("Mine", "mine", "My policy"))
    cls = find_policy("mine:Mine")
    assert cls is load("mine.Mine")
    assert cls().retention(10, 0).sinks == 5
    assert "mine" not in find_policies()  # nobody offers it


def test_an_entry_point(site):
    installed_package(site, "theirs", policy("Theirs", "theirs", "Their policy"))
    assert find_policy("theirs").label == "Their policy"
    assert set(find_policies()) == {*built_in(), "theirs"}
    assert configurations() == {"theirs": {"_target_": "someone.Theirs", "share": 0.5}}


def test_a_broken_package_stops_only_who_asks_for_it(site):
    installed_package(site, "theirs", "import nothing_of_this_name\n")
    assert find_policy("h2o") is built_in()["h2o"]
    assert configurations() == {"theirs": {"_target_": "someone.Theirs"}}
    with pytest.raises(
        ConfigError, match=r"policy=someone:Theirs .*someone cannot be imported: .*nothing_of_this_name.*line 1"
    ):
        find_policy("theirs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (policy("Mine", "h2o", "x"), "its name h2o is that of baselines.h2o.H2O; rename it"),
        (policy("Min", "mine", "x"), r"mine has no Mine \(did you mean Min\?\)"),
        ("class Mine: ...\n", "it is not a subclass of a2sf.Policy"),
        ("def Mine(:\n", r"mine cannot be imported: invalid syntax \(.*mine.py, line 1\)"),
        ("1 / 0\n", r"mine cannot be imported: ZeroDivisionError: division by zero \(.*mine.py, line 1\)"),
        ("import nowhere\n", r"mine cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        (policy("Mine", "", "x"), "the class needs a name"),
        (policy("Mine", "mine", ""), "the class needs a label"),
        (policy("Mine", "mine", "x").replace("@dataclass(frozen=True, kw_only=True)\n", ""), "it needs @dataclass"),
        (
            policy("Mine", "mine", "x").split("@dataclass")[0] + EMPTY,
            r"it needs @dataclass\(frozen=True, kw_only=True\)",
        ),
        (OF_H2O, r"non-frozen .*mine.py, line 3\); write @dataclass\(frozen=True, kw_only=True\) above the class"),
        (policy("Mine", "mine", "x").replace("def retention", "def retain"), "it does not define retention"),
        (
            policy("Mine", "mine", "x").replace("share: float", "keeps: float"),
            "its setting keeps has the name of a method",
        ),
    ],
    ids=range(13),
)
def test_what_is_no_policy(site, text, message):
    (site / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=f"policy=mine:Mine is not allowed: .*{message}"):
        find_policy("mine:Mine")


@pytest.mark.parametrize(
    ("name", "message"), [("mine:Mine", "there is no module mine"), ("h2p", r"did you mean h2o\?")]
)
def test_what_is_not_there(name, message):
    with pytest.raises(ConfigError, match=message):
        find_policy(name)


def test_names_that_are_taken(site):
    installed_package(site, "h2o", policy("Theirs", "h2o", "x"))
    with pytest.raises(UserError, match="someone offers a policy named h2o, a name that a2sf has taken"):
        installed()


def test_two_packages_with_one_name(site):
    for package in ("someone", "another"):
        installed_package(site, "theirs", policy("Theirs", "theirs", "x"), package)
    with pytest.raises(UserError, match="another and someone both offer a policy named theirs"):
        installed()


def test_an_own_class_with_an_installed_name(site):
    installed_package(site, "theirs", policy("Theirs", "theirs", "x"))
    (site / "mine.py").write_text(policy("Mine", "theirs", "x"))
    with pytest.raises(ConfigError, match="its name theirs is that of someone:Theirs in someone"):
        find_policy("mine:Mine")


def test_an_entry_point_that_is_named_otherwise(site):
    installed_package(site, "theirs", policy("Theirs", "other", "x"))
    with pytest.raises(ConfigError, match="someone offers it as theirs, but its name is other"):
        find_policy("theirs")


def test_other_code_is_another_cell(site):
    """Settings alone do not say what a policy from outside does."""
    text = policy("Mine", "mine", "My policy")

    def cell() -> Cell:
        sys.modules.pop("mine", None)
        made = find_policy("mine:Mine")()
        return Cell("m", ModelSpec(MODEL), made, Budget(ratio=0.2), "copa", 0, 1, 0, DataSpec(source="bundle"))

    (site / "mine.py").write_text(text)
    first = cell().id
    assert cell().id == first
    (site / "mine.py").write_text(text.replace("budget * self.share", "budget * self.share / 2"))
    assert cell().id != first
    assert source_digest(A2SF) is None  # ours have versions instead
    assert all(source_digest(cls) is None for cls in built_in().values())


def test_own_rules_of_a_cut_are_of_the_cuts_version(site):
    """The division among heads has changed, and what such a cut ranks by."""
    text = policy("Mine", "mine", "My policy")
    assert "Retention(" in text

    def identity(rule: str) -> dict:
        sys.modules.pop("mine", None)
        made = "from a2sf.policies.rule import Cut, Rule\n" + text.replace("Retention(", f"Retention(rule={rule}, ", 1)
        (site / "mine.py").write_text(made)
        cell = Cell(
            "m",
            ModelSpec(MODEL),
            find_policy("mine:Mine")(),
            Budget(ratio=0.2),
            "copa",
            0,
            1,
            0,
            DataSpec(source="bundle"),
        )
        return cell.identity

    assert "cut" not in identity("Rule()")
    assert "cut" not in identity("Rule(cut=Cut(kernel_size=5))")
    assert identity("Rule(cut=Cut(floor=0.5))")["cut"] == CUT_VERSION


def test_in_model_args_of_lm_eval(site, smollm2):
    (site / "mine.py").write_text(policy("Mine", "mine", "My policy"))
    arguments = simple_parse_args_string("policy=mine:Mine,budget_ratio=0.2")
    lm = PrunedLM(smollm2.model, tokenizer=smollm2.tokenizer, **arguments)
    assert (lm.policy.label, lm.budget) == ("My policy", Budget(ratio=0.2))
    with pytest.raises(ConfigError, match="policy=mine:Min is not allowed: mine has no Min"):
        PrunedLM(smollm2.model, tokenizer=smollm2.tokenizer, policy="mine:Min")


def test_an_installed_policy_is_a_choice_with_its_settings(site):
    installed_package(site, "theirs", policy("Theirs", "theirs", "Their policy"))
    GlobalHydra.instance().clear()
    schema.register()
    try:
        with initialize_config_dir(str(shipped("conf")), version_base="1.3"):
            composed = compose("config", ["policy=theirs", "policy.share=0.25", "data=bundle", "tasks=[copa]"])
            (cell,) = read(composed).cells
    finally:
        del ConfigStore.instance().repo["policy"]["theirs.yaml"]
    assert (cell.policy.label, cell.policy.retention(8, 0).sinks) == ("Their policy", 2)
