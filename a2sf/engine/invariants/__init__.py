"""The invariants of docs/semantics.md as functions: what must hold for every policy, checked on random tensors.

`a2sf check` runs them on one policy, the tests on all policies, each under every schedule that it supports. They use a
policy only through `a2sf.attend`, so that priority functions are checked as data are. A new invariant is one more function
in `INVARIANTS`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from a2sf.engine.invariants.cases import KV_HEADS, ROWS, TOKENS, Case, case, layers_of
from a2sf.engine.invariants.opposite import chooses, lenient, opposite, slots_of
from a2sf.engine.state import EvictionState
from a2sf.errors import PolicyError, UserError, place
from a2sf.policies.base import Policy, Retention
from a2sf.policies.schedule import Schedule

SEEDS = 8
MOST_CHOICE = 64
"""The largest budget tried to find one at which a rule has a choice."""
SCHEDULES = (
    Schedule(),
    Schedule("every", every=3),
    Schedule("prompt", then="keep"),
    Schedule("prompt", then="step"),
    Schedule("prompt", then="every", every=3),
)
"""The schedules that a policy is checked under, if it supports them."""


class Broken(Exception):
    """An invariant does not hold; the message says where it was seen."""


class Excepted(Exception):
    """An invariant does not apply to this policy; the message says why."""


@dataclass(frozen=True)
class Finding:
    """The result for one invariant under one schedule.

    Attributes:
        broken: where it did not hold; None if it held in every random case.
        excepted: why it does not apply to this policy.
        raised: the error of the policy's own code that broke it, and where that was; None if there was none.
    """

    name: str
    schedule: Schedule
    broken: str | None = field(default=None)
    excepted: str | None = field(default=None)
    raised: str | None = field(default=None)


def check(policy: Policy, seeds: int = SEEDS) -> Iterator[Finding]:
    """Check every invariant on `policy` under every schedule that it supports, each in `seeds` random cases.

    A policy that raises an error has broken the invariant.

    Raises:
        ConfigError: if its settings fit no model of two KV heads per layer.
    """
    layers = layers_of(policy)
    for name, invariant in INVARIANTS.items():
        for schedule in schedules(policy):
            findings = (_find(name, invariant, policy, schedule, seed, layers) for seed in range(seeds))
            yield next((found for found in findings if found is not None), Finding(name, schedule))


def _find(
    name: str, invariant: Callable[[Case], None], policy: Policy, schedule: Schedule, seed: int, layers: int
) -> Finding | None:
    """What one random case shows; None: the invariant holds."""
    try:
        invariant(case(policy, schedule, seed, layers))
    except Excepted as why:
        return Finding(name, schedule, excepted=str(why))
    except Broken as error:
        return Finding(name, schedule, f"{error} (trial {seed})")
    except Exception as error:  # the user's own code
        raised, at = f"{type(error).__name__}: {error}", "" if isinstance(error, PolicyError) else place(error)
        raised = f"{raised} ({at})" if at else raised
        return Finding(name, schedule, f"it raised {raised} (trial {seed})", raised=raised)
    return None


def schedules(policy: Policy) -> list[Schedule]:
    """Those of `SCHEDULES` that a policy supports."""
    return [s for s in SCHEDULES if s.when in policy.schedules]


def in_words(schedule: Schedule) -> str:
    """A schedule in words."""
    every = f"every {schedule.every}"
    then = every if schedule.then == "every" else schedule.then
    return {"every": every, "prompt": f"prompt, then {then}"}.get(schedule.when, schedule.when)


def data(c: Case) -> None:
    """A policy's settings can be written as JSON, and determine what it does: they identify a cell."""
    settings = {f.name: getattr(c.policy, f.name) for f in dataclasses.fields(c.policy)}
    try:
        json.dumps(settings)
    except TypeError as error:
        raise Broken(f"a setting is neither number, text, list nor mapping of such: {error}") from error
    C = int(c.budget[0])
    numbers = _numbers(c.policy.retention(C, c.layer))
    if numbers != _numbers(c.policy.retention(C, c.layer)):
        raise Broken(f"retention gives other numbers when it is called again (budget {C})")
    twin = replace(c, policy=type(c.policy)(**settings))
    if numbers != _numbers(twin.policy.retention(C, c.layer)):
        raise Broken(f"retention gives other numbers for a policy with the same settings (budget {C})")
    first, again, other = c.run(), c.run(), twin.run()
    if first.retained != again.retained:
        raise Broken("other tokens are retained when the same sequence is read again")
    if first.retained != other.retained:
        raise Broken("a policy with the same settings retains other tokens")


