"""Log-likelihood requests as sequences to read, and a packed row of them as one pass of the model.

What the model computes and what the engine keeps are shared differently. Two sequences of the same tokens are one to the
model until one of them was pruned, whatever their policies; their caches are one only where tokens are ranked and forgotten
alike as well. So a row has a forest of tokens, and each way of ranking has a forest of states on columns of that row.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from a2sf.hf.attention import Plan
from a2sf.hf.attention.mixed import Mixed
from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.schedule import STEP, Schedule
from a2sf.scoring.passes.full_cache_prefix import shareable, untouched
from a2sf.scoring.passes.packing import Item, Pack, build, numbered

WHOLE = Retention(budget=UNLIMITED)


@dataclass(frozen=True)
class Request:
    """One log-likelihood to compute: the tokens the model reads, and those it must predict.

    Attributes:
        retention: what each layer keeps.
        schedule: when tokens are evicted.
        before_cut: tokens before the cut of the prompt schedule; None: all of the context.
    """

    read: tuple[int, ...]
    targets: tuple[int, ...]
    retention: tuple[Retention, ...]
    schedule: Schedule
    before_cut: int | None = None

    @property
    def context(self) -> int:
        """Tokens of the context; the last of them predicts the first target."""
        return len(self.read) + 1 - len(self.targets)

    @property
    def prompt(self) -> int:
        """Tokens that the prompt schedule reads before it evicts."""
        return self.before_cut or self.context

    @cached_property
    def certain(self) -> int:
        """The first so many tokens come out as the full cache's: the first that sees a pruned cache is not among them."""
        clean = untouched(self.retention, self.schedule, self.prompt)
        return UNLIMITED if clean >= UNLIMITED else clean + 1

    @property
    def simplest(self) -> Request:
        """The same numbers, as the full cache where nothing that is read sees a pruned one."""
        if self.certain < len(self.read):
            return self
        return replace(self, retention=(WHOLE,) * len(self.retention), schedule=STEP)

    def engine_call(self, dense: bool) -> Hashable:
        """Sequences of one call of the engine are equal in this; `dense`: those whose scores decide nothing go apart."""
        unscored = dense and all(k.budget == UNLIMITED or k.recent == k.budget for k in self.retention)
        return unscored, self.schedule, tuple(k.rule for k in self.retention)

    @property
    def factors(self) -> Hashable:
        """States are shared only where tokens are forgotten alike."""
        return tuple(k.forgetting_factor for k in self.retention)

    def item(self) -> Item:
        """As the model's tokens are packed."""
        return Item(self.read, (self.schedule, self._alike), self.certain)

    def state(self) -> Item:
        """As states are packed, among those that are ranked and forgotten alike."""
        return Item(self.read, self._alike, shareable(self.retention, self.schedule, self.prompt))

    @property
    def _alike(self) -> Hashable:
        """What tells how a cache evolves: where it looks at what is to come, that as well."""
        foresees = any(k.rule.precompute is not None for k in self.retention)
        return self.retention, self.prompt if self.schedule.prompt else None, self.read if foresees else None


@dataclass(frozen=True)
class Model:
    """What a pass must know of the model.

    Attributes:
        layers, policy_on_sliding, backend: as in `Plan`.
        device: where it computes.
    """

    layers: int
    policy_on_sliding: bool
    backend: str
    device: torch.device


def pass_of(row: Pack, todo: Sequence[Request], model: Model) -> Plan | Mixed:
    """The pass that reads a row; `row.items` are indices of `todo`, whose requests are their `simplest`."""
    calls: dict[Hashable, list[int]] = {}
    for which, i in enumerate(row.items):
        calls.setdefault(todo[i].engine_call(model.device.type != "cpu"), []).append(which)
    columns_of = [row.columns(which) for which in range(len(row.items))]
    plans, columns, found = [], [], {}
    tokens = 0
    for members in calls.values():
        forest = _states(row, members, todo)
        of_part = _columns(forest, columns_of)
        plans.append(_plan(forest, row.items, todo, model))
        columns.append(of_part)
        for at, which in enumerate(forest.items):
            found[which] = tokens + forest.columns(at)
        tokens += len(of_part)
    if len(plans) == 1 and np.array_equal(columns[0], np.arange(len(row.tokens))):
        return plans[0]
    place = {i: which for which, i in enumerate(row.items)}
    back = np.empty(len(row.tokens), np.int64)
    for start, length, owner, first in zip(row.start, row.length, row.owner, _firsts(row), strict=True):
        back[start : start + length] = found[place[owner]][first : first + length]
    return Mixed(
        plans=plans,
        columns=[torch.from_numpy(c).to(model.device) for c in columns],
        back=torch.from_numpy(back).to(model.device),
        segments=([0] * len(row.start), row.start, row.length),
        layers=model.layers,
    )


def _states(row: Pack, members: list[int], todo: Sequence[Request]) -> Pack:
    """The forest of states of some sequences of a row, given and named by their places in `row.items`."""
    trees: dict[Hashable, list[int]] = {}
    for which in members:
        # what begins apart in the row has no state in common
        trees.setdefault((row.path[which][0], todo[row.items[which]].factors), []).append(which)
    chosen = set(members)
    items = [todo[i].state() if which in chosen else _NOTHING for which, i in enumerate(row.items)]
    return build(numbered(items), list(trees.values()))


_NOTHING = Item((), None, 0)


def _columns(forest: Pack, columns_of: Sequence[np.ndarray]) -> np.ndarray:
    """Where in the packed row each token of a forest of states is, int64."""
    pieces = zip(forest.owner, forest.length, _firsts(forest), strict=True)
    return np.concatenate([columns_of[owner][first : first + length] for owner, length, first in pieces])


def _firsts(forest: Pack) -> list[int]:
    """Of each segment, the position of its first token."""
    return [forest.positions[start] for start in forest.start]


def _plan(forest: Pack, items: Sequence[int], todo: Sequence[Request], model: Model) -> Plan:
    asked = [todo[i] for i in items]
    return Plan(
        row=[0] * len(forest.start),
        start=forest.start,
        length=forest.length,
        parent=forest.parent,
        retention=lambda segment, layer: asked[forest.owner[segment]].retention[layer],
        layers=model.layers,
        schedule=asked[forest.owner[0]].schedule,
        prompt=lambda segment: asked[forest.owner[segment]].prompt,
        policy_on_sliding=model.policy_on_sliding,
        backend=model.backend,
        serves=[items[which] for which in forest.items],
    )
