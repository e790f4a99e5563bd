"""`CachePass`: one call of a model through a `PrunedCache`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from a2sf.engine.state import Options
from a2sf.hf.attention.errors import check_finite
from a2sf.hf.cache.attention_cache import NewTokens

if TYPE_CHECKING:
    from a2sf.hf.cache.layer import PrunedLayer
    from a2sf.hf.cache.pruned import PrunedCache


@dataclass
class CachePass:
    """One call of a model through a `PrunedCache`: an `a2sf.hf.attention.Pass`."""

    cache: PrunedCache
    new: NewTokens
    layers: int
    attentions: Counter[int] = field(default_factory=Counter)

    @property
    def reached(self) -> set[int]:
        """The layers that have called their attention."""
        return set(self.attentions)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options, window: int | None
    ) -> Tensor:
        """Insert, attend, score and evict in one layer, [B, H, T, V]."""
        if (order := self.new.order) is not None:
            query, key, value = (_in_order(x, order) for x in (query, key, value))
        tokens = (range(len(self.new.start)), self.new.start.tolist(), self.new.length.tolist())
        if self.new.columns > 1:
            check_finite(layer, tokens, query=query, key=key, value=value)
        cache_layer: PrunedLayer = self.cache.layers[layer]
        if not cache_layer.is_initialized:
            cache_layer.retention, cache_layer.window = self.cache.batch_retention(layer, window), window
        elif window is not None:
            self.cache.rows(layer, window)  # refuses a sequence that has outgrown the window
        call = self.attentions[layer]
        output = self.read(layer, query, key, value, options, call)
        if self.new.columns == 1:
            # NaN and infinity end up in the output, but not those of a key that only gets no attention
            check_finite(layer, tokens, key=key, output=output)
        self.attentions[layer] += 1
        return output if order is None else _in_order(output, order.argsort(1))

    def begin(self) -> None:
        """Begin the call."""

    def read(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options, call: int) -> Tensor:
        """Let a layer read the call's tokens, [B, H, T, V]; `call` as for `PrunedLayer.attend`."""
        cache_layer: PrunedLayer = self.cache.layers[layer]
        return cache_layer.attend(query, key, value, self.new, options, self.cache.more, call)

    def finish(self, completed: bool) -> None:
        """End the call, which all layers have read if it is `completed`."""


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """`x` [B, heads, T, D] with the columns of each row in an order [B, T]."""
    index = order.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)
