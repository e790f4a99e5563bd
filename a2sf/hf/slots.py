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


class PrunedLayer(CacheLayerMixin):
    """The cache of one layer; `PrunedCache` states its `rule` before the first call.

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
        self._rule: list[Retention] = []
        self._store: Any = None  # SlotCache or EvictionState
        self._slots = 0
        self._evicted: list[Tensor] = []

    @property
    def rule(self) -> list[Retention]:
        """What is kept of each row."""
        return self._rule

    @rule.setter
    def rule(self, rule: list[Retention]) -> None:
        self._rule = rule
        self.budget, self.recent, self.sinks = (
            torch.tensor([getattr(r, name) for r in rule]) for name in ("budget", "recent", "sinks")
        )
        rules = {r.rule for r in rule}
        assert len(rules) <= 1, "the rows of a batch follow one policy"
        self._ranked = rules.pop() if rules else ACCUMULATED
        self.factor = torch.tensor([r.forgetting_factor for r in rule], dtype=torch.float64)
        # as the compiled cache takes them, made once instead of at every token
        numbers = (x.numpy() for x in (self.budget, self.recent, self.sinks, self.factor))
        self._numbers = dict(zip(("budget", "recent", "sinks", "forgetting_factor"), numbers, strict=True))

    @property
    def nbytes(self) -> int:
        if isinstance(self._store, EvictionState):
            return sum(x.nbytes for f in fields(EvictionState) if (x := getattr(self._store, f.name)) is not None)
        return self._store.nbytes if self._store is not None else 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, step: Step, scale: float, limit: int | None) -> Tensor:
        """Insert, attend, score and evict the call's tokens, [B, H, T, V].

        Args:
            limit: the longest any row will get, where that is known; bounds the memory of an unlimited budget.
        """
        on_cpu = query.device.type == "cpu" and query.dtype != torch.float64 and self.backend in ("auto", "numba")
        compiled = on_cpu and knows(self._ranked)
        if compiled:
            self._make_room(query, key, value, step, limit)
            if step.columns == 1 and not self.trace:
                self.is_initialized = True
                return self._store.attend(query, key, value, scale=scale, lengths=step.length.numpy(), **self._numbers)
        segments = Segments(
            row=torch.arange(len(step.start)),
            start=step.start,
            length=step.length,
            parent=torch.full_like(step.start, -1),
            budget=self.budget,
            recent=self.recent,
            sinks=self.sinks,
            forgetting_factor=self.factor,
            rule=self._ranked,
        )
        before = self.state() if self.is_initialized else None
        options = Options(scale, return_state=True, trace=self.trace)
        attended = attend(query, key, value, segments, options, before, backend=self.backend)
        if compiled:
            self._store.load(attended.state, self.factor)
        else:
            self._store = attended.state
        if attended.evicted is not None:
            self._evicted.append(attended.evicted.cpu())
        self.is_initialized = True
        return attended.output

    def state(self) -> EvictionState:
        """What is cached, in canonical form."""
        return self._store if isinstance(self._store, EvictionState) else self._store.state()

    def load(self, state: EvictionState) -> None:
        """Go on from a state of as many rows, instead of what is cached."""
        if isinstance(self._store, EvictionState):
            self._store = state
        else:
            self._store.load(state, self.factor)

    def evicted(self) -> Tensor:
        """int32 [B, K, columns], the position evicted at each column's step, -1 for none."""
        return torch.cat(self._evicted, dim=-1)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` [B'] on the CPU, in that order."""
        if self._store is None:
            return
        self.rule = [self._rule[i] for i in indices.tolist()]
        self._evicted = [x[indices] for x in self._evicted]
        if isinstance(self._store, EvictionState):
            self._store = self._store.select(indices)
        else:
            self._store.reorder(indices)

    def _make_room(self, query: Tensor, key: Tensor, value: Tensor, step: Step, limit: int | None) -> None:
        """Allocate the slots at the first call; later only where neither the budget nor `limit` bounds them."""
        from a2sf.engine.kernels.cpu import SlotCache  # numba takes a second to load

        need, most = int(torch.minimum(self.budget, step.after).max()), int(self.budget.max())
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
        grown = SlotCache(B, K, H // K, self._slots, D, value.shape[-1], self._ranked)
        if self._store is not None:
            grown.load(self._store.state(), self.factor)
        self._store = grown

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
