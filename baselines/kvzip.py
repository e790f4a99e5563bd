"""KVzip: tokens are ranked by the largest attention that they get while the model repeats the context.

Paper: Kim et al., 2025 (arXiv 2505.23416): the context is followed by itself, and a token's score is the largest attention
that any query of the repetition, in any head of the group, pays to it: `S = max softmax(Q K^T)`. The best tokens of the
whole model are retained, so that layers and heads have different numbers of them. Long contexts are repeated in chunks; the
softmax is then over the context's first tokens, the chunk and the repetition. Deviations: no instruction ("repeat the
previous context") is put before the repetition, because a cache of tokens knows no words; the context is read anew for each
chunk. If the schedule continues step by step, tokens after the prompt are retained, and its worst tokens are evicted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from a2sf.policies.base import Policy, Retention, check_tokens
from a2sf.policies.prepared import LayerRead, Numbers, Prepared, Reader
from a2sf.policies.rule import Cut, Rule, Step

QUERIES = 256
"""Queries whose attention is computed at a time."""


@dataclass(frozen=True, kw_only=True)
class KVzip(Policy):
    """Attention while the context is repeated; the prompt is read two or more times.

    Attributes:
        chunk: number of tokens that are repeated at a time (the paper uses 2048).
        sinks: how many of the first tokens are never evicted.
    """

    name: ClassVar[str] = "kvzip"
    label: ClassVar[str] = "KVzip"
    schedules: ClassVar[tuple[str, ...]] = ("prompt",)

    chunk: int = 2048
    sinks: int = 4

    def __post_init__(self) -> None:
        check_tokens("policy.chunk", self.chunk, least=1)
        check_tokens("policy.sinks", self.sinks)

    @property
    def min_budget(self) -> int:
        return max(1, self.sinks)

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, sinks=min(self.sinks, budget), rule=Rule(scored=False, cut=Cut(floor=0.0)))

    def prepare(self, model: Reader, tokens: list[int]) -> Prepared:
        n = len(tokens)
        scores: list[list[Tensor]] = [[] for _ in range(model.layers)]
        for start in range(0, n, self.chunk):
            end = min(start + self.chunk, n)
            seen = [*range(min(self.sinks, start)), *range(start, end), *range(n, n + end - start)]

            def most(read: LayerRead, seen: list[int] = seen, size: int = end - start) -> Tensor:
                """[K, chunk]: of each of the chunk's tokens, the most that the repetition pays to it."""
                at = torch.tensor(seen, device=read.key.device)
                part = replace(read, query=read.query[:, :, at], key=read.key[:, at], value=read.value[:, at])
                first, found = len(at) - size, torch.zeros_like(part.key[:, :size, 0])
                for begin in range(first, len(at), QUERIES):
                    paid = part.attention(begin, min(begin + QUERIES, len(at)))[..., first - size : first]
                    found = found.maximum(paid.amax((1, 2)))
                return found

            for layer, found in enumerate(model.read([*tokens, *tokens[start:end]], most)):
                scores[layer].append(found)
        return Prepared(tuple(Numbers(torch.cat(s, 1)) for s in scores), by_numbers=True, least=self.min_budget)

    def priorities(self, step: Step) -> Tensor:
        assert step.prepared is not None, "no numbers were prepared for the prompt"
        assert step.prompt is not None
        return step.prepared.masked_fill(step.positions >= step.prompt, torch.inf)
