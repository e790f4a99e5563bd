"""The cache of one attention of a layer (`AttentionCache`), which consists of caches of some KV heads (`HeadsCache`).

Once the prompt is read, tokens are cached in memory that is allocated once, if a backend has such memory for the rule
(`a2sf.engine.kernels.new_cache`). Else an `EvictionState` goes from call to call. Shapes as in `a2sf.engine.state`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from a2sf.engine.kernels import CacheShape, TokenCache, attend, new_cache, note_backend
from a2sf.engine.retention import BatchRetention, full_heads_of
from a2sf.engine.state import Attended, EvictionState, Options, Segments, remembered, rounded_slots
from a2sf.errors import UserError
from a2sf.policies.base import UNLIMITED
from a2sf.policies.model.rotary import Projection, Rotary
from a2sf.policies.model.softmax import PLAIN
from a2sf.policies.rule import ACCUMULATED
from a2sf.policies.slots import head_slots

GROWTH = 256
"""The least number of free slots that are allocated where neither a budget nor a length bounds a cache."""


@dataclass(frozen=True)
class NewTokens:
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


@dataclass
class LayerSettings:
    """How a layer's attention is computed; `PrunedCache` sets what is the model's, `rotary` and `projection`, in each call.

    Attributes:
        positions: the longest sequence that the model can read.
        backend: as for `a2sf.engine.kernels.attend`.
        trace: record what every step evicts.
        layer, layers: the layer's number, and how many there are.
        rotary: its rotary embedding, where the policy needs it.
        projection: the projection after its attention, where the policy needs it.
    """

    positions: int
    backend: str
    trace: bool
    layer: int = 0
    layers: int = 1
    rotary: Rotary | None = None
    projection: Projection | None = None

    def options(self, options: Options) -> Options:
        """The engine's arguments; `options` as in `Pass.attend`."""
        known = {"layer": self.layer, "layers": self.layers, "rotary": self.rotary, "projection": self.projection}
        return replace(options, return_state=True, trace=self.trace, **known)  # type: ignore[arg-type]


