"""What a system retains of a request: the policy's code runs once for requests with the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from a2sf import Budget, Policy, Retention, Schedule
from a2sf.hf import settings
from a2sf.hf.settings import retention_of
from a2sf.policies.find import find_policy
from a2sf.policies.prepared import Prepared
from a2sf.scoring.systems import System

PROMPT = Schedule(when="prompt")


class Named:
    """Its name is inherited, so that other tests do not find the policy."""

    name: ClassVar[str] = "counting"
    label: ClassVar[str] = "Counting"


@dataclass(frozen=True, kw_only=True)
class Counting(Named, Policy):
    """A policy that cannot be hashed and notes each call."""

    calls: list[tuple[int, int]] = field(default_factory=list)

    def retention(self, budget: int, layer: int) -> Retention:
        self.calls.append((budget, layer))
        return Retention(budget=budget, recent=budget // (layer + 1))


def test_requests_with_the_same_numbers_have_one_retention():
    policy = Counting()
    system = System(policy, Budget(ratio=0.5), Schedule())
    first = system.retention(10, 4, 3)
    assert [r.recent for r in first] == [5, 2, 1]
    assert system.retention(11, 9, 3) is first  # the half of 11 is 5, too
    assert system.retention(12, 4, 3) != first
    assert policy.calls == [(5, 0), (5, 1), (5, 2), (6, 0), (6, 1), (6, 2)]
    assert len(system.retention(10, 4, 2)) == 2
    assert System(policy, Budget(ratio=0.5), Schedule()).retention(10, 4, 3) == first


@pytest.mark.parametrize("name", ["pyramidkv", "snapkv", "lagkv", "criticalkv"])
@pytest.mark.parametrize("budget", [Budget(ratio=0.3, base="context"), Budget(ratio=0.3), Budget(tokens=40)])
def test_it_is_that_of_each_request(name, budget):
    policy = find_policy(name)()
    system = System(policy, budget, PROMPT, (True, False, True, True))
    for total, context in ((90, 60), (90, 61), (91, 60), (200, 150), (90, 60)):
        alone = retention_of(policy, budget, total, context, 4, PROMPT, acts=system.acts)
        assert system.retention(total, context, 4) == alone


def test_what_was_prepared_for_one_prompt_is_not_that_of_another():
    policy = find_policy("cake")()
    system = System(policy, Budget(tokens=20), PROMPT)
    before = system.retention(90, 60, 2)
    decided = system.retention(90, 60, 2, Prepared(shares=(3, 1)))
    assert [r.budget for r in decided] != [r.budget for r in before]
    assert system.retention(90, 60, 2) == before


def test_few_are_remembered(monkeypatch):
    monkeypatch.setattr(settings, "MOST_KNOWN", 4)
    system = System(Counting(), Budget(ratio=0.5), Schedule())
    for total in range(2, 40, 2):
        assert system.retention(total, 1, 1)[0].budget == total // 2
        assert len(system._known) <= 4
