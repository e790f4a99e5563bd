"""When a group of cells may stop before all documents are scored (`until` in the configuration)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from a2sf.errors import ConfigError, nearest


@dataclass(frozen=True)
class Until:
    """What is to be known about two policies, at each budget and schedule that both have, before a group stops.

    Attributes:
        pair: names of two policies.
        half_width: points (hundredths of the metric) to either side within which the difference on all documents is to be
            known; None: it is enough to know which of the two is better.
        verdict: whether knowing which is better is enough as well.
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
        """Part of a cell's name: which documents it has depends on these settings."""
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