def whole_budget(c: Case) -> None:
    """A budget of the whole sequence, or a threshold that all tokens reach, is full causal attention."""
    full = torch.nn.functional.scaled_dot_product_attention(*c.tensors, is_causal=True, enable_gqa=True)
    for budget in (TOKENS, TOKENS + c.cuts[0]):
        output = replace(c, policy=lenient(c.policy)).run(budget=budget).output
        _equal(output, full, f"budget {budget} for {TOKENS} tokens is not full attention")


def same_schedules(c: Case) -> None:
    """`every 1`, and a prompt of one token followed by `step`, are `step`; a prompt alone is one cut."""
    if c.schedule.prompt and c.schedule.then == "keep":
        full = torch.nn.functional.scaled_dot_product_attention(*c.tensors, is_causal=True, enable_gqa=True)
        one, two = (c.run(prompt=TOKENS, schedule=Schedule("prompt", then=then)) for then in ("keep", "step"))
        _equal(one.output, full, "a prompt is not read with full attention")
        before, after = (
            replace(ran.state, queries=None, memory=None) for ran in (one, two)
        )  # only later steps see them
        _same_state(before, after, "what is retained at a prompt's cut depends on what follows")
        return
    if "step" not in c.policy.schedules:
        raise Excepted("it does not support the schedule step")
    equal: dict[str, Any] = {"schedule": Schedule(c.schedule.when, every=1, then="step"), "prompt": 1}
    step, same = c.run(schedule=Schedule()), c.run(**equal)
    what = "a prompt of one token, then step" if c.schedule.prompt else "every 1"
    _equal(same.output, step.output, f"{what} is not step")
    _same_state(same.state, step.state, f"{what} does not retain what step retains")


def rows(c: Case) -> None:
    """Neither the batch, nor padding, nor the order of the batch changes a row."""
    single = replace(c, query=c.query.float(), key=c.key.float(), value=c.value.float())
    # the engine computes data row by row, to the bit; a policy's own function may round differently
    tolerance = 0.0 if not c.stated(0).rule.calls else 2e-5
    ran = single.run(lengths=c.lengths)
    order = torch.arange(ROWS - 1, -1, -1)
    turned = single.run(*(x[order] for x in single.tensors), rows=order, lengths=c.lengths[order])
    _equal(turned.output, ran.output[order], "the order of the batch changes a row", tolerance)
    for row, n in enumerate(c.lengths.tolist()):
        alone = single.run(*(x[row : row + 1, :, :n] for x in single.tensors), rows=[row])
        where = f"a row of {n} tokens"
        message = f"{where} has other outputs alone than in a padded batch"
        _equal(alone.output[0], ran.output[row, :, :n], message, tolerance)
        if alone.retained[0] != ran.retained[row]:
            raise Broken(f"{where} retains other tokens in a padded batch")
        if bool(ran.output[row, :, n:].any()):
            raise Broken(f"{where} has outputs where it is padded")


def chunks(c: Case) -> None:
    """A sequence read in chunks equals the whole; forks of a shared beginning equal each sequence from scratch."""
    at_once = c.run()
    if not c.policy.causal:
        try:
            c.run(state=at_once.state)
        except UserError as why:
            raise Excepted("it is not causal and needs the whole sequence at once") from why
        raise Broken("it is not causal, and still continues from a state")
    ran = c.run(*(x[:, :, : c.cuts[0]] for x in c.tensors))
    outputs = [ran.output]
    for at, end in pairwise([*c.cuts, TOKENS]):
        before, chunk = ran.state, tuple(x[:, :, at:end] for x in c.tensors)
        ran = c.run(*chunk, state=before)
        outputs.append(ran.output)
    where = f"cut after {' and '.join(map(str, c.cuts))} tokens"
    _equal(torch.cat(outputs, 2), at_once.output, f"{where}, the outputs differ from the whole's")
    _same_state(ran.state, at_once.state, f"{where}, another state is left")
    # the last chunk again: all rows continue row 0's beginning, each with its own tokens
    zero = torch.zeros(ROWS, dtype=torch.int64)
    forked = c.run(*chunk, rows=zero, state=before.select(zero))
    inputs = (torch.cat([x[:1, :, :at].expand(ROWS, -1, -1, -1), x[:, :, at:]], 2) for x in c.tensors)
    scratch = c.run(*inputs, rows=zero)
    _equal(forked.output, scratch.output[:, :, at:], f"forked after {at} tokens, a row differs from the whole")
    _same_state(forked.state, scratch.state, f"forked after {at} tokens, another state is left")


