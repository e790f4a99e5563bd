"""ChunkKV: tokens are retained or evicted as whole chunks, by the mean priority that another policy gives to their tokens.

Paper: Liu et al., 2025 (arXiv 2502.00299): the prompt is divided into chunks of consecutive tokens; a chunk's score is
that of its tokens together, by the attention of the prompt's last queries, and the best chunks are retained.
Deviations: the score may be any policy's (as in kvpress), SnapKV's by default; all KV heads of a layer retain the same
chunks (as in kvpress), unless `by` divides slots among heads; the budget is exact, so that the last chunk that fits in
part only retains its newest tokens; a chunk is a piece of the sequence, also when some of its tokens have been evicted;
layers do not reuse the choice of other layers (a saving of time in the paper).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from a2sf.policies.base import Retention, check_tokens
from a2sf.policies.ranking import Ranking, chunk_sums
from a2sf.policies.rule import Step
from baselines.by import By


@dataclass(frozen=True)
class ByChunk:
    """The mean priority of each token's chunk."""

    ranking: Ranking
    chunk: int

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        priority, memory = self.ranking(step)
        sums, count = (
            chunk_sums(x.where(step.cached, 0), step.positions, self.chunk)
            for x in (priority, step.cached.to(priority))
        )
        return sums / count.clamp(min=1), memory


@dataclass(frozen=True, kw_only=True)
class ChunkKV(By):
    """Whole chunks, by another policy's priorities.

    Attributes:
        by: the other policy: its name, or a mapping of its `name` and settings.
        chunk: number of tokens of a chunk.
    """

    name: ClassVar[str] = "chunkkv"
    label: ClassVar[str] = "ChunkKV"
    schedules: ClassVar[tuple[str, ...]] = ("prompt",)  # of the default `by`

    chunk: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens("policy.chunk", self.chunk, least=1)

    def changed(self, ranking: Ranking) -> ByChunk:
        return ByChunk(ranking, self.chunk)

    def retention(self, budget: int, layer: int) -> Retention:
        stated = super().retention(budget, layer)
        cut = stated.rule.cut
        return replace(stated, rule=replace(stated.rule, shared=cut is None or cut.floor is None))
