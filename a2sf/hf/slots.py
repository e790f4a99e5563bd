"""One layer of a bounded cache: rows of several lengths and budgets, read in one go, in chunks, or token by token.

On the CPU what is cached lies in memory allocated once (`kernels.cpu.SlotCache`); elsewhere, in float64, while a prompt is
read that nothing is evicted from, and under rules that the compiled kernel does not know, it is the state that
`a2sf.engine.kernels.attend` hands on. Heads that hold more than others lie in memory of their own.
Shapes as in `a2sf.engine.state`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from a2sf.engine.kernels import attend, knows, note
from a2sf.engine.state import Attended, EvictionState, Options
from a2sf.hf.kept import Kept
from a2sf.policies.base import UNLIMITED

GROWTH = 256
"""Slots to spare, at least, where no budget and no length bounds a cache."""


@dataclass(frozen=True)
class Step:
    """The new tokens of one call, int64 [B] each.

    Attributes:
        start, length: row `b` has tokens in the columns `[start, start + length)`; the others are padding.
        before, after: tokens of the row read before and after this call.
        columns: T, tokens of the call with padding.
        order: int64 [B, T], the columns in the order that `start` and `length` are about, where a row has a gap.
    """

    start: Tensor
    length: Tensor
    before: Tensor
    after: Tensor
    columns: int
    order: Tensor | None = None


@dataclass(frozen=True)
class How:
    """How a layer's attention is computed.

    Attributes:
        positions: the longest sequence that the model can read.
        backend: as for `a2sf.engine.kernels.attend`.
        trace: keep note of what every step evicts.
    """

    positions: int
    backend: str
    trace: bool


class Store:
    """What some KV heads of an attention have cached: all of them, or those that hold about as much.

    Args:
        heads: int64 [K'], which of the attention's KV heads.
        kept: what is kept of them.
        group: query heads of each.
    """

    def __init__(self, heads: Tensor, kept: Kept, how: How, group: int) -> None:
        self.heads, self.kept, self.how, self.group = heads, kept, how, group
        self.queries = (heads[:, None] * group + torch.arange(group)).flatten()  # the query heads that read them
        # one of the two holds what is cached; the memory stays while a state is made of it
        self._memory: Any = None  # SlotCache
        self._state: EvictionState | None = None
        self._slots = self._held = 0  # slots there are, and the most that are taken in any head
        # a policy's own rule has numbers for each token, if only none of them; what goes on where nothing goes has not
        self._remembers = kept.ranked.priority_fn is not None

    @property
    def nbytes(self) -> int:
        memory = self._memory.nbytes if self._memory is not None else 0
        return memory + (0 if self._state is None else _nbytes(self._state))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, step: Step, scale: float) -> Attended:
        """Insert, attend, score and evict the call's tokens; `settle` is to follow."""
        if step.columns == 1 and self._state is None and self._memory is not None and not self.how.trace:
            self._make_room(min(self.kept.most, self._held + 1), key.shape[-1], value.shape[-1], None)
            self._held = min(self.kept.most, self._held + 1)
            lengths = step.length.numpy()
            note("numba")
            return Attended(self._memory.attend(query, key, value, scale=scale, lengths=lengths, **self.kept.numbers))
        before = None if self._state is None and self._memory is None else self.state()
        segments = self.kept.segments(step.start, step.length)
        options = Options(scale, return_state=True, trace=self.how.trace)
        attended = attend(query, key, value, segments, options, before, backend=self.how.backend)
        self._state = attended.state
        return attended

    def settle(self, seen: Tensor, more: int | None) -> None:
        """After a call, put what is cached where the next one goes on.

        Args:
            seen: int64 [B], tokens of each row so far.
            more: how many may come, where that is known.
        """
        state = self._state
        if state is None:
            return
        if self.kept.prompt is not None and self.kept.read(seen):
            self.kept = self.kept.after
        on_cpu = state.keys.device.type == "cpu" and state.keys.dtype != torch.float64
        on_cpu = on_cpu and self.how.backend in ("auto", "numba")
        if not on_cpu or self.kept.prompt is not None or not knows(self.kept.ranked):
            self._memory = None
            return
        self._state = None  # gone before more memory is asked for
        self._held = int((state.positions >= 0).sum(-1).max())
        if self._held > self._slots:
            self._memory = None
        self._make_room(self._held, state.keys.shape[-1], state.values.shape[-1], more)
        self._memory.load(state, self.kept.factor)

    def state(self) -> EvictionState:
        """What is cached, in canonical form."""
        state = self._memory.state() if self._state is None else self._state
        return replace(state, memory=state.keys[..., :0]) if self._remembers and state.memory is None else state

    def load(self, state: EvictionState) -> None:
        """Go on from a state of as many rows; `settle` is to follow."""
        self._state, self._memory, self._slots = state, None, 0

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [B'] on the CPU, in that order."""
        self.kept = self.kept.select(rows.tolist())
        if self._state is not None:
            self._state = self._state.select(rows)
        elif self._memory is not None:
            self._memory.reorder(rows)

    def _make_room(self, need: int, D: int, V: int, more: int | None) -> None:
        """Allocate slots: once where the budget or `more` bounds them, else whenever they are full."""
        if self._memory is not None and need <= self._slots:
            return
        from a2sf.engine.kernels.cpu import SlotCache  # numba takes a second to load

        most = self.kept.most
        if more:
            self._slots = max(need, min(most, need + more))
        elif most < UNLIMITED and self._memory is None:
            self._slots = max(need, min(most, self.how.positions))
        else:
            self._slots = max(need, min(most, need + max(GROWTH, need // 2)))
        kept = self.kept
        grown = SlotCache(
            len(kept.rows), len(self.heads), self.group, self._slots, D, V, kept.ranked, kept.schedule.spare
        )
        if self._memory is not None:
            grown.load(self._memory.state(), kept.factor)
        self._memory = grown


class Slots:
    """What is cached for one attention of a layer, in one `Store` or in several.

    Heads that keep everything are apart from the others, and after a prompt's cut that shifts slots between heads those
    that hold about as many are together, so that no head takes the memory of a larger one.
    """

    def __init__(self, kept: Kept, how: How) -> None:
        self.kept, self.how = kept, how
        self.heads = self.group = 0  # KV heads, and query heads of each
        self._stores: list[Store] = []
        self._back = torch.empty(0)  # where each KV head is among those of all stores
        self._evicted: list[Tensor] = []
        self._cuts: list[Tensor] = []
        self._columns = 0
        self._apart = False  # whether the heads are as the prompt's cut left them

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self._stores)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, step: Step, scale: float, more: int | None) -> Tensor:
        """Insert, attend, score and evict the call's tokens, [B, H, T, V]; `more` as for `PrunedLayer.attend`."""
        if not self._stores:
            self.heads, self.group = key.shape[1], query.shape[1] // key.shape[1]
            self._arrange([torch.arange(self.heads)])
        if len(self._stores) == 1:
            ran = [self._stores[0].attend(query, key, value, step, scale)]
            output = ran[0].output
        else:
            ran = []
            output = query.new_empty(*query.shape[:3], value.shape[-1])
            for store in self._stores:
                ran.append(
                    store.attend(query[:, store.queries], key[:, store.heads], value[:, store.heads], step, scale)
                )
                output[:, store.queries] = ran[-1].output
        if self.how.trace:
            self._note(ran)
        self._columns += step.columns
        self._settle(step.after, more)
        return output

    def state(self) -> EvictionState:
        """What is cached, in canonical form."""
        return joined([s.state() for s in self._stores], self._back)

    def check(self, state: EvictionState) -> None:
        """Raise `UserError` where this could not hold a state."""
        self.kept.check(state)

    def load(self, state: EvictionState) -> None:
        """Go on from a state of as many rows, instead of what is cached."""
        self._arrange([torch.arange(self.heads)])
        for store in self._stores:
            store.load(_only(state, store.heads))
        self._settle(state.seen, None)

    def evicted(self) -> Tensor:
        """int32 [B, K, columns], the position evicted at each column's step, -1 for none or several."""
        return torch.cat(self._evicted, dim=-1)

    def cuts(self) -> Tensor:
        """int64 [n, 4], the evictions of the steps that evicted several: row, head, column, position."""
        return torch.cat(self._cuts)

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [B'] on the CPU, in that order."""
        self._evicted = [x[rows] for x in self._evicted]
        for i, cuts in enumerate(self._cuts):
            new, old = (rows[:, None] == cuts[:, 0]).nonzero(as_tuple=True)
            self._cuts[i] = torch.cat([new[:, None], cuts[old, 1:]], 1)
        self.kept = self.kept.select(rows.tolist())
        for store in self._stores:
            store.select(rows)

    def _arrange(self, together: list[Tensor]) -> None:
        """Empty stores for the heads that are to be together, with heads that keep everything apart."""
        whole = torch.zeros(self.heads, dtype=torch.bool)
        whole[list(self.kept.whole)] = True
        self._stores, self._apart = [], False
        for heads in together:
            for kept, some in ((self.kept.everything, heads[whole[heads]]), (self.kept, heads[~whole[heads]])):
                if len(some):
                    kept = self.kept.others if kept is self.kept and self.kept.whole else kept
                    self._stores.append(Store(some, kept, self.how, self.group))
        self._back = torch.cat([s.heads for s in self._stores]).argsort()

    def _settle(self, seen: Tensor, more: int | None) -> None:
        if self.kept.across_heads and not self._apart and self.kept.read(seen):
            state = self._stores[0].state()
            sizes = _rounded((state.positions >= 0).sum(-1).amax(0).cpu())
            if len(sizes.unique()) > 1:
                self._arrange([(sizes == n).nonzero()[:, 0] for n in sizes.unique()])
                for store in self._stores:
                    store.load(_only(state, store.heads))
            self._apart = True
        for store in self._stores:
            store.settle(seen, more)

    def _note(self, ran: list[Attended]) -> None:
        evicted, cuts = [], []
        for store, attended in zip(self._stores, ran, strict=True):
            assert attended.evicted is not None
            assert attended.cuts is not None
            evicted.append(attended.evicted.cpu())
            row, head, column, position = attended.cuts.cpu().unbind(1)
            cuts.append(torch.stack([row, store.heads[head], column + self._columns, position], 1))
        self._evicted.append(torch.cat(evicted, 1)[:, self._back])
        self._cuts.append(torch.cat(cuts))


def joined(states: list[EvictionState], order: Tensor | None = None) -> EvictionState:
    """The KV heads of several states of the same rows, in their order or in `order`."""
    if len(states) == 1:
        return states[0]
    slots = max(s.positions.shape[-1] for s in states)
    padded = [s.pad(slots) for s in states]
    names = [f.name for f in fields(EvictionState) if f.name != "seen" and getattr(states[0], f.name) is not None]
    state = replace(states[0], **{n: torch.cat([getattr(s, n) for s in padded], 1) for n in names})
    return state if order is None else state.heads(order)


def _only(state: EvictionState, heads: Tensor) -> EvictionState:
    """The state of some KV heads, with no more slots than they need and in memory of its own."""
    some = state.heads(heads)
    n = max(1, int((some.positions >= 0).sum(-1).max()))
    parts = {
        f.name: x[:, :, :n].clone() for f in fields(some) if (x := getattr(some, f.name)) is not None and x.ndim > 1
    }
    return replace(some, **parts)


def _rounded(slots: Tensor) -> Tensor:
    """Numbers of slots, rounded up to few different ones, by an eighth at most or to 16."""
    unit = 2 ** (slots.clamp(min=1).double().log2().floor().long() - 3).clamp(min=4)
    return (slots + unit - 1) // unit * unit


def _nbytes(state: EvictionState) -> int:
    return sum(x.nbytes for f in fields(EvictionState) if (x := getattr(state, f.name)) is not None)


class PrunedLayer(CacheLayerMixin):
    """The cache of one layer; `PrunedCache` states what is `kept` before the first call.

    A layer that calls its attention several times in a pass (DiffLlama: the same keys with two halves of the values)
    has as many `Slots`, and `state` and `evicted` show the KV heads of all of them, in the order of the calls.

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
        self.kept = Kept([])
        self.window: int | None = None  # a sliding window of the layer's own
        self._slots: list[Slots] = []

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self._slots)

    @property
    def shape(self) -> dict[str, Any]:
        """What `restore` makes the layer's attentions of: the KV heads of each, query heads of each of those, its window."""
        heads, group = ([getattr(s, name) for s in self._slots] for name in ("heads", "group"))
        return {"heads": heads, "group": group, "window": self.window}

    def restore(self, kept: Kept, shape: Mapping[str, Any], state: EvictionState) -> None:
        """Go on from a state in an empty layer, made as `shape` says."""
        self.kept, self.window, self._slots = kept, shape["window"], []
        for heads, group in zip(shape["heads"], shape["group"], strict=True):
            slots = Slots(kept, self.how)
            slots.heads, slots.group = heads, group
            self._slots.append(slots)
        self.check(state)
        self.load(state)
        self.is_initialized = True

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, step: Step, scale: float, more: int | None, which: int = 0
    ) -> Tensor:
        """Insert, attend, score and evict the call's tokens, [B, H, T, V].

        Args:
            more: how many tokens may come after these, where that is known; bounds the memory of what is not evicted.
            which: how many times the layer called its attention before in this pass.
        """
        if which == len(self._slots):
            self._slots.append(Slots(self.kept, self.how))
        output = self._slots[which].attend(query, key, value, step, scale, more)
        self.is_initialized = True
        return output

    def state(self) -> EvictionState:
        """What is cached, in canonical form."""
        return joined([s.state() for s in self._slots])

    def check(self, state: EvictionState) -> None:
        """Refuse a state that this layer could not hold.

        Raises:
            UserError: if it holds more than the budget, or was made by another policy.
        """
        for slots, part in zip(self._slots, self._parts(state), strict=True):
            slots.check(part)

    def load(self, state: EvictionState) -> None:
        """Go on from a state of as many rows, instead of what is cached."""
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
        self.kept = self.kept.select(indices.tolist())
        for slots in self._slots:
            slots.select(indices)

    def _parts(self, state: EvictionState) -> list[EvictionState]:
        """The heads of each of the layer's attentions."""
        return [state.heads(h) for h in torch.arange(state.positions.shape[1]).split([s.heads for s in self._slots])]

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
