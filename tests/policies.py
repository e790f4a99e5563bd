"""Which policies and schedules there are, for tests that walk all of them, and which of them each tier takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
import torch

from a2sf import Policy, Schedule
from a2sf.engine.invariants import schedules
from a2sf.policies.find import find_policies
from baselines.by import By
from baselines.curdkv import CurDKV
from tests.own_policies import OWN, Divided, Ending
from tests.tiers import is_left_out

SMALL: dict[str, Any] = {
    "window": 3,
    "kernel": 3,
    "sinks": 1,
    "heads": [[0, 1]],
    "forgetting_factor": 0.7,
    "seed": 5,
    "lag": 3,
    "chunk": 3,
    "future": 9,
    "by": {"name": "snapkv", "window": 3, "kernel": 3},
}
"""Settings that matter in sequences of two dozen tokens, for the policies that have them."""
FURTHER: dict[str, list[Any]] = {
    "pooling": ["max"],
    "covariance": [False],
    "varying": [0.6],
    "threshold": [0.5],
    "equal_slots": [True],
    "by": ["vatp", "keyformer", {"name": "adakv", "window": 3}, "expected_attention"],
}
"""Further values of settings, each with the small ones."""


def instances() -> list[Policy]:
    """Every policy with its own settings, and with small ones where it has such."""
    made = [p for cls in (*find_policies().values(), *OWN) for p in ([cls(), small(cls)] if settings(cls) else [cls()])]
    made += [Ending(count_above_uniform=True), Divided(scored=False)]
    for cls in find_policies().values():
        names = {f.name for f in fields(cls)} - (set() if issubclass(cls, By) else {"by"})
        made += [cls(**settings(cls) | {key: x}) for key in FURTHER if key in names for x in FURTHER[key]]
    return list({repr(p): p for p in made}.values())


def settings(cls: type[Policy]) -> dict[str, Any]:
    """Those of `SMALL` that it has; few recent tokens, where they are a number of their own."""
    names = {f.name for f in fields(cls)}
    few = {"recent": 1} if "recent" in names and "recent_share" not in names else {}
    return few | {k: v for k, v in SMALL.items() if k in names and (k != "by" or issubclass(cls, By))}


def small(cls: type[Policy]) -> Policy:
    return cls(**settings(cls))


def cases(*, prepared: bool = False) -> list[tuple[Policy, Schedule]]:
    """Every policy with every schedule that it knows; with `prepared`, also those that read a prompt before they cut it."""
    return [(p, s) for p in instances() for s in schedules(p) if prepared or not p.prepares]


def _matters(policy: Policy) -> bool:
    """Whether its settings matter in short sequences."""
    return not settings(type(policy)) or repr(policy) == repr(small(type(policy)))


@cache
def representatives(each: int = 2) -> list[tuple[Policy, Schedule]]:
    """One policy for each rule, with two of its schedules: the first that it knows, and the others in turn.

    With `each=1` it has one of the two, in turn.

    Policies of one rule differ in numbers alone, so that the same code runs. Of a policy's instances it is the one whose
    settings matter in short sequences.
    """
    matter = [p for p in instances() if _matters(p)]
    found: list[tuple[Policy, Schedule]] = []
    for i, policy in enumerate({p.keeps(9).rule: p for p in reversed(matter)}.values()):
        first, *others = schedules(policy)
        two = [first, *([others[i % len(others)]] if others else [])]
        found += [(policy, s) for s in (two if each == 2 else [two[i % len(two)]])]
    return found


def features(policy: Policy) -> set[str]:
    """What a policy asks of the code around its rule, in words: the fields of the rule that it sets, and more."""
    rule = policy.keeps(9).rule
    found = {f.name for f in fields(rule) if getattr(rule, f.name) != f.default}
    more = {"prepares": policy.prepares, "floor": rule.cut and rule.cut.floor is not None}
    more |= {"no budget": not policy.uses_budget, "layer budgets": policy.layer_budget(9, 0, 4, 20) != 9}
    return found | {name for name, has in more.items() if has} or {"none"}


def covering(tuples: Iterable[tuple[Any, ...]]) -> list[tuple[Policy, Schedule]]:
    """As few policies with a schedule, of those given, as have every feature and every schedule: the greedy choice."""
    left = {(repr(p), label(s)): (p, s) for p, s, *_ in tuples}
    have = {key: features(p) | {label(s)} for key, (p, s) in left.items()}
    missing: set[str] = set().union(*have.values())
    found = []
    while missing:
        best = max(have, key=lambda key: len(have[key] & missing))
        found.append(left[best])
        missing -= have[best]
    return found


def tiered(tuples: Iterable[tuple[Any, ...]], each: int = 2, turn: int = 0) -> list[Any]:
    """What a test is parametrized with, a policy and a schedule and perhaps more, each tuple once.

    `make test` takes the representatives, `each` of a rule, with one of the further values, in turn; with `each=0` as few
    as have every feature of a rule and every schedule (`covering`). `make test-all` takes every policy under every schedule,
    and a policy's other settings under one, in turn; with `each=1` all of them under one; with `each=0` one policy for each
    rule under one. Each has one of the further values, in turn. What it adds is marked `full`, the rest of the matrix
    `exhaustive` as well.

    Args:
        turn: where a policy takes one schedule, which: tests of the same code take different ones.
    """
    tuples = list(tuples)
    if each:
        # schedules alternate where a rule has one, so that two rules have the same further value: else it would go with them
        quick = {(repr(p), label(s)): i // (3 - each) for i, (p, s) in enumerate(representatives(each))}
    else:
        quick = {(repr(p), label(s)): i for i, (p, s) in enumerate(covering(t for t in tuples if _matters(t[0])))}
    further: dict[Any, list[Any]] = {}
    for policy, schedule, *more in tuples:
        further.setdefault((repr(policy), label(schedule)), []).append(more)
    full = _one_schedule_for_other_settings(
        tuples if each else _one_of_each_rule(tuples), all_others=each < 2, turn=turn
    )
    places = {key: i for i, key in enumerate(further)}
    made = []
    for policy, schedule, *more in tuples:
        values = further[key := (repr(policy), label(schedule))]
        in_quick = key in quick and more == values[quick[key] % len(values)]
        in_full = in_quick or (key in full and more == values[places[key] % len(values)])
        marks = tier(in_quick, in_full)
        if not marks or not is_left_out(marks[-1].name):
            made.append(pytest.param(policy, schedule, *more, marks=marks))
    return made


def tier(in_quick: bool, in_full: bool) -> list[pytest.MarkDecorator]:
    """The marks of a test that `make test` takes, or `make test-all`, or neither."""
    return [] if in_quick else [pytest.mark.full] if in_full else [pytest.mark.full, pytest.mark.exhaustive]


def _one_of_each_rule(tuples: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The tuples of the first policy of each rule whose settings matter in short sequences."""
    first: dict[Any, str] = {}
    return [t for t in tuples if _matters(t[0]) and first.setdefault(t[0].keeps(9).rule, repr(t[0])) == repr(t[0])]


