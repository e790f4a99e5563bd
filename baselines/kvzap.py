"""KVzap: trained gates read a layer's hidden states and predict how much attention each token will get.

Paper: Jégou and Jeblick, 2026 (arXiv 2601.07891): for each layer of a model, a linear layer or a small MLP predicts the
logarithm of a score for each token and key/value head from what the layer's attention reads: that of KVzip, with attention
times the length of the projected value over that of the query's hidden state (KVzip+). Tokens below a threshold are
evicted, except the newest `window` (128 in the paper). Gates belong to one model; on the hub they are `nvidia/KVzap-mlp-
NAME` and `nvidia/KVzap-linear-NAME`. Deviations: without a `threshold`, the best tokens of the whole model are retained, as
a threshold of the prompt's own would retain them; scores are computed in float32; tokens after the prompt get no score and
are retained. The published gates were never run with this code, only random gates of the same format.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from a2sf.errors import ConfigError
from a2sf.policies.base import Policy, Retention, check_tokens
from a2sf.policies.prepared import LayerRead, Numbers, Prepared
from a2sf.policies.rule import Cut, Rule, Step
from baselines.gates import ALLOWED, KEY, Gates, find_gates

RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class KVzap(Policy):
    """Scores of trained gates.

    Attributes:
        gates: a folder of a KVzap model, its file of weights (.safetensors, .pt or .bin), or its name on the hub,
            `owner/name`. `random`: linear gates with random weights for any model, which show only that the policy runs.
        revision: branch, tag or commit of gates on the hub; results name the commit.
        threshold: tokens with a smaller score are evicted, however many they are, and the budget is ignored. None: the
            budget says how many tokens are retained.
        window: how many of the newest tokens of the prompt are never evicted.
        equal_slots: whether each head has the same number of slots, instead of as many as it has of the model's best tokens.
    """

    name: ClassVar[str] = "kvzap"
    label: ClassVar[str] = "KVzap"
    schedules: ClassVar[tuple[str, ...]] = ("prompt",)
    hidden_states: ClassVar[bool] = True

    gates: Any = RANDOM
    revision: str = "main"
    threshold: float | None = None
    window: int = 16
    equal_slots: bool = False

    def __post_init__(self) -> None:
        given = self.threshold
        if given is not None and (
            isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given)
        ):
            raise ConfigError("policy.threshold", given, "give a number, in the units of the gates' scores")
        check_tokens("policy.window", self.window, least=0 if given is None else 1)
        if not isinstance(self.equal_slots, bool):
            raise ConfigError("policy.equal_slots", self.equal_slots, "give true or false")
        if self.equal_slots and given is not None:
            raise ConfigError(
                "policy.equal_slots", True, "with policy.threshold there are no slots; leave out one of the two"
            )
        if not isinstance(self.gates, str) or not self.gates.strip():
            raise ConfigError(KEY, self.gates, ALLOWED)
        if self.found is not None and self.found.revision:
            object.__setattr__(self, "revision", self.found.revision)
        if given is not None:
            object.__setattr__(self, "uses_budget", False)

    @cached_property
    def found(self) -> Gates | None:
        """The gates; None for random ones.

        Raises:
            ConfigError: as `find_gates`.
        """
        return None if self.gates == RANDOM else find_gates(self.gates.strip(), self.revision)

    def check(self, layers: int, kv_heads: int | None = None) -> None:
        if self.found is None:
            return
        L, K = self.found.sizes.layers, self.found.sizes.heads
        if layers != L or kv_heads not in (None, K):
            size = f"{layers} layers" + ("" if kv_heads is None else f" of {kv_heads}")
            why = f"they are for a model of {L} layers of {K} key/value heads, and this one has {size}"
            raise ConfigError(KEY, self.gates, why)

    def check_hidden(self, size: int) -> None:
        if self.found is not None and self.found.sizes.hidden != size:
            why = f"they read hidden states of {self.found.sizes.hidden} numbers, and this model's have {size}"
            raise ConfigError(KEY, self.gates, why)

    def fetch(self) -> None:
        if self.found is not None:
            self.found.fetch()

    def retention(self, budget: int, layer: int) -> Retention:
        if self.threshold is not None:
            rule = Rule(scored=False, threshold=float(self.threshold))
            return Retention(budget=self.window, recent=self.window, rule=rule)
        rule = Rule(scored=False, cut=None if self.equal_slots else Cut(floor=0.0))
        return Retention(budget=budget, recent=min(self.window, budget), rule=rule)

    def look(self, read: LayerRead) -> Tensor:
        """The scores [K, T] of a layer's tokens, in the dtype of its keys."""
        assert read.hidden is not None
        hidden = read.hidden.to(read.key)
        if self.found is None:
            generator = torch.Generator().manual_seed(read.layer)
            weight = torch.randn(len(read.key), hidden.shape[-1], generator=generator)
            return weight.to(hidden) @ hidden.T * hidden.shape[-1] ** -0.5
        self.check_hidden(hidden.shape[-1])
        return self.found.scores(read.layer, hidden)

    def conclude(self, found: list[Tensor]) -> Prepared:
        divides = self.threshold is None and not self.equal_slots
        return Prepared(tuple(map(Numbers, found)), by_numbers=divides, least=max(1, self.window), recent=self.window)

    def priorities(self, step: Step) -> Tensor:
        assert step.prepared is not None, "no scores were prepared for the prompt"
        assert step.prompt is not None
        return step.prepared.masked_fill(step.positions >= step.prompt, torch.inf)

    def stored_settings(self) -> dict[str, Any]:
        """The content of the gates stands for their place and revision."""
        settings = asdict(self)
        del settings["revision"]
        return settings | {"gates": RANDOM if self.found is None else self.found.identity}
