"""The cache of one layer, as transformers has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import EvictionState, Options
from a2sf.hf.cache.attention_cache import AttentionCache, LayerSettings, NewTokens


class PrunedLayer(CacheLayerMixin):
    """The cache of one layer; `PrunedCache` sets its `retention` before the first call.

    A layer that calls its attention several times in a pass (DiffLlama: the same keys with two halves of the values)
    has as many `AttentionCache`; `state` and `evicted` have the KV heads of all of them, in the order of the calls.

    Args:
        settings: how its attention is computed.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, settings: LayerSettings) -> None:
        super().__init__()
        self.settings = settings
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.retention = BatchRetention.of([])
        self.window: int | None = None  # a sliding window of the layer's own
        self._attentions: list[AttentionCache] = []

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self._attentions)

    @property
    def cached_nbytes(self) -> int:
        return sum(s.cached_nbytes for s in self._attentions)

    @property
    def shape(self) -> dict[str, Any]:
        """What `restore` needs: the KV heads of each attention, the query heads of each of those, the layer's window."""
        heads, group = ([getattr(s, name) for s in self._attentions] for name in ("heads", "group"))
        return {"heads": heads, "group": group, "window": self.window}

    def restore(self, retention: BatchRetention, shape: Mapping[str, Any], state: EvictionState) -> None:
        """Continue from a state in an empty layer with the attentions of `shape`."""
        self.retention, self.window, self._attentions = retention, shape["window"], []
        for heads, group in zip(shape["heads"], shape["group"], strict=True):
            attention = AttentionCache(retention, self.settings)
            attention.heads, attention.group = heads, group
            self._attentions.append(attention)
        self.check(state)
        self.load(state)
        self.is_initialized = True

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        new: NewTokens,
        options: Options,
        to_come: int | None,
        call: int = 0,
    ) -> Tensor:
        """Insert, attend, score and evict the call's tokens, [B, H, T, V].

        Args:
            options: as in `Pass.attend`.
            to_come: how many tokens may follow; None: not known. It bounds the memory where nothing is evicted.
            call: how many times the layer called its attention before in this pass.
        """
        if call == len(self._attentions):
            self._attentions.append(AttentionCache(self.retention, self.settings))
        output = self._attentions[call].attend(query, key, value, new, options, to_come)
        self.is_initialized = True
        return output

    def state(self) -> EvictionState:
        """What is cached, in canonical form."""
        return EvictionState.join_heads([s.state() for s in self._attentions])

    def check(self, state: EvictionState) -> None:
        """Refuse a state that this layer could not hold.

        Raises:
            UserError: if it holds more than the budget, or was made by another policy.
        """
        for attention, part in zip(self._attentions, self._parts(state), strict=True):
            attention.check(part)

    def load(self, state: EvictionState) -> None:
        """Continue from a state with as many rows, instead of what is cached."""
        for attention, part in zip(self._attentions, self._parts(state), strict=True):
            attention.load(part)

    def evicted(self) -> Tensor:
        """int32 [B, K, columns], the position evicted at each column's step, -1 for none or several."""
        return torch.cat([s.evicted() for s in self._attentions], dim=1)

    def cuts(self) -> Tensor:
        """int64 [n, 4], the evictions of the steps that evicted several: row, head, column, position."""
        parts, first = [], 0
        for attention in self._attentions:
            parts.append(attention.cuts() + torch.tensor([0, first, 0, 0]))
            first += attention.heads
        return torch.cat(parts)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` [B'] on the CPU, in that order."""
        if not self.is_initialized:
            return
        self.retention = self.retention.select(indices)
        for attention in self._attentions:
            attention.select(indices)

    def _parts(self, state: EvictionState) -> list[EvictionState]:
        """The heads of each of the layer's attentions."""
        return [
            state.heads(h) for h in torch.arange(state.positions.shape[1]).split([s.heads for s in self._attentions])
        ]

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
