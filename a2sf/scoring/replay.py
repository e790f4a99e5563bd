"""Scores and generates with exactly the positions that a replay file contains, to check another engine (docs/replay.md)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from a2sf.engine.replay import Recorded, Replay
from a2sf.errors import ConfigError, UserError
from a2sf.hf.attention import Plan, attached, running
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.calls.around import cache_name_of
from a2sf.hf.calls.logits import logits_at, logits_in_parts
from a2sf.hf.devices import input_device
from a2sf.hf.exactness import require_exact
from a2sf.hf.layer_check import unpruned
from a2sf.hf.loading.config import kv_heads_of
from a2sf.policies.base import Policy, Retention
from a2sf.policies.rule import Recording, Rule
from a2sf.scoring.passes.logits import log_probabilities


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedPolicy(Policy):
    """Evicts what was evicted from one recorded text; it cannot be used for another text.

    Attributes:
        recorded: the text.
    """

    name: ClassVar[str] = "replay"
    label: ClassVar[str] = "Replay"
    uses_budget: ClassVar[bool] = False
    schedules: ClassVar[tuple[str, ...]] = ("step",)

    recorded: Recorded

    def retention(self, budget: int, layer: int) -> Retention:
        return self.retentions[layer]

    @cached_property
    def retentions(self) -> tuple[Retention, ...]:
        """One for each layer; its budget is the most that a head of the layer caches."""
        most = self.recorded.cached().max(axis=(1, 2))
        steps = torch.from_numpy(self.recorded.evicted_at.astype(np.int64))
        return tuple(
            Retention(budget=max(1, int(C)), rule=Rule(scored=False, recording=Recording(of_layer)))
            for C, of_layer in zip(most, steps, strict=True)
        )


@dataclass(frozen=True)
class Replayed:
    """The results of one text.

    Attributes:
        loglikelihoods: of each token of the text, read with the recorded positions, in nats.
        full: the same with the full cache.
        generated: as many tokens as the text has, chosen greedily with the recorded positions.
        retained: tokens cached at the end, mean over layers and KV heads.
    """

    recorded: Recorded
    loglikelihoods: tuple[float, ...]
    full: tuple[float, ...]
    generated: tuple[int, ...]
    retained: float

    @property
    def first_difference(self) -> int | None:
        """The place of the first generated token that is not the text's, from 0; None: all are equal."""
        pairs = enumerate(zip(self.generated, self.recorded.text, strict=True))
        return next((i for i, (here, there) in pairs if here != there), None)

    @property
    def deviation(self) -> float | None:
        """The largest absolute difference from the other engine's log-likelihoods, in nats; None: the file has none."""
        if self.recorded.loglikelihoods is None:
            return None
        return float(np.abs(np.subtract(self.loglikelihoods, self.recorded.loglikelihoods)).max())


def check_model(replay: Replay, model: PreTrainedModel) -> None:
    """Refuse a file that is of another model than `model`.

    Raises:
        ConfigError: if layers, KV heads, the vocabulary or the longest position do not fit.
    """
    config = model.config.get_text_config()
    heads = kv_heads_of(model.config)
    for key, given, has in (
        ("layers", replay.layers, config.num_hidden_layers),
        ("kv_heads", replay.kv_heads, heads),
    ):
        if has is not None and given != has:
            raise ConfigError(key, given, f"the model has {has}, so that the file is of another model")
    known: Any = model.get_input_embeddings().num_embeddings
    positions = getattr(config, "max_position_embeddings", None)
    for i, document in enumerate(replay.documents):
        if (token := max(*document.prompt, *document.text)) >= known:
            raise ConfigError(
                f"documents[{i}]", f"token {token}", f"the model knows {known} tokens, the last one {known - 1}"
            )
        if positions is not None and len(document.read) > positions:
            raise ConfigError(f"documents[{i}]", f"{len(document.read)} tokens", f"the model has {positions} positions")


class Replayer:
    """Computes the texts of a replay file with a model.

    Args:
        backend: which implementation of the eviction runs; recordings are run by `torch` and `reference`.

    Raises:
        UnsupportedModel: if the model's attention cannot be pruned exactly.
    """

    def __init__(self, model: PreTrainedModel, backend: str = "auto") -> None:
        require_exact(model)
        self.model, self.backend = model, backend
        self.device = input_device(model)
        self.layers: int = model.config.get_text_config().num_hidden_layers

    def run(self, recorded: Recorded) -> Replayed:
        """Score and generate one text.

        Raises:
            UserError: if a layer cannot follow the recording, because a sliding window of its own decides what it retains.
        """
        policy = RecordedPolicy(recorded=recorded)
        here = self._score(recorded, policy.retentions, recorded.evicted_at)
        full = self._score(recorded, unpruned(self.model))
        return Replayed(
            recorded, here, full, self._generate(recorded, policy), float(recorded.cached()[..., -1].mean())
        )

    def _score(
        self, recorded: Recorded, retention: tuple[Retention, ...], expected: np.ndarray | None = None
    ) -> tuple[float, ...]:
        """Log-likelihoods of the text's tokens in one pass; `expected`: what is to be evicted, which is checked."""
        read = recorded.read
        plan = Plan.of_one(len(read), retention, self.model.config, backend=self.backend, trace=expected is not None)
        index = torch.arange(len(recorded.prompt) - 1, len(read), device=self.device)
        targets = torch.tensor(recorded.text, device=self.device)
        found: list[Tensor] = []
        with attached(self.model), torch.inference_mode(), running(plan):
            inputs = {"input_ids": torch.tensor([read], device=self.device), "use_cache": False}
            for (logits,) in logits_in_parts(self.model, index, **inputs):
                done = sum(map(len, found))
                those = targets[done : done + len(logits)].to(logits.device)
                found.append(log_probabilities(logits, torch.arange(len(logits), device=logits.device), those)[0].cpu())
        if expected is not None:
            for layer in range(self.layers):
                followed = plan.evicted_at[layer][0].cpu().numpy()
                if followed.shape != expected[layer].shape or not np.array_equal(followed, expected[layer]):
                    raise UserError(
                        f"layer {layer} does not follow the recording, because a sliding window of its own decides what "
                        "it retains; record such layers as the model defines them"
                    )
        return tuple(torch.cat(found).tolist())

    def _generate(self, recorded: Recorded, policy: RecordedPolicy) -> tuple[int, ...]:
        """As many tokens as the text has, greedily: a token that would end the text is one like others."""
        cache = PrunedCache(self.model, policy, max_new_tokens=len(recorded.text), backend=self.backend)
        found: list[int] = []
        tokens = list(recorded.prompt)
        with torch.inference_mode():
            while len(found) < len(recorded.text):
                last = torch.tensor([len(tokens) - 1], device=self.device)
                ids = torch.tensor([tokens], device=self.device)
                inputs: dict[str, Any] = {"input_ids": ids, cache_name_of(self.model): cache, "use_cache": True}
                (logits,) = logits_at(self.model, last, **inputs)
                found.append(int(logits[0].float().argmax()))
                tokens = found[-1:]
        return tuple(found)
