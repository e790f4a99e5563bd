"""Rows that come and go: several pruned caches that are read on together, one token of each row in a call.

A cache's rows follow one rule and schedule. New rows are joined to a cache with the states in which their prompts were read;
rows that are finished get no more tokens, and are left out when others join.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from a2sf.engine.state import EvictionState, Options
from a2sf.hf.attention.errors import NonFiniteError
from a2sf.hf.cache.attention_cache import NewTokens
from a2sf.hf.cache.cache_pass import CachePass
from a2sf.hf.cache.checks import check_length
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.warned import Warned, caused_by
from a2sf.policies.base import Retention


@dataclass(frozen=True)
class ReadRow:
    """A sequence that has been read, and continues in a cache.

    Attributes:
        seen: tokens read.
        prompt: tokens before the cut of the prompt schedule.
        retention: what each layer retains.
        states: of each layer, one row.
        shapes: of each layer, as `PrunedLayer.shape`.
    """

    seen: int
    prompt: int
    retention: tuple[Retention, ...]
    states: Sequence[EvictionState]
    shapes: Sequence[dict[str, Any]]


def replace_rows(cache: PrunedCache, stay: Sequence[int], new: Sequence[ReadRow]) -> None:
    """Keep the rows `stay` of a cache, in that order, and append `new` ones; without any the cache is reset."""
    if not new and not stay:
        cache.reset()
        return
    if not new:
        cache.batch_select_indices(torch.tensor(stay))
        return
    shapes = new[0].shapes
    seen = torch.tensor([r.seen for r in new])
    cache.seen = seen if cache.seen is None else torch.cat([cache.seen[list(stay)], seen])
    cache.retention = [*(cache.retention[i] for i in stay), *(r.retention for r in new)]
    cache.prompt = [*(cache.prompt[i] for i in stay), *(r.prompt for r in new)]
    cache.columns, cache.calls = int(cache.seen.max()), cache.calls + 1
    cache.attentions = [len(s["heads"]) for s in shapes]
    for i, (layer, shape) in enumerate(zip(cache.layers, shapes, strict=True)):
        rows = [r.states[i] for r in new]
        if stay:
            rows = [layer.state().select(torch.tensor(stay)), *rows]
        layer.reset()  # first, so that less memory is in use
        layer.restore(cache.batch_retention(i, shape["window"]), shape, EvictionState.stack(rows))


def begin_token(cache: PrunedCache, live: Tensor) -> CachePass:
    """Start a call that reads one token of each row that is True in `live` [B]; `cache.end` is to follow.

    Raises:
        UserError: if a row gets too long for the model.
    """
    assert cache.seen is not None
    length = live.long()
    after = cache.seen + length
    check_length(cache, after, cache.seen, prompt=False)
    cache._pass = CachePass(cache, NewTokens(torch.zeros_like(length), length, cache.seen, after, 1), len(cache.layers))
    return cache._pass


class JointPass:
    """One call that reads a token of each live row of several caches: an `a2sf.hf.attention.Pass`.

    The model's batch has the live rows of the first cache, then those of the next.

    Args:
        caches: each with which of its rows are live, bool [B]; at least one row of each is.

    Attributes:
        warned: what libraries warn of in the attention of each cache.
    """

    def __init__(self, caches: Sequence[tuple[PrunedCache, Tensor]]) -> None:
        self.caches = caches
        self.warned = [Warned() for _ in caches]
        self.passes = [begin_token(cache, live) for cache, live in caches]
        self.places = [None if bool(live.all()) else live.nonzero()[:, 0] for _, live in caches]
        self.sizes = [int(live.sum()) for _, live in caches]
        self.layers = self.passes[0].layers

    @property
    def reached(self) -> set[int]:
        """The layers that have called their attention."""
        return self.passes[0].reached

    def end(self, completed: bool) -> None:
        """Finish the call of every cache."""
        for cache, _ in self.caches:
            cache.end(completed)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options, window: int | None
    ) -> Tensor:
        """Insert, attend, score and evict in one layer, [R, H, 1, V] of R rows."""
        outputs = []
        first = 0
        of_caches = zip(self.caches, self.passes, self.places, self.sizes, self.warned, strict=True)
        for (_, live), one, place, size, warned in of_caches:
            q, k, v = (_spread(x[first : first + size], len(live), place) for x in (query, key, value))
            try:
                with caused_by(warned):
                    output = one.attend(layer, q, k, v, options, window)
            except NonFiniteError as error:  # whose rows are the cache's
                row = {int(r): i for i, r in enumerate(live.nonzero()[:, 0])}
                bad = sorted(first + row[r] for r in error.rows if r in row)
                raise NonFiniteError(error.where, error.dtype, bad) from error
            outputs.append(output if place is None else output[place.to(output.device)])
            first += size
        return torch.cat(outputs)


def _spread(x: Tensor, rows: int, place: Tensor | None) -> Tensor:
    """[rows, ...]: the rows of `x` at `place`, int64 [R], and 0 elsewhere; None: `x` has all rows."""
    if place is None:
        return x
    return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, place.to(x.device), x)
