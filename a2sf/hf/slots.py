"""One layer of a bounded cache: rows of several lengths and budgets, read in one go, in chunks, or token by token.

On the CPU a layer's cache is memory allocated once (`kernels.cpu.SlotCache`); elsewhere, and in float64, it is the state
that `a2sf.engine.kernels.attend` hands on. Shapes as in `a2sf.engine.eviction`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from a2sf.engine.eviction import EvictionState, Options, Segments
from a2sf.engine.kernels import attend, knows
from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.rule import ACCUMULATED

GROWTH = 256
"""Slots to spare, at least, where no budget and no length bounds a cache."""
PER_HEAD = ("positions", "scores", "keys", "values")
"""What an `EvictionState` holds of every KV head."""


@dataclass(frozen=True)
class Step:
    """The new tokens of one call, int64 [B] each.

    Attributes:
        start, length: row `b` has tokens in the columns `[start, start + length)`; the others are padding.
        before, after: tokens of the row read before and after this call.
        columns: T, tokens of the call with padding.
    """

    start: Tensor
    length: Tensor
    before: Tensor
    after: Tensor
    columns: int


class Kept:
    """What is kept of each row, as the engine and the compiled cache take it."""

    def __init__(self, rows: list[Retention]) -> None:
        self.rows = rows
        self.budget, self.recent, self.sinks = (
            torch.tensor([getattr(r, name) for r in rows]) for name in ("budget", "recent", "sinks")
        )
        rules = {r.rule for r in rows}
        assert len(rules) <= 1, "the rows of a batch follow one policy"
        self.ranked = rules.pop() if rules else ACCUMULATED
        self.factor = torch.tensor([r.forgetting_factor for r in rows], dtype=torch.float64)
        # as the compiled cache takes them, made once instead of at every token
        numbers = (x.numpy() for x in (self.budget, self.recent, self.sinks, self.factor))
        self.numbers = dict(zip(("budget", "recent", "sinks", "forgetting_factor"), numbers, strict=True))


class Slots:
    """What is cached for one attention of a layer.

    Args:
        positions, backend, trace: as for `PrunedLayer`.
    """

    def __init__(self, positions: int, backend: str, trace: bool) -> None:
        self.positions, self.backend, self.trace = positions, backend, trace
        self.started = False
        self.heads = 0  # KV heads
        self._store: Any = None  # SlotCache or EvictionState
        self._slots = 0
        self._factor = torch.empty(0)
        self._evicted: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        if isinstance(self._store, EvictionState):
            return sum(x.nbytes for f in fields(EvictionState) if (x := getattr(self._store, f.name)) is not None)
        return self._store.nbytes if self._store is not None else 0

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, step: Step, kept: Kept, scale: float, limit: int | None
    ) -> Tensor:
        """Insert, attend, score and evict the call's tokens, [B, H, T, V]; `limit` as for `PrunedLayer.attend`."""
        self.heads = key.shape[1]
        self._factor = kept.factor
        on_cpu = query.device.type == "cpu" and query.dtype != torch.float64 and self.backend in ("auto", "numba")
        compiled = on_cpu and knows(kept.ranked)
        if compiled:
            self._make_room(query, key, value, step, kept, limit)
            if step.columns == 1 and not self.trace:
                self.started = True
                return self._store.attend(query, key, value, scale=scale, lengths=step.length.numpy(), **kept.numbers)
        segments = Segments(
            row=torch.arange(len(step.start)),
            start=step.start,
            length=step.length,
            parent=torch.full_like(step.start, -1),
            budget=kept.budget,
            recent=kept.recent,
            sinks=kept.sinks,
            forgetting_factor=kept.factor,
            rule=kept.ranked,
        )
        before = self.state() if self.started else None
        options = Options(scale, return_state=True, trace=self.trace)
        attended = attend(query, key, value, segments, options, before, backend=self.backend)
        self.started = True
        if compiled:
            self._store.load(attended.state, kept.factor)
        else:
            self._store = attended.state
        if attended.evicted is not None:
            self._evicted.append(attended.evicted.cpu())
        return attended.output

    def state(self) -> EvictionState:
        """What is cached, in canonical form."""
        return self._store if isinstance(self._store, EvictionState) else self._store.state()

    def load(self, state: EvictionState) -> None:
        """Go on from a state of as many rows, instead of what is cached."""
        if isinstance(self._store, EvictionState):
            self._store = state
        else:
            self._store.load(state, self._factor)

    def evicted(self) -> Tensor:
        """int32 [B, K, columns], the position evicted at each column's step, -1 for none."""
        return torch.cat(self._evicted, dim=-1)

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [B'] on the CPU, in that order."""
        self._evicted = [x[rows] for x in self._evicted]
        if isinstance(self._store, EvictionState):
            self._store = self._store.select(rows)
        else:
            self._store.reorder(rows)

    def _make_room(self, query: Tensor, key: Tensor, value: Tensor, step: Step, kept: Kept, limit: int | None) -> None:
        """Allocate the slots at the first call; later only where neither the budget nor `limit` bounds them."""
        from a2sf.engine.kernels.cpu import SlotCache  # numba takes a second to load

        need, most = int(torch.minimum(kept.budget, step.after).max()), int(kept.budget.max())
        if self._store is not None and need <= self._slots:
            return
        if limit:
            self._slots = min(most, max(need, limit))
        elif most < UNLIMITED and self._store is None:
            self._slots = min(most, self.positions)
        else:
            self._slots = min(most, need + max(GROWTH, need // 2))
        B, H, _, D = query.shape
        K = key.shape[1]
        grown = SlotCache(B, K, H // K, self._slots, D, value.shape[-1], kept.ranked)
        if self._store is not None:
            grown.load(self._store.state(), kept.factor)
        self._store = grown


class PrunedLayer(CacheLayerMixin):
    """The cache of one layer; `PrunedCache` states its `rule` before the first call.

    A layer that calls its attention several times in a pass (DiffLlama: the same keys with two halves of the values)
    has as many `Slots`, and `state` and `evicted` show the KV heads of all of them, in the order of the calls.

    Args:
        positions: the longest sequence that the model can read.
        backend: as for `a2sf.engine.kernels.attend`.
        trace: keep note of what every step evicts.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, positions: int, backend: str, trace: bool) -> None:
        super().__init__()
        self.positions, self.backend, self.trace = positions, backend, trace
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self._kept = Kept([])
        self._slots: list[Slots] = []

    @property
    def rule(self) -> list[Retention]:
        """What is kept of each row."""
        return self._kept.rows

    @rule.setter
    def rule(self, rule: list[Retention]) -> None:
        self._kept = Kept(rule)

    @property
    def budget(self) -> Tensor:
        """int64 [B], of each row."""
        return self._kept.budget

    @property
    def attentions(self) -> int:
        """How many times the layer calls its attention in a pass; 0 before the first."""
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self._slots)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, step: Step, scale: float, limit: int | None, which: int = 0
    ) -> Tensor:
        """Insert, attend, score and evict the call's tokens, [B, H, T, V].

        Args:
            limit: the longest any row will get, where that is known; bounds the memory of an unlimited budget.
            which: how many times the layer called its attention before in this pass.
        """
        if which == len(self._slots):
            self._slots.append(Slots(self.positions, self.backend, self.trace))
        output = self._slots[which].attend(query, key, value, step, self._kept, scale, limit)
        self.is_initialized = True
        return output

    def state(self) -> EvictionState:
        """What is cached, in canonical form."""
        states = [s.state() for s in self._slots]
        if len(states) == 1:
            return states[0]
        slots = max(s.positions.shape[-1] for s in states)
        padded = [s.pad(slots) for s in states]
        joined = {n: torch.cat([getattr(s, n) for s in padded], 1) for n in PER_HEAD}
        return EvictionState(seen=states[0].seen, **joined)

    def load(self, state: EvictionState) -> None:
        """Go on from a state of as many rows, instead of what is cached."""
        heads = [s.heads for s in self._slots]
        parts = {n: getattr(state, n).split(heads, dim=1) for n in PER_HEAD}
        for i, slots in enumerate(self._slots):
            slots.load(EvictionState(seen=state.seen, **{n: part[i] for n, part in parts.items()}))

    def evicted(self) -> Tensor:
        """int32 [B, K, columns], the position evicted at each column's step, -1 for none."""
        return torch.cat([s.evicted() for s in self._slots], dim=1)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` [B'] on the CPU, in that order."""
        if not self.is_initialized:
            return
        self.rule = [self.rule[i] for i in indices.tolist()]
        for slots in self._slots:
            slots.select(indices)

    # what transformers asks of a layer; `PrunedCache` answers for all of them
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("tokens enter a pruned layer through its attention")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError

    def get_seq_length(self) -> int:
        raise NotImplementedError

    def get_max_length(self) -> int:
        return -1
