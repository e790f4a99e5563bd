"""Heads: listed key/value heads retain all tokens, the other heads retain the first and the newest tokens.

Papers: Wu et al., 2024 (retrieval heads, arXiv 2404.15574); Xiao et al., 2024 (DuoAttention, 2410.10819). The list is a
setting; `a2sf heads` finds one. Deviations: heads are key/value heads; the budget is that of the other heads, so that a
layer with listed heads holds more than `C` tokens per head.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from a2sf.errors import ConfigError
from a2sf.policies.base import Retention
from a2sf.policies.rule import Rule
from a2sf.shipped import found
from baselines.streaming import Streaming

ALLOWED = "give a list of [layer, head] pairs, counted from 0, or a JSON file of one"


@dataclass(frozen=True, kw_only=True)
class Heads(Streaming):
    """StreamingLLM, except for the listed heads.

    Attributes:
        sinks: how many of the first tokens the other heads never evict.
        heads: `[layer, head]` pairs, or the path of a JSON file with such a list, which is read at once.
    """

    name: ClassVar[str] = "heads"
    label: ClassVar[str] = "Retrieval heads"

    heads: Any = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.heads
        if isinstance(given, str):
            try:
                given = json.loads(found(given).read_text())
            except (OSError, ValueError) as error:
                raise ConfigError("policy.heads", self.heads, f"{ALLOWED}; {error}") from error
        if not isinstance(given, Sequence) or isinstance(given, str) or not all(map(_is_pair, given)):
            raise ConfigError("policy.heads", self.heads, ALLOWED)
        pairs = tuple(sorted({(int(layer), int(head)) for layer, head in given}))
        object.__setattr__(self, "heads", pairs)

    def check(self, layers: int, kv_heads: int | None = None) -> None:
        for layer, head in self.heads:
            if layer >= layers or (kv_heads is not None and head >= kv_heads):
                size = f"{layers} layers" + (f" of {kv_heads} key/value heads" if kv_heads is not None else "")
                raise ConfigError("policy.heads", [layer, head], f"the model has {size}, counted from 0")

    def retention(self, budget: int, layer: int) -> Retention:
        full = tuple(h for at, h in self.heads if at == layer)
        return replace(super().retention(budget, layer), rule=Rule(full_heads=full))


def _is_pair(x: Any) -> bool:
    pair = isinstance(x, Sequence) and not isinstance(x, str) and len(x) == 2
    return pair and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in x)