def causal(c: Case) -> None:
    """Later tokens change nothing earlier."""
    if not c.policy.causal:
        raise Excepted("it is not causal, as it states")
    cut = c.cuts[0]
    others = [torch.cat([x[:, :, :cut], x[:, :, cut:].flip(0, 2)], 2) for x in c.tensors]
    output, changed = c.run().output, c.run(*others).output
    _equal(changed[:, :, :cut], output[:, :, :cut], f"tokens after {cut} change outputs before")


def until_full(c: Case) -> None:
    """Budgets make no difference until one is full, so that sequences with different budgets can share a beginning."""
    least = max(int(c.budget[0]), 2)
    budgets = (least, least + c.cuts[0])
    beginning = [x[:, :, :least] for x in c.tensors]
    a, b = (c.run(*beginning, budget=budget) for budget in budgets)
    said = f"before anything is evicted, budgets of {budgets[0]} and {budgets[1]} tokens differ in"
    _equal(a.output, b.output, f"{said} their outputs")
    if a.retained != b.retained:
        raise Broken(f"{said} what they retain")
    if c.stated(0).rule.cut is None:  # a window that is cut to the budget scores nothing else
        _equal(a.state.scores, b.state.scores, f"{said} their scores")
        if a.state.memory is not None and b.state.memory is not None:
            _equal(a.state.memory, b.state.memory, f"{said} what is remembered per token")


def retained(c: Case) -> None:
    """The number of cached tokens follows from budget and schedule; sinks and the newest tokens are among them."""
    for budget in c.budget.tolist():
        for prompt in ((n,) for n in range(budget + 1, 3 * budget + 1)) if c.schedule.prompt else ((),):
            each = [c.policy.layer_budget(budget, layer, 4, *prompt) for layer in range(4)]
            if sum(each) != 4 * budget:
                raise Broken(f"4 layers that may hold {budget} tokens each hold {sum(each)} in all")
    for tokens in {c.cuts[0], TOKENS}:
        ran = c.run(*(x[:, :, :tokens] for x in c.tensors))
        for row, heads in enumerate(ran.retained):
            _retained_by_row(c, row, tokens, heads)


def _retained_by_row(c: Case, row: int, tokens: int, heads: list[list[int]]) -> None:
    numbers = c.stated(row)
    schedule, prompt = c.schedule, int(c.prompt[row])
    for head, (positions, (C, recent, sinks)) in enumerate(zip(heads, slots_of(numbers, KV_HEADS), strict=True)):
        protected = {*range(min(sinks, tokens)), *range(max(0, tokens - recent), tokens)}
        if positions != sorted(set(positions)):
            raise Broken(f"the retained positions {positions} are not unique and in order")
        if not protected <= set(positions):
            raise Broken(f"{sorted(protected - set(positions))} were evicted, which are protected")
        low, high = min(tokens, C), min(tokens, C + schedule.spare)
        if head in numbers.rule.full_heads:
            low = high = tokens
        elif numbers.rule.threshold is not None:
            high = tokens
        if not schedule.prompt and not low <= len(positions) <= high:
            raise Broken(f"{len(positions)} of {tokens} tokens are cached at a budget of {C}")
    if schedule.prompt and not numbers.rule.heads:
        C = numbers.budget
        most = tokens if tokens < prompt else min(C, prompt) + tokens - prompt
        each = most
        if schedule.then != "keep" and tokens >= prompt and most > C:
            each = C + (most - C) % (schedule.spare + 1)
        held = [len(positions) for positions in heads]
        expected = [tokens if head in numbers.rule.full_heads else each for head in range(KV_HEADS)]
        shifted = numbers.rule.cut is not None and numbers.rule.cut.floor is not None
        if numbers.rule.threshold is not None:
            expected = [min(tokens, max(n, each)) for n in held]  # any number more may stay
        if sum(held) != sum(expected) or (not shifted and held != expected):
            raise Broken(f"heads hold {held} of {tokens} tokens at a budget of {C}, prompt {prompt}")


