"""Which policies and schedules there are, for tests that walk all of them, and rules of their own to walk beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from a2sf import Policy, Retention, Rule, Schedule, Step
from a2sf.engine.invariants import schedules
from a2sf.policies.find import find_policies
from a2sf.policies.rule import Cut
from baselines.by import By
from baselines.curdkv import CurDKV
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


@dataclass(frozen=True, kw_only=True)
class Steady(Policy):
    """Of the tokens whose attention varies least, the smallest mean: the example of docs/rules.md."""

    name: ClassVar[str] = "calm"
    label: ClassVar[str] = "Calm"
    memory: ClassVar[int] = 1  # the sum of squares

    varying: int = 2

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget)

    def priorities(self, step: Step) -> tuple[Tensor, Tensor]:
        squares = step.memory[..., 0] + step.probabilities.sum(2) ** 2
        times = step.ages + 1
        mean = step.scores / times
        variance = (squares / times - mean**2).masked_fill(~step.cached, -torch.inf)
        most = variance.topk(min(self.varying, variance.shape[-1])).values[..., -1:]
        return mean.masked_fill((variance >= most) & (step.ages > 0), torch.inf), squares[..., None]


@dataclass(frozen=True, kw_only=True)
class AboveUniform(Policy):
    """How often a token got at least its share of attention, lately."""

    name: ClassVar[str] = "above_uniform"
    label: ClassVar[str] = "Above uniform"

    def retention(self, budget: int, layer: int) -> Retention:
        rule = Rule(count_above_uniform=True, mean_over_age=True, shared=True, weight=_one_more, bias=_first)
        return Retention(budget=budget, recent=budget // 3, forgetting_factor=0.8, rule=rule)


@dataclass(frozen=True, kw_only=True)
class Ending(Policy):
    """What the end of a prompt attended to, its last queries more than those before."""

    name: ClassVar[str] = "ending"
    label: ClassVar[str] = "Ending"
    schedules: ClassVar[tuple[str, ...]] = ("prompt",)

    count_above_uniform: bool = False

    def retention(self, budget: int, layer: int) -> Retention:
        rule = Rule(cut=Cut(kernel_size=3), count_above_uniform=self.count_above_uniform)
        return Retention(budget=budget, recent=min(5, budget), forgetting_factor=0.5, rule=rule)


@dataclass(frozen=True, kw_only=True)
class Divided(Policy):
    """A layer's slots divided among its heads by more than attention, or by something else."""

    name: ClassVar[str] = "divided"
    label: ClassVar[str] = "Divided"
    schedules: ClassVar[tuple[str, ...]] = ("prompt",)

    scored: bool = True

    def retention(self, budget: int, layer: int) -> Retention:
        cut = Cut(kernel_size=3, floor=0.3)
        rule = Rule(weight=_one_more, bias=_first, cut=cut) if self.scored else Rule(scored=False, bias=_first, cut=cut)
        return Retention(budget=budget, recent=min(3, budget), rule=rule)


@dataclass(frozen=True, kw_only=True)
class Looked(Policy):
    """The same by a function, of the scores that the cut has averaged."""

    name: ClassVar[str] = "looked"
    label: ClassVar[str] = "Looked"
    schedules: ClassVar[tuple[str, ...]] = ("prompt",)

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=min(3, budget), rule=Rule(cut=Cut(kernel_size=3, floor=0.3)))

    def priorities(self, step: Step) -> Tensor:
        return step.scores * -step.values[..., 1]


@dataclass(frozen=True, kw_only=True)
class Watched(Policy):
    """What the last queries attend to, wherever they are, and the keys' lengths."""

    name: ClassVar[str] = "watched"
    label: ClassVar[str] = "Watched"
    unrotated: ClassVar[bool] = True

    window: int = 2

    @property
    def queries(self) -> int:
        return self.window

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=1, rule=Rule(scored=False))

    def priorities(self, step: Step) -> Tensor:
        logits = step.unrotated_queries @ step.keys[:, :, None].transpose(-1, -2) * step.scale  # [B, K, G, W, N]
        hidden = ~step.cached[:, :, None, None] | (step.positions[:, :, None, None] > step.query_positions[..., None])
        attention = (
            logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0)
        )  # a query before the first is nowhere
        assert attention.shape[3] <= self.window
        return attention.sum((2, 3)) + step.unrotated_keys.norm(dim=-1) / 100


@dataclass(frozen=True, kw_only=True)
class Noted(Watched):
    """The same, with a sum over all steps that it keeps itself."""

    name: ClassVar[str] = "noted"
    label: ClassVar[str] = "Noted"
    memory: ClassVar[int] = 1

    def priorities(self, step: Step) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total = step.memory[..., 0] + super().priorities(step)
        return total, total[..., None]


