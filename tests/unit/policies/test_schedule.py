"""Schedules by name, and which of them a policy cannot tell apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from a2sf import Policy, Retention, Schedule, make_policy
from a2sf.engine.invariants import SCHEDULES
from a2sf.errors import ConfigError
from a2sf.policies.find import find_policies
from a2sf.policies.schedule import nondefault_schedule, schedule_for


def test_a_schedule_is_found_by_its_name():
    assert [s.name for s in SCHEDULES] == ["step", "every3", "prompt", "prompt-step", "prompt-every3"]
    assert [Schedule.named(s.name) for s in SCHEDULES] == list(SCHEDULES)
    assert Schedule.named("prompt-keep") == Schedule("prompt")
    cuts = [Schedule("prompt", then=then, at="context") for then in ("keep", "step")]
    assert [s.name for s in cuts] == ["context", "context-step"]
    assert [Schedule.named(s.name) for s in cuts] == cuts
    assert nondefault_schedule(make_policy("snapkv"), cuts[0]) == cuts[0]
    later = Schedule("prompt", then="every", every=5, at="context")
    assert later.name == "context-every5"
    assert Schedule.named("context-every5") == later
    assert Schedule("prompt", then="every", every=1).name == "prompt-step"
    for name in ("every", "every-1", "evry", "", "prompt-every", "prompt-every0", "step-every4"):
        with pytest.raises(ConfigError, match="schedule="):
            Schedule.named(name)


def test_the_place_of_the_cut_is_shown_only_where_it_is_not_the_prompts_end():
    assert Schedule("prompt").settings == {"when": "prompt", "every": 1, "then": "keep"}
    assert Schedule("step", at="context").settings == Schedule("step").settings
    assert Schedule("prompt", at="context").settings == {"when": "prompt", "every": 1, "then": "keep", "at": "context"}
    with pytest.raises(ConfigError, match=r"schedule\.at=question is not allowed: give one of prompt, context"):
        Schedule("prompt", at="question")


@pytest.mark.parametrize("name", find_policies())
def test_none_is_the_schedule_of_a_policy_by_default(name):
    policy = make_policy(name)
    assert nondefault_schedule(policy, None) is None
    assert nondefault_schedule(policy, schedule_for(policy, None)) is None
    for schedule in SCHEDULES:
        if schedule.when not in policy.schedules:
            with pytest.raises(ConfigError, match=f"the policy {name} supports only"):
                nondefault_schedule(policy, schedule)
        elif schedule != schedule_for(policy, None):
            assert nondefault_schedule(policy, schedule) == (schedule if policy.evicts else None)


def test_what_is_not_looked_at_tells_nothing_apart():
    h2o = make_policy("h2o")
    assert nondefault_schedule(h2o, Schedule("prompt", then="every")) == Schedule("prompt", then="step")
    assert nondefault_schedule(h2o, Schedule("every", every=1)) is None
    assert nondefault_schedule(h2o, Schedule("prompt", every=7)) == Schedule("prompt")
    assert nondefault_schedule(h2o, Schedule("every", every=7, then="step")) == Schedule("every", every=7)


def test_a_policy_that_ignores_budgets_may_still_evict():
    @dataclass(frozen=True, kw_only=True)
    class Ten(Policy):
        name: ClassVar[str] = "ten"
        label: ClassVar[str] = "Ten"
        uses_budget: ClassVar[bool] = False

        def retention(self, budget: int, layer: int) -> Retention:
            return Retention(budget=10)

    assert nondefault_schedule(Ten(), Schedule("prompt")) == Schedule("prompt")
