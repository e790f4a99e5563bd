"""`a2sf check`: every policy holds the invariants, and a broken one is reported with the invariant."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from a2sf import Budget, Policy, Retention, Schedule, Step
from a2sf.commands.policy import check as command
from a2sf.engine import stepwise
from a2sf.engine.invariants import INVARIANTS, Broken, Excepted, check
from a2sf.engine.invariants.cases import case
from a2sf.engine.invariants.opposite import chooses
from a2sf.errors import ConfigError, PolicyError, UserError
from a2sf.hf.settings import retention_of
from a2sf.policies.find import find_policies
from tests.outside import policy
from tests.own_policies import Divided, Looked
from tests.policies import label


@dataclass(frozen=True, kw_only=True)
class TooMany(Policy):
    name: ClassVar[str] = "too_many"
    label: ClassVar[str] = "One too many"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget + 1)


@dataclass(frozen=True, kw_only=True)
class ByBudget(Policy):
    name: ClassVar[str] = "by_budget"
    label: ClassVar[str] = "A factor that follows the budget"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, forgetting_factor=1 / budget)


@dataclass(frozen=True, kw_only=True)
class Dice(Policy):
    name: ClassVar[str] = "dice"
    label: ClassVar[str] = "Other numbers each time"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, forgetting_factor=random.random())


@dataclass(frozen=True, kw_only=True)
class Opaque(Policy):
    name: ClassVar[str] = "opaque"
    label: ClassVar[str] = "A setting that is no data"

    how: Any = print

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget)


@dataclass(frozen=True, kw_only=True)
class Greedy(Policy):
    name: ClassVar[str] = "greedy"
    label: ClassVar[str] = "Protects more than it may keep"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=5)


class Numberless(Greedy):
    name = "numberless"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget // layer)


@dataclass(frozen=True, kw_only=True)
class Least(Policy):
    name: ClassVar[str] = "least"
    label: ClassVar[str] = "Never keeps all"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=min(budget, 4))


@dataclass(frozen=True, kw_only=True)
class Own(Policy):
    """An own rule that is right; those below break it."""

    name: ClassVar[str] = "right"
    label: ClassVar[str] = "An own rule"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget)

    def priorities(self, step: Step) -> Any:
        return step.scores * step.values.norm(dim=-1)


class OfTheBatch(Own):
    name = "of_the_batch"

    def priorities(self, step: Step) -> Any:
        return step.scores - step.scores.mean((0, 2), keepdim=True) * step.keys[..., 0]


class Drawn(Own):
    name = "drawn"

    def priorities(self, step: Step) -> Any:
        return torch.rand_like(step.scores)


class Counting(Own):
    """What it keeps is in the object, not with the tokens."""

    name = "counting"
    calls: ClassVar[int] = 0

    def priorities(self, step: Step) -> Any:
        Counting.calls += 1
        return step.scores * (1 if Counting.calls % 7 else -1)


class ByColumn(Own):
    """A token's place in the tensors, which is no property of it."""

    name = "by_column"

    def priorities(self, step: Step) -> Any:
        return torch.arange(step.scores.shape[-1], dtype=step.scores.dtype).expand_as(step.scores).clone()


class WrongShape(Own):
    name = "wrong_shape"

    def priorities(self, step: Step) -> Any:
        return step.scores[..., 0]


class Indifferent(Own):
    name = "indifferent"

    def priorities(self, step: Step) -> Any:
        return torch.zeros_like(step.scores)


NEGATED = "a negated rule retains other tokens"


@pytest.mark.parametrize("made", [Divided(), Divided(scored=False), Looked()], ids=label)
@pytest.mark.parametrize("then", ["keep", "step"])
def test_a_rule_that_is_not_looked_at_is_found(made, then, monkeypatch):
    """As cuts across heads were once ranked: by attention, whatever the rule says."""
    tried = case(made, Schedule("prompt", then=then), 0)
    INVARIANTS[NEGATED](tried)
    real = stepwise.to_evict_across_heads

    def by_attention(numbers, priority, step, free):
        return real(numbers, step.scores, step, free)

    monkeypatch.setattr(stepwise, "to_evict_across_heads", by_attention)
    with pytest.raises(Broken, match="the opposite rule retains the same tokens"):
        INVARIANTS[NEGATED](tried)


def test_a_rule_without_a_choice_is_no_rule_that_is_ignored():
    """Windows that fill the budget decide nothing, and priorities that are all equal leave it to age."""
    for made in (cls() for cls in find_policies().values()):
        if not chooses(made.keeps(8), 2, 24):
            INVARIANTS[NEGATED](case(made, Schedule(made.schedules[0]), 0))
    with pytest.raises(Excepted, match="its priorities are all equal"):
        INVARIANTS[NEGATED](case(Indifferent(), Schedule(), 0))