class HeadsCache:
    """The cache of some KV heads of an attention: of all, or of those that hold about the same number of tokens.

    Args:
        heads: int64 [K'], the attention's KV heads that are cached here.
        retention: what each row retains of them.
        group: query heads of each.
    """

    def __init__(self, heads: Tensor, retention: BatchRetention, settings: LayerSettings, group: int) -> None:
        self.heads, self.retention, self.settings, self.group = heads, retention, settings, group
        self.queries = (heads[:, None] * group + torch.arange(group)).flatten()  # the query heads that read them
        # either memory or state is what is cached; the memory is reused after a state was made of it
        self._memory: TokenCache | None = None
        self._state: EvictionState | None = None
        self._slots = self._held = 0  # slots allocated for each head, and cached tokens of the fullest head
        self._softmax = PLAIN  # the layer's, known once it has been called
        self._rule = retention.rule  # the policy's; what is retained after a prompt may follow a simpler one

    @property
    def nbytes(self) -> int:
        memory = self._memory.nbytes if self._memory is not None else 0
        return memory + (0 if self._state is None else self._state.nbytes)

    @property
    def cached_nbytes(self) -> int:
        if self._state is None and self._memory is None:
            return 0
        state = self.state()
        return int(state.counts.sum()) * sum(x.shape[-1] * x.itemsize for x in (state.keys, state.values))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, new: NewTokens, options: Options) -> Attended:
        """Insert, attend, score and evict the call's tokens; the caller then calls `end_call`."""
        self._softmax = options.softmax
        at_once = new.columns == 1 and not self.settings.trace and options.softmax.plain
        if at_once and self._state is None and self._memory is not None:
            now = self.retention.after(new.after)
            self._held = min(now.most, self._held + 1)
            memory = self._make_room(self._held, key, value, None, self.retention.most)
            note_backend(memory.backend)
            return Attended(memory.attend(query, key, value, now, scale=options.scale, lengths=new.length))
        before = None if self._state is None and self._memory is None else self.state()
        segments = Segments.of_rows(self.retention, new.length, new.start)
        options = self.settings.options(options)
        attended = attend(query, key, value, segments, options, before, backend=self.settings.backend)
        self._state = attended.state
        return attended

    def end_call(self, seen: Tensor, to_come: int | None) -> None:
        """After a call, move the state into memory, where there is some for it.

        Args:
            seen: int64 [B], tokens of each row so far.
            to_come: how many tokens may follow; None: not known.
        """
        state = self._state
        if state is None:
            return
        retention = self.retention
        # where the cut gave every head a share of its own, what follows depends on the prompt
        fixed = retention.across_heads and retention.schedule.then != "keep"
        if retention.schedule.prompt and not fixed and retention.prompts_read(seen):
            self.retention = retention.after_prompt()
        if new_cache(self.retention, state.keys, self.settings.backend, self._softmax) is None:
            self._memory = None
            return
        self._state = None  # first, so that less memory is in use when more is allocated
        self._held = state.most
        if self._held > self._slots:
            self._memory = None
        most = self.retention.after(seen + to_come).most if to_come else self.retention.most
        self._make_room(self._held, state.keys, state.values, to_come, most).load(
            state, self.retention.forgetting_factor
        )

    def state(self) -> EvictionState:
        """What is cached, in canonical form."""
        state = self._memory.state() if self._state is None and self._memory is not None else self._state
        assert state is not None
        return state.for_rule(self._rule, self.group)

    def load(self, state: EvictionState) -> None:
        """Continue from a state with as many rows; `end_call` is to follow."""
        self._state, self._memory, self._slots = state, None, 0

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [B'] on the CPU, in that order."""
        self.retention = self.retention.select(rows)
        if self._state is not None:
            self._state = self._state.select(rows)
        elif self._memory is not None:
            self._memory.reorder(rows)

    def _make_room(self, need: int, key: Tensor, value: Tensor, to_come: int | None, most: int) -> TokenCache:
        """Memory with `need` slots: allocated once where the budget or `to_come` bounds them, else whenever they are full.

        Args:
            most: slots that the budget allows; where it grows, after `to_come` tokens, or without a bound.
        """
        if self._memory is not None and need <= self._slots:
            return self._memory
        make = new_cache(self.retention, key, self.settings.backend, self._softmax)
        assert make is not None
        if to_come:
            self._slots = max(need, min(most, need + to_come))
        elif most < UNLIMITED and self._memory is None:
            self._slots = max(need, min(most, self.settings.positions))
        else:
            self._slots = max(need, min(most, need + max(GROWTH, need // 2)))
        sizes = len(self.retention.budget), len(self.heads), self.group, self._slots, key.shape[-1], value.shape[-1]
        grown = make(CacheShape(*sizes))
        if self._memory is not None:
            grown.load(self._memory.state(), self.retention.forgetting_factor)
        self._memory = grown
        return grown


class AttentionCache:
    """The cache of one attention of a layer, in one `HeadsCache` or in several.

    Heads that retain everything are stored separately. After a prompt's cut that shifts slots between heads, those with
    about the same number of tokens are stored together, so that no head takes the memory of a larger one.
    """

    def __init__(self, retention: BatchRetention, settings: LayerSettings) -> None:
        self.retention, self.settings = retention, settings
        self.heads = self.group = 0  # KV heads, and query heads of each
        self._caches: list[HeadsCache] = []
        self._head_order = torch.empty(0)  # int64 [K], where each KV head is among those of all `_caches`
        self._evicted: list[Tensor] = []
        self._cuts: list[Tensor] = []
        self._columns = 0
        self._arranged_after_cut = False  # whether the heads are stored as the prompt's cut left them

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self._caches)

    @property
    def cached_nbytes(self) -> int:
        return sum(s.cached_nbytes for s in self._caches)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, new: NewTokens, options: Options, to_come: int | None
    ) -> Tensor:
        """Insert, attend, score and evict the call's tokens, [B, H, T, V]; `to_come` as for `PrunedLayer.attend`."""
        if not self._caches:
            self.heads, self.group = key.shape[1], query.shape[1] // key.shape[1]
            self._arrange([torch.arange(self.heads)])
        if len(self._caches) == 1:
            ran = [self._caches[0].attend(query, key, value, new, options)]
            output = ran[0].output
        else:
            ran = []
            output = query.new_empty(*query.shape[:3], value.shape[-1])
            for cache in self._caches:
                parts = query[:, cache.queries], key[:, cache.heads], value[:, cache.heads]
                ran.append(cache.attend(*parts, new, options.heads(cache.heads)))
                output[:, cache.queries] = ran[-1].output
        if self.settings.trace:
            self._record(ran)
        self._columns += new.columns
        self._end_call(new.after, to_come)
        return output

    def state(self) -> EvictionState:
        """What is cached, in canonical form."""
        return EvictionState.join_heads(
            [s.state() for s in self._caches], self._head_order if len(self._caches) > 1 else None
        )

    def check(self, state: EvictionState) -> None:
        """Raise `UserError` if this cache could not hold `state`."""
        check_state(self.retention, state)

    def load(self, state: EvictionState) -> None:
        """Continue from a state with as many rows, instead of what is cached."""
        self._arrange([torch.arange(self.heads)])
        for cache in self._caches:
            cache.load(state.heads(cache.heads).trim().contiguous())
        self._end_call(state.seen, None)

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
        self.retention = self.retention.select(rows)
        for cache in self._caches:
            cache.select(rows)

    def _arrange(self, groups: list[Tensor]) -> None:
        """Make empty caches, one for each group of heads; heads that retain everything have caches of their own."""
        rule = self.retention.rule
        # a policy's own function may look at all heads
        full_heads = [] if rule.calls else full_heads_of(rule, self.heads)
        full = torch.zeros(self.heads, dtype=torch.bool)
        full[full_heads] = True
        everything, others = self.retention.unlimited(ACCUMULATED), self.retention
        others = replace(others, rule=replace(rule, full_heads=())) if full_heads else others
        self._caches, self._arranged_after_cut = [], False
        for heads in groups:
            for retention, some in ((everything, heads[full[heads]]), (others, heads[~full[heads]])):
                if len(some):
                    if retention.prepared is not None:
                        retention = replace(retention, prepared=retention.prepared[:, some])
                    self._caches.append(HeadsCache(some, retention, self.settings, self.group))
        self._head_order = torch.cat([s.heads for s in self._caches]).argsort()

    def _end_call(self, seen: Tensor, to_come: int | None) -> None:
        if self.retention.across_heads and not self._arranged_after_cut and self.retention.prompts_read(seen):
            state = self._caches[0].state()
            sizes = rounded_slots(state.counts.amax(0).cpu())
            if len(sizes.unique()) > 1:
                self._arrange([(sizes == n).nonzero()[:, 0] for n in sizes.unique()])
                for cache in self._caches:
                    cache.load(state.heads(cache.heads).trim().contiguous())
            self._arranged_after_cut = True
        for cache in self._caches:
            cache.end_call(seen, to_come)

    def _record(self, ran: list[Attended]) -> None:
        evicted, cuts = [], []
        for cache, attended in zip(self._caches, ran, strict=True):
            assert attended.evicted is not None
            assert attended.cuts is not None
            evicted.append(attended.evicted.cpu())
            row, head, column, position = attended.cuts.cpu().unbind(1)
            cuts.append(torch.stack([row, cache.heads[head], column + self._columns, position], 1))
        self._evicted.append(torch.cat(evicted, 1)[:, self._head_order])
        self._cuts.append(torch.cat(cuts))


def check_state(retention: BatchRetention, state: EvictionState) -> None:
    """Refuse a state that such a retention could not have led to.

    Raises:
        UserError: if it holds more than it may, or was made by another policy.
    """
    rule = retention.rule
    memory = None if state.memory is None else state.memory.shape[-1]
    heads_differ = rule.shared and not bool((state.positions == state.positions[:, :1]).all())
    queries = 0 if state.queries is None else state.queries.shape[3]
    if heads_differ or memory != remembered(rule) or queries != rule.queries:
        raise UserError("a state was made by another policy than this cache's; make a cache with the state's policy")
    counts = state.counts.cpu()
    counts[:, list(rule.full_heads)] = 0
    counts = counts if rule.threshold is None else counts * 0  # any number may stay
    seen = state.seen.cpu()
    budget = retention.after(seen).budget
    if rule.heads:  # that of the head that may hold most
        budget = torch.tensor([max(C for C, _, _ in head_slots(rule.heads, n)) for n in budget.tolist()])
    most = budget + retention.schedule.spare
    if retention.prompt is not None:
        later = (seen - retention.prompt).clamp(min=0) if retention.schedule.then == "keep" else 0
        most = torch.where(seen < retention.prompt, counts.amax(-1), most + later)
    fits = counts.sum(-1) <= most * counts.shape[1] if retention.across_heads else counts.amax(-1) <= most
    if not bool(fits.all()):
        raise UserError("a state holds more tokens than this cache's budget; make a cache with the state's budget")
