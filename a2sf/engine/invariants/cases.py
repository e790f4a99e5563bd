"""Random cases for a policy on plain tensors, which the invariants are checked on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from a2sf.engine.functional import attend
from a2sf.engine.state import EvictionState
from a2sf.errors import ConfigError
from a2sf.policies.base import Policy, Retention
from a2sf.policies.prepared import Numbers, Prepared
from a2sf.policies.schedule import Schedule

TOKENS, ROWS, HEADS, KV_HEADS, SIZE = 24, 3, 4, 2, 8
MOST_LAYERS = 128
MOST_TOKENS = 64
"""A quarter of the tokens for which numbers are prepared."""


@dataclass(frozen=True)
class Case:
    """One random case. Tensors are float64, so that rounding decides between no two tokens.

    Attributes:
        policy, schedule: what is checked.
        layer, layers: of as many layers as the policy's settings fit, mostly one.
        budget: int64 [ROWS], `C`, from the policy's least to half the tokens.
        prompt: int64 [ROWS], each row's prompt, from one token to a few beyond its end.
        lengths: int64 [ROWS], the rows' own lengths, at least 1.
        cuts: where a sequence is cut, one or two places in ascending order, from 1 to `TOKENS - 1`.
        prepared: for each row what a policy that prepares may have found; else None.
        query: [ROWS, HEADS, TOKENS, SIZE].
        key, value: [ROWS, KV_HEADS, TOKENS, SIZE].
    """

    policy: Policy
    schedule: Schedule
    layer: int
    layers: int
    budget: Tensor
    prompt: Tensor
    lengths: Tensor
    cuts: Sequence[int]
    query: Tensor
    key: Tensor
    value: Tensor
    prepared: tuple[Prepared | None, ...] = (None,) * ROWS

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def run(self, *tensors: Tensor, rows: Sequence[int] | Tensor | None = None, **more: Any) -> CaseResult:
        """Attend `tensors`, all by default, with the numbers of the case's `rows`."""
        numbers: dict[str, Any] = {"schedule": self.schedule, "layer": self.layer, "layers": self.layers}
        at = torch.arange(ROWS) if rows is None else torch.as_tensor(rows)
        numbers |= {"budget": self.budget[at], "prompt": self.prompt[at]} | more
        numbers["prepared"] = [self.prepared[row] for row in at.tolist()]
        return CaseResult(*attend(self.policy, *(tensors or self.tensors), **numbers))

    def stated(self, row: int) -> Retention:
        """What the policy states for that row."""
        prompt = int(self.prompt[row]) if self.schedule.prompt else None
        return self.policy.keeps(int(self.budget[row]), self.layer, self.layers, prompt, self.prepared[row])


@dataclass(frozen=True)
class CaseResult:
    """Output [B, HEADS, T, SIZE] and the state at the end."""

    output: Tensor
    state: EvictionState

    @property
    def retained(self) -> list[list[list[int]]]:
        """The retained positions of each row and KV head."""
        return [[[p for p in head if p >= 0] for head in row] for row in self.state.positions.tolist()]


def case(policy: Policy, schedule: Schedule, seed: int, layers: int | None = None) -> Case:
    """The random case of that number."""
    g = torch.Generator().manual_seed(seed)
    layers = layers_of(policy) if layers is None else layers

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(low, high) + 1, shape, generator=g)

    def normal(heads: int) -> Tensor:
        return torch.randn(ROWS, heads, TOKENS, SIZE, generator=g).double()

    made = Case(
        policy=policy,
        schedule=schedule,
        layer=int(integers(0, layers - 1)),
        layers=layers,
        budget=integers(policy.min_budget, TOKENS // 2, ROWS),
        prompt=integers(1, TOKENS + 3, ROWS),
        lengths=integers(1, TOKENS, ROWS),
        cuts=sorted(set(integers(1, TOKENS - 1, 2).tolist())),
        query=2 * normal(HEADS),
        key=normal(KV_HEADS),
        value=normal(KV_HEADS),
    )
    if policy.prepares:
        found = (torch.rand(layers, KV_HEADS, 4 * MOST_TOKENS, generator=g).double() for _ in range(ROWS))
        made = replace(made, prepared=tuple(Prepared(tuple(map(Numbers, of_layers))) for of_layers in found))
    one_rule = len({made.stated(row).rule for row in range(ROWS)}) == 1
    return made if one_rule else replace(made, budget=made.budget[:1].expand(ROWS))


def layers_of(policy: Policy) -> int:
    """How many layers a policy's settings fit; for most any number, and 1 will do."""
    for layers in range(1, MOST_LAYERS):
        try:
            policy.check(layers, KV_HEADS)
        except ConfigError:
            continue
        return layers
    policy.check(1, KV_HEADS)
    raise AssertionError("unreachable")
