"""How much a policy, in all layers together, changes a model's log-likelihoods of held-out text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from a2sf.hf.attention import Plan, attached, running
from a2sf.hf.calls.logits import logits_at
from a2sf.hf.layer_check import unpruned
from a2sf.hf.settings import retention_of
from a2sf.policies.base import Policy, Retention
from a2sf.policies.budget import Budget


class HeldOut:
    """Passages, and their log-likelihoods with the full cache (computed once, at first use).

    Args:
        model: a transformers model that can be pruned exactly.
        passages: token ids of each; the first token of a passage is not predicted.
    """

    def __init__(self, model: PreTrainedModel, passages: Sequence[Sequence[int]]) -> None:
        self.model, self.passages = model, passages
        self.full: list[Tensor | None] = [None] * len(passages)
        self._unpruned = unpruned(model)

    def change(self, policy: Policy, ratios: Sequence[float], which: int, only: int | None = None) -> float:
        """The sum of |Δ log-likelihood| over the tokens of a passage, mean over budgets.

        Args:
            policy: runs under the step schedule.
            ratios: budgets, as shares of the passage's tokens.
            which: index of the passage.
            only: index of the only layer that is pruned; None: all layers are pruned.
        """
        tokens = len(self.passages[which]) - 1  # the last token is only predicted
        if (full := self.full[which]) is None:
            full = self.full[which] = self._scores(which, self._unpruned)
        changes = []
        for ratio in ratios:
            retention = retention_of(policy, Budget(ratio=ratio), tokens, tokens, len(self._unpruned))
            if only is not None:
                retention = (*self._unpruned[:only], retention[only], *self._unpruned[only + 1 :])
            changes.append(float((self._scores(which, retention) - full).abs().double().sum()))
        return sum(changes) / len(changes)

    @property
    def tokens(self) -> int:
        """Number of predicted tokens in all passages."""
        return sum(len(p) - 1 for p in self.passages)

    def _scores(self, which: int, retention: Sequence[Retention]) -> Tensor:
        """Log-likelihoods of all tokens of a passage except the first, float32 [T - 1]."""
        read, device = list(self.passages[which]), self.model.device
        n = len(read) - 1
        plan = Plan.of_rows([n], [0], lambda row, layer: retention[layer], len(retention))
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