def broken(policy: Policy, which: str) -> str | None:
    """Where the first invariant whose name begins so does not hold; the others are not tried."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in INVARIANTS if not n.startswith(which)]:
            patch.delitem(INVARIANTS, name)
        return next((f.broken for f in check(policy) if f.broken), None)


ONE_OF_EACH = {cls.schedules: name for name, cls in find_policies().items()}.values()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ONE_OF_EACH else pytest.mark.full) for n in find_policies()]
)
def test_every_policy_holds_every_invariant_under_each_schedule_that_it_knows(name):
    policy = find_policies()[name]()
    findings = list(check(policy, seeds=1))
    assert [f for f in findings if f.broken] == []
    assert {f.schedule.when for f in findings} == set(policy.schedules)
    assert {f.name for f in findings} == set(INVARIANTS)
    excepted = {f.name for f in findings if f.excepted}
    assert bool(excepted) == (not policy.causal or "step" not in policy.schedules)


@pytest.mark.parametrize(
    ("made", "which", "message"),
    [
        (TooMany(), "7", "it may hold"),
        (ByBudget(), "6", "differ in their scores"),
        (Dice(), "i", "other numbers when it is called again"),
        (Opaque(), "i", "neither number, text, list"),
        (Greedy(), "7", r"it raised ValueError: recent \(5\)"),
        (Least(), "1", "is not full attention"),
        (OfTheBatch(), "3", "a row of"),
        (Drawn(), "i", "other tokens are retained when the same sequence is read again"),
        (Counting(), "i", "other tokens are retained when"),
        (ByColumn(), "t", "differs from the reference|ends in another state"),
        (
            WrongShape(),
            "i",
            r"it raised PolicyError: WrongShape.priorities returns priorities of shape .*_command.py, line \d+",
        ),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_a_broken_policy_is_reported_with_what_it_breaks(made, which, message):
    found = broken(made, which)
    assert found
    assert re.search(message, found)


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "ofmine.py").write_text(policy("Mine", "mine", "My policy"))
    (tmp_path / "ofmine2.py").write_text(policy("Mine", "mine2", "x").replace("budget=budget,", "budget=2 * budget,"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command.main(["ofmine:Mine", "share=0.25", "--trials", "1"])
    said = capsys.readouterr().out
    assert "Mine(share=0.25)" in said
    assert said.count("holds") == len(INVARIANTS)
    assert said.count("step; every 3; prompt, then keep; prompt, then step; prompt, then every 3") == len(INVARIANTS)
    with pytest.raises(SystemExit, match="1"):
        command.main(["ofmine2:Mine", "--trials", "1"])
    assert "and states" in capsys.readouterr().out
    command.main(["future", "--trials", "1"])
    said = capsys.readouterr().out
    assert said.count("holds") == len(INVARIANTS) - 2
    assert "it is not causal, as it states" in said


FAILING = """
def helper(step):
    return step.scores.no_such_method()
"""


def test_an_error_of_the_policys_own_code_is_reported_once_with_its_line(tmp_path, monkeypatch, capsys):
    made = policy("Failing", "failing_twice", "x") + FAILING + "\n\n"
    made += "Failing.priorities = lambda self, step: helper(step)\n"
    (tmp_path / "offailing.py").write_text(made)
    line = made.splitlines().index("    return step.scores.no_such_method()") + 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        command.main(["offailing:Failing", "--trials", "1"])
    said = capsys.readouterr().out
    assert said.count("no_such_method") == 1
    assert (
        f"fails: AttributeError: 'Tensor' object has no attribute 'no_such_method' (offailing.py, line {line}, in helper)"
        in said
    )
    assert said.count("the same error") > 5
    assert said.count("the same error") == len(re.findall("^  broken ", said, re.MULTILINE)) - 1
    # numbers that do not fit, in a run's own words
    with pytest.raises(ValueError, match=r"policy greedy does not fit a budget of 2 tokens"):
        retention_of(Greedy(), Budget(tokens=2), 9, 9, 1)
    with pytest.raises(
        PolicyError, match=r"policy numberless fails: ZeroDivisionError: .*test_invariants_command.py, line"
    ):
        retention_of(Numberless(), Budget(tokens=2), 9, 9, 1)


def test_an_error_with_other_numbers_is_the_same_error(tmp_path, monkeypatch, capsys):
    """The shapes in the message are those of each random case."""
    made = policy("Short", "too_short", "x") + "\n\nShort.priorities = lambda self, step: step.scores[..., :3]\n"
    (tmp_path / "ofshort.py").write_text(made)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        command.main(["ofshort:Short", "--trials", "2"])
    assert capsys.readouterr().out.count("returns priorities of shape") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["h2o", "recent_shar=1"], r"policy.recent_shar=1 .* h2o has recent_share \(did you mean recent_share\?\)"),
        (["h2o", "recent_share=2"], "policy.recent_share=2 .* from 0 to 1"),
        (["full", "x=1"], "full has no settings"),
        (["h2o", "--trials", "0"], "give at least 1"),
        (["h2o", "--config-dir", "nowhere"], "there is no such folder"),
    ],
)
def test_bad_input_of_the_command(arguments, message):
    with pytest.raises((ConfigError, UserError), match=message):
        command.main(arguments)
