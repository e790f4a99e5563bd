"""Log-likelihoods as sequences to read, and a packed row of them as one pass of the model.

Hidden states and caches are shared under different conditions. Two sequences with equal beginnings have equal hidden
states until one of their caches is pruned, whatever the policies. Their caches are equal only if the policies also rank
tokens by the same rule and forgetting factor. So a row holds a forest of tokens, and for each rule a forest of cache states
on the columns of that row.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from a2sf.hf.attention import Plan
from a2sf.hf.attention.mixed import MixedPass
from a2sf.hf.reader import uncut
from a2sf.hf.warned import Warned
from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.model.rotary import Projection, Rotary
from a2sf.policies.prepared import Prepared
from a2sf.policies.schedule import STEP, Schedule
from a2sf.scoring.passes.full_cache_prefix import full_cache_prefix, shareable_prefix
from a2sf.scoring.passes.packing import Item, Pack, build, numbered
from a2sf.scoring.systems import System

FULL_CACHE = Retention(budget=UNLIMITED)


@dataclass(frozen=True)
class ScoredSequence:
    """One log-likelihood to compute: the tokens the model reads, and those it must predict.

    Attributes:
        retention: what each layer retains.
        schedule: when tokens are evicted.
        before_cut: tokens before the cut of the prompt schedule; None: all of the context.
        undecided: whose policy looks at the prompt before it says what is retained; until then `retention` is as if all
            layers were equal. None: `retention` holds.
        later: how many tokens may be read after these, of a text that is generated.
    """

    read: tuple[int, ...]
    targets: tuple[int, ...]
    retention: tuple[Retention, ...]
    schedule: Schedule
    before_cut: int | None = None
    undecided: System | None = None
    later: int = 0

    @staticmethod
    def of(
        system: System, layers: int, read: tuple[int, ...], targets: tuple[int, ...], cut: int, later: int = 0
    ) -> ScoredSequence:
        """A sequence as `system` reads it in a model of so many layers; `cut` is `before_cut`.

        Raises:
            UserError: as `System.retention`.
        """
        total = len(read) + later
        retention = system.retention(total, cut, layers)
        undecided = system if system.cuts_by_prompt(retention, cut, total) else None
        return ScoredSequence(read, targets, retention, system.schedule, cut, undecided, later)

    @property
    def context(self) -> int:
        """Tokens of the context; the last of them predicts the first target."""
        return len(self.read) + 1 - len(self.targets)

    @property
    def prompt(self) -> int:
        """Tokens that the prompt schedule reads before it evicts."""
        return self.before_cut or self.context

    @cached_property
    def unpruned_outputs(self) -> int:
        """How many of the first tokens have the full cache's outputs, whatever the policy; `UNLIMITED`: all."""
        if self.undecided is not None:
            return self.prompt
        clean = full_cache_prefix(self.retention, self.schedule, self.prompt, total=len(self.read))
        return UNLIMITED if clean >= UNLIMITED else clean + 1

    @property
    def simplest(self) -> ScoredSequence:
        """A sequence with the same log-likelihood: with the full cache, if no token that is read sees a pruned one."""
        # what a threshold leaves is counted, so that a cut after the last token matters too
        counted = any(k.rule.threshold is not None for k in self.retention)
        if self.unpruned_outputs < len(self.read) + counted:
            return self
        return replace(self, retention=(FULL_CACHE,) * len(self.retention), schedule=STEP, undecided=None)

    @property
    def prompt_sequence(self) -> ScoredSequence:
        """The prompt of an undecided sequence alone and uncut, for its policy to look at; the same `engine_call`."""
        read = self.read[: self.prompt]
        return ScoredSequence(read, (), uncut(self.retention, len(read)), self.schedule, len(read) + 1)

    def decided(self, prepared: Prepared) -> ScoredSequence:
        """The same with what is retained, once its policy knows the prompt.

        Raises:
            UserError: as `System.retention`.
        """
        assert self.undecided is not None
        total = len(self.read) + self.later
        retention = self.undecided.retention(total, self.prompt, len(self.retention), prepared)
        return replace(self, retention=retention, undecided=None)

    def engine_call(self, dense: bool) -> Hashable:
        """Equal for sequences that the engine can attend in one call.

        Args:
            dense: whether sequences whose scores decide nothing are attended in calls of their own.
        """
        unscored = dense and all(
            k.growth is None and (k.budget == UNLIMITED or k.recent == k.budget) for k in self.retention
        )
        return unscored, self.schedule, tuple(k.rule for k in self.retention)

    @property
    def factors(self) -> Hashable:
        """The forgetting factor of each layer: sequences share a cache state only if these are equal."""
        return tuple(k.forgetting_factor for k in self.retention)

    def item(self) -> Item:
        """For packing the tokens that the model reads."""
        return Item(self.read, (self.schedule, self._evolution), self._shareable(self.unpruned_outputs))

    def state(self) -> Item:
        """For packing cache states, among sequences with equal `engine_call` and `factors`."""
        certain = shareable_prefix(self.retention, self.schedule, self.prompt, len(self.read))
        return Item(self.read, self._evolution, self._shareable(certain))

    def _shareable(self, certain: int) -> int:
        """At most so many first tokens are read with other sequences: while undecided, none from the prompt's last on."""
        return certain if self.undecided is None else min(certain, self.prompt - 1)

    @property
    def needs_future(self) -> bool:
        """Whether its policy is an oracle, which needs the tokens to come."""
        return any(k.rule.precompute is not None for k in self.retention)

    @property
    def _evolution(self) -> Hashable:
        """What determines how a cache evolves while given tokens are read; for an oracle also the tokens to come."""
        prompt = self.prompt if self.schedule.prompt else None
        return self.retention, prompt, self.read if self.needs_future else None, self.undecided