def _one_schedule_for_other_settings(
    tuples: Iterable[tuple[Any, ...]], all_others: bool, turn: int
) -> set[tuple[str, str]]:
    """Policy and schedule of the tuples: a policy's small settings under each schedule, its others under one, in turn.

    With `all_others`, its small settings are no exception.
    """
    schedules_of: dict[str, list[str]] = {}
    of_name: dict[str, list[str]] = {}
    chosen: dict[str, str] = {}
    for policy, schedule, *_ in tuples:
        name = repr(policy)
        if label(schedule) not in schedules_of.setdefault(name, []):
            schedules_of[name].append(label(schedule))
        if name not in of_name.setdefault(policy.name, []):
            of_name[policy.name].append(name)
        if name == repr(small(type(policy))):
            chosen[policy.name] = name
    found = set()
    places = {name: i for i, name in enumerate(dict.fromkeys(p.name for p in instances()))}
    for name, instances_ in of_name.items():
        for i, instance in enumerate(instances_, turn + places[name]):
            known = schedules_of[instance]
            every = instance == chosen.get(name, instances_[-1]) and not all_others
            found |= {(instance, s) for s in (known if every else [known[i % len(known)]])}
    return found


def label(x: object) -> str:
    """A test's name for a policy or schedule."""
    if isinstance(x, Schedule):
        return (
            x.when
            + {"step": "", "every": f"{x.every}", "prompt": f"-{x.then}"}[x.when]
            + f"{x.every}" * (x.prompt and x.then == "every")
        )
    return "-".join([x.name, *(str(v).replace(" ", "") for v in vars(x).values())]) if isinstance(x, Policy) else str(x)


def of_models() -> dict[str, type[Policy]]:
    """Those that a model's passes run: causal, and able to evict step by step."""
    return {name: cls for name, cls in find_policies().items() if cls.causal and "step" in cls.schedules}


def ties(cls: type[Policy]) -> bool:
    """Whether equal keys have equal priorities, wherever they are.

    A token that comes twice has keys of one length in a model's first layer, but for the rounding of its rotary embedding:
    there the last bits decide, and they change with the shape of a batch.
    """
    if cls is CurDKV:  # a function of the lengths of keys and values alone
        return True
    rule = cls().keeps(8).rule
    if rule.scored or rule.bias is None:
        return False
    first, second = rule.bias(torch.ones(2, 4), torch.ones(2, 4), torch.arange(2))
    return bool(first == second)
