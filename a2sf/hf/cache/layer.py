"""The cache of one layer, as transformers has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import EvictionState
from a2sf.hf.cache.store import How, NewTokens, Slots


class PrunedLayer(CacheLayerMixin):
    """The cache of one layer; `PrunedCache` sets its `retention` before the first call.

    A layer that calls its attention several times in a pass (DiffLlama: the same keys with two halves of the values)
    has as many `Slots`; `state` and `evicted` have the KV heads of all of them, in the order of the calls.

    Args:
        how: how its attention is computed.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, how: How) -> None:
        super().__init__()
        self.how = how
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.retention = BatchRetention.of([])
        self.window: int | None = None  # a sliding window of the layer's own
        self._slots: list[Slots] = []

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self._slots)

    @property
    def cached_nbytes(self) -> int:
        return sum(s.cached_nbytes for s in self._slots)

    @property
    def shape(self) -> dict[str, Any]:
        """What `restore` needs: the KV heads of each attention, the query heads of each of those, the layer's window."""
        heads, group = ([getattr(s, name) for s in self._slots] for name in ("heads", "group"))
        return {"heads": heads, "group": group, "window": self.window}

    def restore(self, retention: BatchRetention, shape: Mapping[str, Any], state: EvictionState) -> None:
        """Continue from a state in an empty layer with the attentions of `shape`."""
        self.retention, self.window, self._slots = retention, shape["window"], []
        for heads, group in zip(shape["heads"], shape["group"], strict=True):
            slots = Slots(retention, self.how)
            slots.heads, slots.group = heads, group
            self._slots.append(slots)
        self.check(state)
        self.load(state)
        self.is_initialized = True

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, new: NewTokens, scale: float, more: int | None, which: int = 0
    ) -> Tensor:
        """Insert, attend, score and evict the call's tokens, [B, H, T, V].

        Args:
            more: how many tokens may follow, if that is known; it bounds the memory where nothing is evicted.
            which: how many times the layer called its attention before in this pass.
        """
        if which == len(self._slots):
            self._slots.append(Slots(self.retention, self.how))
        output = self._slots[which].attend(query, key, value, new, scale, more)
        self.is_initialized = True
        return output

    def state(self) -> EvictionState:
        """What is cached, in canonical form."""
        return EvictionState.join_heads([s.state() for s in self._slots])

    def check(self, state: EvictionState) -> None:
        """Refuse a state that this layer could not hold.

        Raises:
            UserError: if it holds more than the budget, or was made by another policy.
        """
        for slots, part in zip(self._slots, self._parts(state), strict=True):
            slots.check(part)

    def load(self, state: EvictionState) -> None:
        """Continue from a state with as many rows, instead of what is cached."""
        for slots, part in zip(self._slots, self._parts(state), strict=True):
            slots.load(part)

    def evicted(self) -> Tensor:
        """int32 [B, K, columns], the position evicted at each column's step, -1 for none or several."""
        return torch.cat([s.evicted() for s in self._slots], dim=1)

    def cuts(self) -> Tensor:
        """int64 [n, 4], the evictions of the steps that evicted several: row, head, column, position."""
        parts, first = [], 0
        for slots in self._slots:
            parts.append(slots.cuts() + torch.tensor([0, first, 0, 0]))
            first += slots.heads
        return torch.cat(parts)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` [B'] on the CPU, in that order."""
        if not self.is_initialized:
            return
        self.retention = self.retention.select(indices)
        for slots in self._slots:
            slots.select(indices)

    def _parts(self, state: EvictionState) -> list[EvictionState]:
        """The heads of each of the layer's attentions."""
        return [state.heads(h) for h in torch.arange(state.positions.shape[1]).split([s.heads for s in self._slots])]

    # what transformers calls of a layer; `PrunedCache` answers for all layers
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("tokens enter a pruned layer through its attention")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError

    def get_seq_length(self) -> int:
        raise NotImplementedError

    def get_max_length(self) -> int:
        return -1