def decided(c: Case) -> None:
    """A negated rule retains other tokens; where the rule has no choice, the same ones."""
    least = max(2, int(c.budget[0]))  # two tokens may always rank equal
    # a window may fill small budgets, so that nothing is left to decide
    may_choose = [b for b in range(least, MOST_CHOICE + 1) if _chooses(c, b)]
    if not may_choose:
        if not _compared(c, int(c.budget[0]), TOKENS)[0]:
            raise Broken(
                f"the opposite rule retains other tokens, where all but one are protected (budget {int(c.budget[0])})"
            )
        return
    # a rule may need more tokens before its priorities differ
    for budget in sorted({may_choose[0], may_choose[-1]}):
        same, varied = _compared(c, budget, _length(budget))
        if varied:
            break
    else:
        raise Excepted("its priorities are all equal, so that the oldest token is evicted")
    if same:
        raise Broken(f"the opposite rule retains the same tokens (budget {budget}): its priorities have no effect")


def _length(budget: int) -> int:
    return max(TOKENS, 2 * budget)


def _chooses(c: Case, budget: int) -> bool:
    stated = c.policy.keeps(budget, c.layer, c.layers, _length(budget), c.prepared[0])
    return chooses(stated, KV_HEADS, _length(budget))


def _compared(c: Case, budget: int, tokens: int) -> tuple[bool, bool]:
    """Whether a rule and its opposite retain the same of that many tokens, and whether priorities differ."""
    policy, varied = opposite(c.policy)
    # repeated vectors are scaled, so that no two are equal
    longer = [torch.cat([x * (1 + i / 8) for i in range(-(-tokens // TOKENS))], 2)[:, :, :tokens] for x in c.tensors]
    ran, other = (x.run(*longer, budget=budget, prompt=tokens) for x in (c, replace(c, policy=policy)))
    return ran.retained == other.retained and torch.equal(ran.output, other.output), any(varied)


def backends(c: Case) -> None:
    """The readable reference and the fast path give the same, for rows with different numbers and lengths."""
    reference, fast = (c.run(lengths=c.lengths, backend=b) for b in ("reference", "torch"))
    _equal(fast.output, reference.output, "the torch path differs from the reference")
    _same_state(fast.state, reference.state, "the torch path ends in another state than the reference")
    single = c.run(*(x.float() for x in c.tensors), lengths=c.lengths)
    _equal(single.output.double(), reference.output, "in float32 the outputs differ by more than rounding")
    if single.retained != reference.retained:
        raise Broken("in float32 other tokens are retained than in float64")


def precision(c: Case) -> None:
    """Half precision is accumulated in float32: the retained tokens are those of an exact computation."""
    for dtype in (torch.bfloat16, torch.float16):
        halves = [x.to(dtype) for x in c.tensors]
        ran, exact = c.run(*halves), c.run(*(x.double() for x in halves))
        if ran.output.dtype != dtype:
            raise Broken(f"inputs of {dtype} give outputs of {ran.output.dtype}")
        if ran.retained != exact.retained:
            raise Broken(f"in {dtype} other tokens are retained than in float64")
        said = f"the outputs in {dtype} differ by more than rounding"
        _equal(ran.output.double(), exact.output, said, torch.finfo(dtype).eps)


INVARIANTS: dict[str, Callable[[Case], None]] = {
    "its settings are data, and determine what it does": data,
    "1  a budget of the whole sequence is full attention": whole_budget,
    "2  schedules that come to the same are the same": same_schedules,
    "3  batch, padding and order do not change a row": rows,
    "4  chunks and forks equal the whole": chunks,
    "5  later tokens change nothing earlier": causal,
    "6  budgets make no difference until one is full": until_full,
    "7  what the budget says is retained, sinks and newest among it": retained,
    "a negated rule retains other tokens": decided,
    "8  half precision is accumulated in float32": precision,
    "the reference and the fast paths agree": backends,
}
"""What is printed -> the check, which raises `Broken` or `Excepted`; numbered as in docs/semantics.md."""


def _numbers(stated: Retention) -> dict[str, Any]:
    """What a retention says in numbers; a rule may hold functions, which need not compare equal."""
    return {f.name: getattr(stated, f.name) for f in dataclasses.fields(stated) if f.name != "rule"}


def _equal(a: Tensor, b: Tensor, said: str, tolerance: float = 1e-5) -> None:
    if not torch.allclose(a, b, atol=tolerance, rtol=tolerance and max(tolerance, 1e-4)):
        raise Broken(f"{said} (by {float((a - b).abs().max()):.2g})")


def _same_state(a: EvictionState, b: EvictionState, said: str) -> None:
    slots = max(a.positions.shape[-1], b.positions.shape[-1])
    mine, other = (vars(x.pad(slots)) for x in (a, b))
    if not torch.equal(mine["positions"], other["positions"]):
        raise Broken(said)
    for name, x in mine.items():
        if x is not None:
            _equal(x.double(), other[name].double(), f"{said}: {name}")
