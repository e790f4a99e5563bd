"""A grid of several policies and schedules: a setting goes to where it is known, and is refused where nobody knows it."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from a2sf.errors import ConfigError
from a2sf.policies.find import find_policies
from a2sf.sweep.config.grid import addable, check_schedules, route
from a2sf.sweep.runner import hardly_pruned
from tests.sweep_fixture import Plan, write_sweep


def target(overrides: tuple[str, ...]) -> str:
    """The class that `policy=name` chooses."""
    (name,) = (o.partition("=")[2] for o in overrides if o.startswith("policy="))
    cls = find_policies()[name]
    return f"{cls.__module__}.{cls.__qualname__}"


def test_a_setting_goes_to_the_policies_that_have_it():
    grid = [[f"policy={p}", "policy.recent_share=0.25", "limit=4"] for p in ("a2sf", "h2o", "snapkv")]
    has = "++policy.recent_share=0.25"
    routed = [["policy=a2sf", has, "limit=4"], ["policy=h2o", has, "limit=4"], ["policy=snapkv", "limit=4"]]
    assert route(grid, target) == routed


def test_a_setting_that_no_policy_has_is_still_refused():
    grid = [[f"policy={p}", "policy.recnt=1"] for p in ("a2sf", "h2o")]
    assert route(grid, target) == [["policy=a2sf", "++policy.recnt=1"], ["policy=h2o", "++policy.recnt=1"]]


def test_the_choice_of_a_policy_is_no_setting_of_it():
    for override in ("policy=h2o", "policy._target_=mine.Mine", "+policy._target_=mine.Mine", "budget.ratio=0.2"):
        assert addable(override) == override
    assert addable("policy.heads=[[0,1]]") == addable("+policy.heads=[[0,1]]") == "++policy.heads=[[0,1]]"


def points(*schedules: dict[str, object]):
    return [OmegaConf.create({"schedule": {"when": None, "every": None, "then": None, **s}}) for s in schedules]


def test_a_key_of_the_schedule_is_refused_where_no_point_looks_at_it():
    check_schedules(points({"when": "step", "every": 4}, {"when": "every", "every": 4}))
    check_schedules(points({}, {"when": "prompt", "then": "step"}))
    with pytest.raises(ConfigError, match=r"schedule\.every=4 is not allowed: it is for schedule=every"):
        check_schedules(points({"when": "step", "every": 4}, {"when": "prompt", "every": 4}))
    with pytest.raises(ConfigError, match=r"schedule\.then=keep is not allowed: it is for schedule=prompt"):
        check_schedules(points({"then": "keep"}))


def test_a_sweep_says_where_few_scores_saw_a_pruned_cache(tmp_path):
    stored = write_sweep(tmp_path, Plan(policies=("full", "h2o"), budgets=(0.2,), documents={"piqa": 5, "copa": 5}))
    assert hardly_pruned(stored) is None  # cells of before that was noted
    for cell, pruned in zip(stored, (0, 19, 20, 0), strict=False):
        cell.result["scored"] = {"tokens": 100, "pruned": pruned}
    full, first, second = stored[0], stored[1], stored[3]
    assert full.cell["budget"] is None
    notice = hardly_pruned(stored)
    second.result["scored"]["pruned"] = 20
    assert notice is not None
    assert notice.startswith("In 2 cells, less than 20 % of the scored tokens saw a pruned cache")
    assert f"(the least in {second.path.name}: 0 %)." in notice
    assert f"In {first.path.name}, only 19 %" in (hardly_pruned(stored) or "")
    first.result["scored"]["pruned"] = 20
    assert hardly_pruned(stored) is None
