"""When a group of cells may stop before all documents are scored (`early_stopping` in the configuration)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from a2sf.errors import ConfigError, nearest
from a2sf.tasks.numbers import is_number

STORED_NAMES = {"significant": "verdict"}
"""Settings that have another name in results and in the names of cells."""


@dataclass(frozen=True)
class StoppingRule:
    """How well the difference between two policies must be known, at each budget and schedule that both have.

    Attributes:
        pair: names of the two policies.
        half_width: half the width of the difference's confidence interval at which scoring stops, in points (hundredths of
            the metric); None: the width does not matter.
        significant: whether scoring also stops when the interval excludes zero. True if `half_width` is None.
        confidence: probability that all intervals of a group contain the difference on all documents, 0.5 to below 1.
        metric: name of a metric that each document has, with values from 0 to 1.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    pair: tuple[str, str]
    half_width: float | None = None
    significant: bool = False
    confidence: float = 0.95
    metric: str = "acc"

    def __post_init__(self) -> None:
        pair = self.pair
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(p, str) for p in pair)):
            raise ConfigError("early_stopping.pair", pair, "give the names of two policies, such as [a2sf,h2o]")
        object.__setattr__(self, "pair", tuple(pair))
        if pair[0] == pair[1]:
            raise ConfigError("early_stopping.pair", list(pair), "give two different policies")
        width = self.half_width
        if width is not None and not (is_number(width) and 0 < width <= 100):
            allowed = "give a number of points above 0 and up to 100, or null"
            raise ConfigError("early_stopping.half_width", width, allowed)
        if not (is_number(self.confidence) and 0.5 <= self.confidence < 1):
            allowed = "give a probability from 0.5 to below 1, such as 0.95"
            raise ConfigError("early_stopping.confidence", self.confidence, allowed)
        if width is None and not self.significant:
            object.__setattr__(self, "significant", True)

    @property
    def stored(self) -> dict[str, Any]:
        """The settings as a result stores them."""
        return {STORED_NAMES.get(k, k): v for k, v in dataclasses.asdict(self).items()}

    @property
    def tag(self) -> str:
        """Part of a cell's name, because these settings decide which documents the cell has."""
        settings = json.dumps(self.stored, sort_keys=True)
        return f"until{hashlib.sha256(settings.encode()).hexdigest()[:4]}"

    def check(self, policies: Sequence[str]) -> None:
        """Refuse a pair that is not among `policies`, those of a sweep.

        Raises:
            ConfigError: naming the first policy that is missing.
        """
        for name in self.pair:
            if name not in policies:
                allowed = f"its policies must be in the sweep, which has {', '.join(dict.fromkeys(policies))}"
                raise ConfigError("early_stopping.pair", list(self.pair), allowed + nearest(name, policies))
