"""What every policy must hold, tried on random tensors: the invariants of docs/semantics.md as functions.

`a2sf check` runs them on a policy, the tests on every policy there is. `attend` below is the only place that says how a
policy is run; an invariant is one function more in `INVARIANTS`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from a2sf.engine.eviction import EvictionState
from a2sf.engine.functional import evicting_attention
from a2sf.policies.base import UNLIMITED, Policy

TOKENS, ROWS, HEADS, KV_HEADS, SIZE = 24, 3, 4, 2, 8
SEEDS = 8


class Broken(Exception):
    """An invariant does not hold; the message says where it was seen."""


@dataclass(frozen=True)
class Case:
    """One random trial.

    Attributes:
        policy: the policy that is tried.
        budget: `C`, from the policy's least to half the tokens.
        cut: where a sequence is cut in two, from 1 to `TOKENS - 1`.
        lengths: int64 [ROWS], the rows' own lengths, at least 1.
        query: [ROWS, HEADS, TOKENS, SIZE].
        key, value: [ROWS, KV_HEADS, TOKENS, SIZE].
    """

    policy: Policy
    budget: int
    cut: int
    lengths: Tensor
    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


@dataclass(frozen=True)
class Finding:
    """What became of one invariant: `broken` is None where it held in every trial, else where it did not."""

    name: str
    broken: str | None


def check(policy: Policy, seeds: int = SEEDS) -> Iterator[Finding]:
    """Try every invariant on `policy`, each in `seeds` random trials.

    A policy that raises has broken the invariant that was tried.
    """
    for name, invariant in INVARIANTS.items():
        broken = None
        for seed in range(seeds):
            try:
                invariant(case(policy, seed))
            except Broken as error:
                broken = f"{error} (trial {seed})"
            except Exception as error:  # the user's own code
                broken = f"it raised {type(error).__name__}: {error} (trial {seed})"
            if broken:
                break
        yield Finding(name, broken)


def case(policy: Policy, seed: int) -> Case:
    """The random trial of that number."""
    g = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, max(low, high) + 1, (), generator=g))

    return Case(
        policy=policy,
        budget=whole(policy.least_budget, TOKENS // 2),
        cut=whole(1, TOKENS - 1),
        lengths=torch.randint(1, TOKENS + 1, (ROWS,), generator=g),
        query=torch.randn(ROWS, HEADS, TOKENS, SIZE, generator=g),
        key=torch.randn(ROWS, KV_HEADS, TOKENS, SIZE, generator=g),
        value=torch.randn(ROWS, KV_HEADS, TOKENS, SIZE, generator=g),
    )


def attend(
    policy: Policy, budget: int, query: Tensor, key: Tensor, value: Tensor, **more: Any
) -> tuple[Tensor, EvictionState]:
    """Attention under `policy` in layer 0, as `evicting_attention`."""
    kept = policy.retention(budget, 0)
    numbers: dict[str, Any] = {f.name: getattr(kept, f.name) for f in dataclasses.fields(kept)}
    return evicting_attention(query, key, value, **numbers, **more)


def data(c: Case) -> None:
    """A cell is identified by its policy's settings, and workers get them as text."""
    settings = {f.name: getattr(c.policy, f.name) for f in dataclasses.fields(c.policy)}
    try:
        json.dumps(settings)
    except TypeError as error:
        raise Broken(f"a setting is neither number, text, list nor mapping of such: {error}") from error
    if c.policy.retention(c.budget, 0) != c.policy.retention(c.budget, 0):
        raise Broken(f"retention gives other numbers when it is asked again (budget {c.budget})")
    if type(c.policy)(**settings).retention(c.budget, 0) != c.policy.retention(c.budget, 0):
        raise Broken(f"retention gives other numbers for a policy with the same settings (budget {c.budget})")


def whole_budget(c: Case) -> None:
    """A budget of the whole sequence is full causal attention."""
    for budget in (TOKENS, TOKENS + c.cut):
        output, _ = attend(c.policy, budget, *c.tensors)
        full = torch.nn.functional.scaled_dot_product_attention(*c.tensors, is_causal=True, enable_gqa=True)
        _equal(output, full, f"budget {budget} for {TOKENS} tokens is not full attention")


def rows(c: Case) -> None:
    """Neither the batch, nor padding, nor the order of the batch changes a row."""
    output, state = attend(c.policy, c.budget, *c.tensors, lengths=c.lengths)
    order = torch.arange(ROWS - 1, -1, -1)
    turned, _ = attend(c.policy, c.budget, *(x[order] for x in c.tensors), lengths=c.lengths[order])
    _equal(turned, output[order], "the order of the batch changes a row")
    for row, n in enumerate(c.lengths.tolist()):
        alone, its = attend(c.policy, c.budget, *(x[row : row + 1, :, :n] for x in c.tensors))
        _equal(alone[0], output[row, :, :n], f"a row of {n} tokens is another alone than in a padded batch")
        _same_tokens(its.positions[0], state.positions[row], f"a row of {n} tokens keeps others in a padded batch")


