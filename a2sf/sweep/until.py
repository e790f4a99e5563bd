"""Stopping a group of cells as soon as its comparisons are told: documents in one random order, an interval after each."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from a2sf.errors import ConfigError, nearest
from a2sf.policies.schedule import schedule_for
from a2sf.sweep.sequential import PairedMean

if TYPE_CHECKING:
    from a2sf.sweep.cell import Cell

ORDER_SEED = 2407
"""Of the order in which documents are visited: one for all cells, so that equal questions are asked first everywhere."""


@dataclass(frozen=True)
class Until:
    """What is to be told about two policies, at each budget and schedule that both have.

    Attributes:
        pair: names of two policies.
        half_width: points (hundredths of the metric) to either side within which the difference on all documents is to be
            known; None: it is told when one of the two is better.
        verdict: whether knowing which is better tells as well.
        confidence: probability that no interval of a group ever misses the difference on all documents.
        metric: a number per document between 0 and 1.
    """

    pair: tuple[str, str]
    half_width: float | None = None
    verdict: bool = False
    confidence: float = 0.95
    metric: str = "acc"

    def __post_init__(self) -> None:
        pair = self.pair
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(p, str) for p in pair)):
            raise ConfigError("until.pair", pair, "give the names of two policies, such as [a2sf,h2o]")
        object.__setattr__(self, "pair", tuple(pair))
        if pair[0] == pair[1]:
            raise ConfigError("until.pair", list(pair), "give two different policies")
        width = self.half_width
        if width is not None and not (_is_number(width) and 0 < width <= 100):
            raise ConfigError("until.half_width", width, "give a number of points above 0 and up to 100, or null")
        if not (_is_number(self.confidence) and 0.5 <= self.confidence < 1):
            raise ConfigError(
                "until.confidence", self.confidence, "give a probability from 0.5 to below 1, such as 0.95"
            )
        if width is None and not self.verdict:
            object.__setattr__(self, "verdict", True)

    @property
    def tag(self) -> str:
        """Part of a cell's name: which documents it has depends on what was to be told."""
        settings = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"until{hashlib.sha256(settings.encode()).hexdigest()[:4]}"

    def check(self, policies: Sequence[str]) -> None:
        """Refuse a pair that a grid over `policies` has not.

        Raises:
            ConfigError: naming the first that is missing.
        """
        for name in self.pair:
            if name not in policies:
                allowed = f"its policies must be in the sweep, which has {', '.join(dict.fromkeys(policies))}"
                raise ConfigError("until.pair", list(self.pair), allowed + nearest(name, policies))

    def comparisons(self, cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
        """The pairs of a group's cells that are compared: equal budget and schedule, or one that ignores budgets and any."""
        first, second = ([c for c in cells if c.policy.name == name] for name in self.pair)
        return [
            (a, b)
            for a, b in itertools.product(first, second)
            if None in (a.budget, b.budget)
            or (a.budget == b.budget and schedule_for(a.policy, a.schedule) == schedule_for(b.policy, b.schedule))
        ]


@dataclass
class Watch:
    """The comparisons of one group, and what is known of them.

    Attributes:
        until: what is to be told.
        documents: how many there are of each text, seen or not; what is drawn at random, and seen, is texts.
        pairs: names of the cells that are compared.
    """

    until: Until
    documents: Sequence[int]
    pairs: Sequence[tuple[str, str]]
    means: list[PairedMean] = field(init=False)

    def __post_init__(self) -> None:
        alpha = (1 - self.until.confidence) / max(1, len(self.pairs))
        steps = max(self.documents, default=1)
        self.means = [PairedMean(len(self.documents), alpha, steps) for _ in self.pairs]

    def see(self, scores: Mapping[str, Sequence[float]]) -> None:
        """Take in a text's documents: by cell, the metric of each."""
        largest = max(self.documents)
        for (a, b), mean in zip(self.pairs, self.means, strict=True):
            mean.see([sum(x - y for x, y in zip(scores[a], scores[b], strict=True)) / largest])

    def interval(self, mean: PairedMean) -> tuple[float, float]:
        """Of the difference on all documents, from that of the texts' sums over the largest text's documents."""
        scale = max(self.documents) * len(self.documents) / sum(self.documents)
        low, high = mean.interval
        return scale * low, scale * high

    @property
    def told(self) -> bool:
        """Whether every comparison is; a group without one never is."""
        return bool(self.means) and all(map(self._told, self.means))

    def _told(self, mean: PairedMean) -> bool:
        until, (low, high) = self.until, self.interval(mean)
        if until.half_width is not None and 100 * (high - low) / 2 <= until.half_width:
            return True
        return until.verdict and not low <= 0 <= high

    def report(self) -> list[dict[str, Any]]:
        """What is known: the cells, and the interval (in the metric's own unit) of the difference on all documents."""
        return [
            {"cells": list(pair)} | dict(zip(("low", "high"), self.interval(mean), strict=True))
            for pair, mean in zip(self.pairs, self.means, strict=True)
        ]


def order_of(texts: int) -> list[int]:
    """The order in which `texts` texts, each with its documents, are visited."""
    order = list(range(texts))
    random.Random(ORDER_SEED).shuffle(order)
    return order


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
