"""What the engine takes and gives: segments of tokens, the state after a step, and the result.

Shapes, as suffixes or in brackets: B rows, H query heads, K key/value heads, T tokens, D key dimension, V value dimension,
S segments, N cached slots, M numbers that a rule keeps per token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from a2sf.policies.rule import ACCUMULATED, Rule
from a2sf.policies.schedule import STEP, Schedule


@dataclass(frozen=True)
class Segments:
    """Runs of tokens to attend, packed along the time axis; a run may continue the state another run ended with.

    A batch of rows is one segment per row without parents. Sequences that begin alike are a tree: the shared beginning
    is one segment, its continuations are children, and each child starts from a copy of its parent's state. A parent
    and a child may differ in budget, recent and sinks only if the parent has not evicted yet (invariant 6), and in prompt
    only if the parent ends within both; where the rule looks at the end of a prompt, before either looks.

    Attributes (int64 tensors [S] on the CPU):
        row, start, length: the tokens `[row, start : start + length]` of the packed query, key and value.
        parent: index of the segment that this one continues, -1 for none. Parents come before their children.
        budget, recent, sinks: `C`, `r`, `s` of the recursion.
        forgetting_factor: float64 tensor [S].
        rule: how tokens are ranked, the same for all segments of a call.
        schedule: when they are evicted.
        prompt: int64 [S], tokens of the prompt of the sequence through each segment; for the prompt schedule alone.
    """

    row: Tensor
    start: Tensor
    length: Tensor
    parent: Tensor
    budget: Tensor
    recent: Tensor
    sinks: Tensor
    forgetting_factor: Tensor
    rule: Rule = ACCUMULATED
    schedule: Schedule = STEP
    prompt: Tensor | None = None

    @property
    def count(self) -> int:
        return self.row.shape[0]


@dataclass(frozen=True)
class EvictionState:
    """What is cached after a step, for every row and KV head.

    Attributes:
        positions: int64 [B, K, N], kept positions in ascending order, -1 where a slot is empty (empty slots come last).
        scores: [B, K, N], accumulated attention scores `A`, 0 where a slot is empty.
        keys: [B, K, N, D] and
        values: [B, K, N, V], finite (0, in states made here) where a slot is empty; all three in the engine's accumulation
            dtype (float32, or float64 for float64 inputs).
        seen: int64 [B], tokens read so far, which is the next token's position.
        memory: [B, K, N, M], what a policy of its own rule keeps per token; None where the rule keeps nothing.
    """

    positions: Tensor
    scores: Tensor
    keys: Tensor
    values: Tensor
    seen: Tensor
    memory: Tensor | None = None

    def select(self, rows: Tensor) -> EvictionState:
        """The state of `rows` [B'], in that order; a row may be taken several times (a fork) or left out."""
        rows = rows.to(self.seen.device)
        return EvictionState(**{name: x[rows] for name, x in self._tensors().items()})

    def pad(self, slots: int) -> EvictionState:
        """The same state with at least `slots` slots per KV head."""
        more = slots - self.positions.shape[-1]
        if more <= 0:
            return self
        widen = torch.nn.functional.pad
        return replace(
            self,
            positions=widen(self.positions, (0, more), value=-1),
            scores=widen(self.scores, (0, more)),
            keys=widen(self.keys, (0, 0, 0, more)),
            values=widen(self.values, (0, 0, 0, more)),
            memory=None if self.memory is None else widen(self.memory, (0, 0, 0, more)),
        )

    def cut(self, slots: int) -> EvictionState:
        """The same state with the first `slots` slots of each KV head, which hold all tokens, and no memory beyond them."""
        cut = {name: x if name == "seen" else x[:, :, :slots].contiguous() for name, x in self._tensors().items()}
        return EvictionState(**cut)

    def heads(self, heads: Tensor) -> EvictionState:
        """The state of some KV heads."""
        return EvictionState(
            **{name: x if name == "seen" else x[:, heads.to(x.device)] for name, x in self._tensors().items()}
        )

    @staticmethod
    def stack(states: list[EvictionState]) -> EvictionState:
        """Rows of several states as one batch."""
        slots = max(s.positions.shape[-1] for s in states)
        padded = [s.pad(slots)._tensors() for s in states]
        return EvictionState(**{name: torch.cat([s[name] for s in padded]) for name in padded[0]})

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}


@dataclass(frozen=True)
class Attended:
    """What attending a batch gives.

    Attributes:
        output: [B, H, T, V] in the query's dtype; 0 where no segment covers a token.
        state: final state, one row per segment; None unless asked for.
        evicted: int32 [B, K, T], the position evicted at each token's step, -1 where none was; None unless asked for.
        cuts: int64 [n, 4], the evictions of the steps that evicted several tokens: row, head, column of the step and
            position; those steps are -1 in `evicted`. None unless asked for.
    """

    output: Tensor
    state: EvictionState | None = None
    evicted: Tensor | None = None
    cuts: Tensor | None = None


@dataclass(frozen=True)
class Options:
    """What to return beside the output, and how to scale the logits."""

    scale: float
    return_state: bool = False
    trace: bool = False


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed in float32 (invariant 8)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