def chunks(c: Case) -> None:
    """A sequence in chunks equals the whole; forks of a beginning equal each sequence from scratch."""
    whole, end = attend(c.policy, c.budget, *c.tensors)
    first, state = attend(c.policy, c.budget, *(x[:, :, : c.cut] for x in c.tensors))
    later = [x[:, :, c.cut :] for x in c.tensors]
    rest, continued = attend(c.policy, c.budget, *later, state=state)
    _equal(torch.cat([first, rest], 2), whole, f"cut after {c.cut} tokens, the outputs differ from the whole's")
    _same_tokens(continued.positions, end.positions, f"cut after {c.cut} tokens, others are kept")
    forked, _ = attend(c.policy, c.budget, *later, state=state.select(torch.zeros(ROWS, dtype=torch.int64)))
    _equal(forked[0], rest[0], f"forked after {c.cut} tokens, a row differs from the whole")


def causal(c: Case) -> None:
    """Later tokens change nothing earlier."""
    output, _ = attend(c.policy, c.budget, *c.tensors)
    others = [torch.cat([x[:, :, : c.cut], x[:, :, c.cut :].flip(0, 2)], 2) for x in c.tensors]
    changed, _ = attend(c.policy, c.budget, *others)
    _equal(changed[:, :, : c.cut], output[:, :, : c.cut], f"tokens after {c.cut} change outputs before")


def until_full(c: Case) -> None:
    """Budgets make no difference until one is full: sequences of different budgets share their beginnings."""
    budgets = (max(c.budget, 2), max(c.budget, 2) + c.cut)
    beginning = [x[:, :, : budgets[0]] for x in c.tensors]
    (a, state), (b, other) = (attend(c.policy, budget, *beginning) for budget in budgets)
    told = f"before anything is evicted, budgets of {budgets[0]} and {budgets[1]} tokens differ in"
    _equal(a, b, f"{told} their outputs")
    _equal(state.scores, other.scores, f"{told} their scores")


def kept(c: Case) -> None:
    """At most the budget is cached, each position once, sinks and the newest tokens among them."""
    numbers = c.policy.retention(c.budget, 0)
    if c.policy.uses_budget and numbers.budget > c.budget:
        most = "no limit" if numbers.budget == UNLIMITED else f"{numbers.budget} tokens"
        raise Broken(f"it may hold {c.budget} tokens and asks for {most}")
    for tokens in (c.cut, TOKENS):
        _, state = attend(c.policy, c.budget, *(x[:, :, :tokens] for x in c.tensors))
        for positions in state.positions.reshape(-1, state.positions.shape[-1]).tolist():
            there = [p for p in positions if p >= 0]
            protected = {*range(min(numbers.sinks, tokens)), *range(max(0, tokens - numbers.recent), tokens)}
            if there != sorted(set(there)):
                raise Broken(f"the kept positions {there} are not each there once, in order")
            if len(there) > numbers.budget:
                raise Broken(f"{len(there)} tokens are cached at a budget of {c.budget}")
            if not protected <= set(there):
                raise Broken(f"{sorted(protected - set(there))} were evicted, which are protected")


def precision(c: Case) -> None:
    """Half precision is accumulated in float32: the kept tokens are those of an exact computation."""
    for dtype in (torch.bfloat16, torch.float16):
        halves = [x.to(dtype) for x in c.tensors]
        output, state = attend(c.policy, c.budget, *halves)
        exact, its = attend(c.policy, c.budget, *(x.double() for x in halves))
        _same_tokens(state.positions, its.positions, f"in {dtype} other tokens are kept than in float64")
        _equal(output.double(), exact, f"the outputs in {dtype} differ by more than rounding", torch.finfo(dtype).eps)


INVARIANTS: dict[str, Callable[[Case], None]] = {
    "its settings are data, and determine its numbers": data,
    "1  a budget of the whole sequence is full attention": whole_budget,
    "3  batch, padding and order do not change a row": rows,
    "4  chunks and forks equal the whole": chunks,
    "5  later tokens change nothing earlier": causal,
    "6  budgets make no difference until one is full": until_full,
    "7  at most the budget is kept, sinks and newest among it": kept,
    "8  half precision is accumulated in float32": precision,
}
"""What is printed -> the check, which raises `Broken`. Numbered as in docs/semantics.md, whose second names policies."""


def _equal(a: Tensor, b: Tensor, told: str, tolerance: float = 2e-5) -> None:
    if not torch.allclose(a, b, atol=tolerance, rtol=max(tolerance, 1e-4)):
        raise Broken(f"{told} (by {float((a - b).abs().max()):.2g})")


def _same_tokens(a: Tensor, b: Tensor, told: str) -> None:
    slots = max(a.shape[-1], b.shape[-1])
    wide = [torch.nn.functional.pad(x, (0, slots - x.shape[-1]), value=-1) for x in (a, b)]
    if not torch.equal(*wide):
        raise Broken(told)