@dataclass(frozen=True)
class PassSettings:
    """What a pass must know of the model and how the engine is to run.

    Attributes:
        layers, policy_on_sliding, backend: as in `Plan`.
        device: where it computes.
        rotary, projections: as in `Plan`.
    """

    layers: int
    policy_on_sliding: bool
    backend: str
    device: torch.device
    rotary: Sequence[Rotary | None] | None = None
    projections: Sequence[Projection] | None = None


Sequences = Sequence[ScoredSequence] | Mapping[int, ScoredSequence]
"""By the numbers that a row names them by."""


def pass_of(row: Pack, sequences: Sequences, settings: PassSettings) -> Plan | MixedPass:
    """The pass that reads a row: a plan for each `engine_call` among its sequences, or the only one.

    Args:
        row: as `pack` or `build` gives it.
        sequences: those of `row.items`, each of which is its `simplest`. What they retain is looked up when a layer reads
            them, so that undecided ones may be replaced by decided ones between two parts of the pass.
    """
    calls: dict[Hashable, list[int]] = {}
    for which, i in enumerate(row.items):
        calls.setdefault(sequences[i].engine_call(settings.device.type != "cpu"), []).append(which)
    columns_of = [row.columns(which) for which in range(len(row.items))]
    plans, columns, found = [], [], {}
    tokens = 0
    for places in calls.values():
        forest = _states(row, places, sequences)
        of_forest = _columns(forest, columns_of)
        plans.append(_plan(forest, row.items, sequences, settings))
        columns.append(of_forest)
        for at, which in enumerate(forest.items):
            found[which] = tokens + forest.columns(at)
        tokens += len(of_forest)
    if len(plans) == 1 and np.array_equal(columns[0], np.arange(len(row.tokens))):
        return plans[0]
    place = {i: which for which, i in enumerate(row.items)}
    back = torch.empty(len(row.tokens), dtype=torch.int64).numpy()
    for start, length, owner, first in zip(row.start, row.length, row.owner, _firsts(row), strict=True):
        back[start : start + length] = found[place[owner]][first : first + length]
    return MixedPass(
        plans=plans,
        columns=[torch.from_numpy(c).to(settings.device) for c in columns],
        back=torch.from_numpy(back).to(settings.device),
        segments=([0] * len(row.start), row.start, row.length),
        layers=settings.layers,
    )


def _states(row: Pack, places: list[int], sequences: Sequences) -> Pack:
    """The forest of states of some sequences of a row, given and named by their places in `row.items`."""
    trees: dict[Hashable, list[int]] = {}
    for which in places:
        # sequences that share no segment of the row share no state
        trees.setdefault((row.path[which][0], sequences[row.items[which]].factors), []).append(which)
    chosen = set(places)
    items = [sequences[i].state() if which in chosen else _NOTHING for which, i in enumerate(row.items)]
    return build(numbered(items), list(trees.values()))


_NOTHING = Item((), None, 0)


def _columns(forest: Pack, columns_of: Sequence[np.ndarray]) -> np.ndarray:
    """Where in the packed row each token of a forest of states is, int64."""
    pieces = zip(forest.owner, forest.length, _firsts(forest), strict=True)
    return np.concatenate([columns_of[owner][first : first + length] for owner, length, first in pieces])


def _firsts(forest: Pack) -> list[int]:
    """Of each segment, the position of its first token."""
    return [forest.positions[start] for start in forest.start]


def _plan(forest: Pack, items: Sequence[int], sequences: Sequences, settings: PassSettings) -> Plan:
    def through(segment: int) -> ScoredSequence:
        return sequences[items[forest.owner[segment]]]

    return Plan(
        row=[0] * len(forest.start),
        start=forest.start,
        length=forest.length,
        parent=forest.parent,
        retention=lambda segment, layer: through(segment).retention[layer],
        layers=settings.layers,
        schedule=through(0).schedule,
        prompt=lambda segment: through(segment).prompt,
        policy_on_sliding=settings.policy_on_sliding,
        backend=settings.backend,
        rotary=settings.rotary,
        projections=settings.projections,
        serves=[items[which] for which in forest.items],
        ends=[path[-1] for path in forest.path],
        warned=Warned(),
    )