@dataclass(frozen=True, kw_only=True)
class Strict(Policy):
    """Written for a cut: whatever it sees is a token, in order, and it may look at its neighbours."""

    name: ClassVar[str] = "strict"
    label: ClassVar[str] = "Strict"
    schedules: ClassVar[tuple[str, ...]] = ("every", "prompt")

    @property
    def queries(self) -> int:
        return 4

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, sinks=min(1, budget), rule=Rule(scored=False))

    def priorities(self, step: Step) -> Tensor:
        if step.prompt is not None and int(step.now.min()) >= int(step.prompt.min()):
            return step.keys[..., 0]  # after a prompt, step by step
        n = step.keys.shape[2]
        assert len(step.now) == 1
        assert step.cached.all()
        assert (step.positions.diff() > 0).all()
        assert (step.positions[..., -1:] == step.now).all()
        assert (step.budget < n).all()
        assert step.queries is not None
        assert step.queries.shape[3] == min(4, int(step.now) + 1)
        assert step.prompt is None or int(step.prompt) == int(step.now) + 1
        own = (step.queries[:, :, :, -1:] @ step.keys[:, :, None].transpose(-1, -2) * step.scale).softmax(-1)[..., 0, :]
        torch.testing.assert_close(own, step.probabilities)
        return torch.nn.functional.avg_pool1d(step.keys[..., 0], 3, stride=1, padding=1)


@dataclass(frozen=True, kw_only=True)
class Merging(Watched):
    """The same, and what is evicted moves what stays: values by their mean, keys a little to theirs."""

    name: ClassVar[str] = "merging"
    label: ClassVar[str] = "Merging"

    def merge(self, step: Step, evicted: Tensor) -> tuple[Tensor, Tensor]:
        number = evicted.sum(-1)[..., None, None].clamp(min=1)
        values, keys = ((x * evicted[..., None]).sum(2, keepdim=True) / number for x in (step.values, step.keys))
        near = torch.exp(-step.ages[..., None].to(values.dtype) / 10)
        # little, and bounded: else rounding errors grow from step to step, or keys become equal
        return step.values + near / 4 * (values - step.values), step.keys * 0.99 + keys * 0.01


@dataclass(frozen=True, kw_only=True)
class Weighed(Policy):
    """A rule as data, whose weights follow the merged values."""

    name: ClassVar[str] = "weighed"
    label: ClassVar[str] = "Weighed"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=budget // 3, rule=Rule(weight=_one_more, bias=_first))

    def merge(self, step: Step, evicted: Tensor) -> Tensor:
        lost = (step.values * step.scores[..., None] * evicted[..., None]).sum(2, keepdim=True)
        return step.values + lost / step.scores.sum(-1)[..., None, None]


@dataclass(frozen=True, kw_only=True)
class Apportioned(Ending):
    """The end of a prompt ranks tokens; what the newest query looks at says how many each head has."""

    name: ClassVar[str] = "apportioned"
    label: ClassVar[str] = "Apportioned"

    @property
    def queries(self) -> int:
        return 2

    def retention(self, budget: int, layer: int) -> Retention:
        rule = Rule(cut=Cut(kernel_size=3, floor=0.2), count_above_uniform=self.count_above_uniform)
        return Retention(budget=budget, recent=min(3, budget), rule=rule)

    def head_priorities(self, step: Step) -> Tensor:
        assert len(step.now) == 1
        return step.attention[:, :, :, -1].sum(2) * step.values[..., 0].abs()


OWN = (Steady, AboveUniform, Ending, Divided, Looked, Watched, Noted, Strict, Merging, Weighed, Apportioned)


def _one_more(keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return 1 + values[..., 0].abs()


def _first(keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return keys[..., 0] / 10


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


def tiered(tuples: Iterable[tuple[Any, ...]], each: int = 2) -> list[Any]:
    """What a test is parametrized with, a policy and a schedule and perhaps more, each tuple once.

    `make test` takes the representatives, `each` of a rule, with one of the further values, in turn; with `each=0` as few
    as have every feature of a rule and every schedule (`covering`). `make test-all` takes every policy under every schedule
    (with `each=0` under one, in turn), each with one of the further values, in turn, and a policy's other settings under one
    schedule; what it adds is marked `full`. The rest of the matrix is marked `exhaustive` as well.
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
    full = _one_schedule_for_other_settings(tuples, all_others=not each)
    places = {key: i for i, key in enumerate(further)}
    made = []
    for policy, schedule, *more in tuples:
        values = further[key := (repr(policy), label(schedule))]
        in_quick = key in quick and more == values[quick[key] % len(values)]
        in_full = in_quick or (key in full and more == values[places[key] % len(values)])
        names = [] if in_quick else ["full"] if in_full else ["full", "exhaustive"]
        if not names or not is_left_out(names[-1]):
            made.append(pytest.param(policy, schedule, *more, marks=[getattr(pytest.mark, n) for n in names]))
    return made


def _one_schedule_for_other_settings(tuples: Iterable[tuple[Any, ...]], all_others: bool) -> set[tuple[str, str]]:
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
    for turn, (name, instances_) in enumerate(of_name.items()):
        for i, instance in enumerate(instances_):
            known = schedules_of[instance]
            every = instance == chosen.get(name, instances_[-1]) and not all_others
            found |= {(instance, s) for s in (known if every else [known[(turn + i) % len(known)]])}
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
