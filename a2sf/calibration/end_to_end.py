"""What a policy does to a model's log-likelihoods of held-out text, all layers together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from a2sf.hf.attention import Plan, attached, running
from a2sf.hf.calls.logits import logits_at
from a2sf.hf.layer_check import layers_of
from a2sf.hf.settings import retention_of
from a2sf.policies.base import UNLIMITED, Policy, Retention
from a2sf.policies.budget import Budget


class HeldOut:
    """Passages with what the full cache says of them.

    Args:
        model: any that can be pruned exactly.
        passages: tokens of each; the first token of one is not predicted.
    """

    def __init__(self, model: PreTrainedModel, passages: Sequence[Sequence[int]]) -> None:
        self.model, self.passages = model, passages
        nothing = (Retention(budget=UNLIMITED),) * layers_of(model)
        self.full: list[Tensor | None] = [None] * len(passages)
        self._nothing = nothing

    def change(self, policy: Policy, ratios: Sequence[float], which: int, only: int | None = None) -> float:
        """Sum over the tokens of passage `which` of |change of log-likelihood| under `policy`, mean over budgets.

        Args:
            ratios: budgets, as shares of the passage's tokens, evicting step by step.
            only: the one layer that is pruned; None: all are.
        """
        tokens = len(self.passages[which]) - 1  # the last token is predicted, never read
        if (full := self.full[which]) is None:
            full = self.full[which] = self._scores(which, self._nothing)
        changes = []
        for ratio in ratios:
            kept = retention_of(policy, Budget(ratio=ratio), tokens, tokens, len(self._nothing))
            if only is not None:
                kept = (*self._nothing[:only], kept[only], *self._nothing[only + 1 :])
            changes.append(float((self._scores(which, kept) - full).abs().double().sum()))
        return sum(changes) / len(changes)

    @property
    def tokens(self) -> int:
        """Predicted tokens of all passages."""
        return sum(len(p) - 1 for p in self.passages)

    def _scores(self, which: int, kept: Sequence[Retention]) -> Tensor:
        """Log-likelihoods of a passage's tokens but the first, float32 [T - 1]."""
        read, device = list(self.passages[which]), self.model.device
        n = len(read) - 1
        plan = Plan.of_rows([n], [0], lambda row, layer: kept[layer], len(kept))
        with torch.inference_mode(), attached(self.model), running(plan):
            index = torch.arange(n, device=device)
            logits = logits_at(self.model, index, input_ids=torch.tensor([read[:-1]], device=device), use_cache=False)
        target = torch.tensor(read[1:], device=device)
        return torch.cat(
            [
                part.float().log_softmax(-1).gather(-1, t[:, None])[:, 0]
                for part, t in zip(logits[0].split(64), target.split(64), strict=True)
            ]
        ).cpu()
