"""What the engine takes and gives: segments of tokens, the state after a step, and the result.

Shapes, as suffixes or in brackets: B rows, H query heads, K key/value heads, T tokens, D key dimension, V value dimension,
S segments, N slots, M numbers that a rule remembers per token, G = H / K query heads of a key/value head, W last tokens
whose queries a rule sees.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from a2sf.engine.retention import BatchRetention
from a2sf.policies.model.rotary import Projection, Rotary
from a2sf.policies.model.softmax import PLAIN, Softmax
from a2sf.policies.ranking import of_columns
from a2sf.policies.rule import ACCUMULATED, Rule

Made = TypeVar("Made")

LATE = 2**62
"""Later than any position."""


def once(known: dict[Hashable, Any], key: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` gives, made at the first call with this `key` and stored in `known`."""
    if key not in known:
        known[key] = make()
    return cast(Made, known[key])


@dataclass(frozen=True, kw_only=True)
class Segments(BatchRetention):
    """Runs of tokens to attend, packed along the time axis; a run may continue the state that another run ended with.

    A batch of rows is one segment per row without parents. Sequences with a common beginning are a tree: the shared
    beginning is one segment, its continuations are children, and each child starts from a copy of its parent's state. A
    parent and a child may differ in budget, recent and sinks if the parent has not evicted yet (invariant 6), or if the
    budget grows with the text; and in prompt only if the parent ends within both; where the rule looks at the end of a
    prompt, before either looks.

    Attributes (int64 tensors [S] on the CPU, beside those of `BatchRetention`, which are of the sequence through a segment):
        row, start, length: the tokens `[row, start : start + length]` of the packed query, key and value.
        parent: index of the segment that this one continues, -1 for none. Parents come before their children.
        final: bool [S], whether the state at a segment's end is one of those that are returned; None: all are.
    """

    row: Tensor
    start: Tensor
    length: Tensor
    parent: Tensor
    final: Tensor | None = None

    @staticmethod
    def of_rows(retention: BatchRetention, length: Tensor, start: Tensor | None = None) -> Segments:
        """One segment per row without a parent: the columns `[start, start + length)`, int64 [B] each; from 0 by default."""
        B = len(length)
        return Segments(
            **retention.retention(),
            row=torch.arange(B),
            start=torch.zeros(B, dtype=torch.int64) if start is None else start,
            length=length,
            parent=torch.full((B,), -1),
        )

    @property
    def count(self) -> int:
        return self.row.shape[0]

    def ends(self, seen: Iterable[int] = ()) -> list[int]:
        """The position after each segment's last token.

        Args:
            seen: tokens read before each segment without a parent; none: 0.
        """
        before, ends = iter(seen), list[int]()
        for length, parent in zip(self.length.tolist(), self.parent.tolist(), strict=True):
            ends.append(length + (ends[parent] if parent >= 0 else next(before, 0)))
        return ends

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, made once for all layers of a pass, which share their segments."""
        return once(self.__dict__.setdefault("_made", {}), key, make)


@dataclass(frozen=True)
class EvictionState:
    """What is cached after a step, for every row and KV head.

    Attributes:
        positions: int64 [B, K, N], retained positions in ascending order, -1 where a slot is empty (empty slots come last).
        scores: [B, K, N], accumulated attention scores `A`, 0 where a slot is empty.
        keys: [B, K, N, D] and
        values: [B, K, N, V], finite (0, in states made here) where a slot is empty; all three in the engine's accumulation
            dtype (float32, or float64 for float64 inputs).
        seen: int64 [B], tokens read so far, which is the next token's position.
        memory: [B, K, N, M], what a policy's own function remembers per token; None where it remembers nothing. 0 after a
            prompt's cut that nothing follows.
        queries: [B, K, G, W, D], the queries of the last tokens that were read, the newest last, and 0 before the first;
            None where the rule does not ask for them. 0 after a prompt's cut that nothing follows.
    """

    positions: Tensor
    scores: Tensor
    keys: Tensor
    values: Tensor
    seen: Tensor
    memory: Tensor | None = None
    queries: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """int64 [B, K]: cached tokens of each KV head."""
        return (self.positions >= 0).sum(-1)

    @property
    def most(self) -> int:
        """Cached tokens of the fullest KV head, at least 1; waits for a GPU."""
        return max(1, int(self.counts.max())) if self.positions.numel() else 1

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take."""
        return sum(x.nbytes for x in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without memory and queries where there are none."""
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}

    def select(self, rows: Tensor) -> EvictionState:
        """The state of `rows` [B'], in that order; a row may be taken several times (a fork) or left out."""
        rows = rows.to(self.seen.device)
        return EvictionState(**{name: x.index_select(0, rows) for name, x in self.tensors().items()})

    def row(self, row: int) -> EvictionState:
        """The state of one row, in as few slots as it needs, in memory of its own."""
        one = EvictionState(**{name: x[row : row + 1] for name, x in self.tensors().items()}).trim()
        return EvictionState(**{name: x.clone() for name, x in one.tensors().items()})

    def heads(self, heads: Tensor) -> EvictionState:
        """The state of the KV heads `heads` [K'], in that order."""
        return replace(self, **{n: x[:, heads.to(x.device)] for n, x in self.tensors().items() if n != "seen"})

    def pad(self, slots: int) -> EvictionState:
        """The same state with at least `slots` slots per KV head."""
        more = slots - self.positions.shape[-1]
        if more <= 0:
            return self

        def widen(name: str, x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 3) + (0, more), value=-1 if name == "positions" else 0)

        return replace(self, **{name: widen(name, x) for name, x in self._slots().items()})

    def trim(self, slots: int | None = None) -> EvictionState:
        """A view of the first `slots` slots of each KV head, which hold all tokens; as many as are needed by default."""
        n = self.most if slots is None else slots
        return replace(self, **{name: x[:, :, :n] for name, x in self._slots().items()})

    def contiguous(self) -> EvictionState:
        """The same state, whose tensors refer to no larger memory."""
        return EvictionState(**{name: x.contiguous() for name, x in self.tensors().items()})

    def compact(self, slots: int | None = None, cleared: bool = False) -> EvictionState:
        """Sort the slots by position, the empty ones last and set to 0, and keep the first `slots` (default: as needed).

        Args:
            cleared: whether empty slots are 0 already.
        """
        filled, some_empty = self.positions >= 0, True
        by_position, in_order = self.positions.where(filled, LATE), False
        if slots is None and self.positions.numel():
            least, most = (int(n) for n in filled.sum(-1).aminmax())
            slots, some_empty = max(1, most), least < max(1, most)
            in_order = bool((by_position[..., 1:] >= by_position[..., :-1]).all())
        if in_order:  # as after a prompt
            state = self if slots == filled.shape[-1] else self.trim(slots).contiguous()
            empty = ~filled[:, :, :slots]
        else:
            order = by_position.argsort(dim=-1)[:, :, :slots]
            state = replace(self, **{name: of_columns(x, order) for name, x in self._slots().items()})
            empty = state.positions < 0
        if cleared or not some_empty:
            return state
        numbers = {name: x for name, x in state._slots().items() if name != "positions"}
        return replace(state, **{name: _without(x, empty) for name, x in numbers.items()})

    def evict(self, out: Tensor) -> EvictionState:
        """The state without the slots that are True in `out` [B, K, N]."""
        return replace(self, positions=self.positions.masked_fill(out, -1)).compact()

    def for_rule(self, rule: Rule, group: int = 1) -> EvictionState:
        """The same state as this rule has it: with a memory and queries, of 0, where the rule has such and they are missing.

        Args:
            group: query heads of a KV head.
        """
        missing = {}
        if self.memory is None and remembered(rule) is not None:
            missing["memory"] = self.keys.new_zeros(*self.positions.shape, rule.memory)
        if self.queries is None and rule.queries:
            (B, K), D = self.positions.shape[:2], self.keys.shape[-1]
            missing["queries"] = self.keys.new_zeros(B, K, group, rule.queries, D)
        return replace(self, **missing) if missing else self

    def plain(self) -> EvictionState:
        """The same state without what only functions of a policy use."""
        return self if self.memory is None and self.queries is None else replace(self, memory=None, queries=None)

    @staticmethod
    def stack(states: list[EvictionState]) -> EvictionState:
        """Rows of several states as one batch."""
        return _joined(states, 0)

    @staticmethod
    def join_heads(states: list[EvictionState], order: Tensor | None = None) -> EvictionState:
        """KV heads of several states of the same rows, in their order or in `order` [K]."""
        joined = _joined(states, 1)
        return joined if order is None else joined.heads(order)

    @staticmethod
    def empty(key: Tensor, value: Tensor, rule: Rule = ACCUMULATED, group: int = 1) -> EvictionState:
        """Caches without a token for rows of `key` [B, K, T, D] and `value` [B, K, T, V]; `group` as in `for_rule`."""
        B, K, _, D = key.shape
        M = remembered(rule)
        return EvictionState(
            positions=torch.empty(B, K, 0, dtype=torch.int64, device=key.device),
            scores=key.new_empty(B, K, 0),
            keys=key.new_empty(B, K, 0, D),
            values=key.new_empty(B, K, 0, value.shape[-1]),
            seen=torch.zeros(B, dtype=torch.int64, device=key.device),
            memory=None if M is None else key.new_empty(B, K, 0, M),
        ).for_rule(rule, group)

    def _slots(self) -> dict[str, Tensor]:
        """The tensors that have slots."""
        return {name: x for name, x in self.tensors().items() if name not in ("seen", "queries")}


def _without(x: Tensor, empty: Tensor) -> Tensor:
    """`x` [B, K, N, ...] with 0 where `empty` bool [B, K, N]; a copy."""
    if x.ndim == 3 or x.device.type != "cpu":
        return x.masked_fill(empty[(..., *[None] * (x.ndim - 3))], 0)
    # few are empty; a mask is read for every number
    rows = empty.flatten().nonzero()[:, 0]
    return x.flatten(0, 2).index_fill(0, rows, 0).view_as(x)


def _joined(states: list[EvictionState], dim: int) -> EvictionState:
    if len(states) == 1:
        return states[0]
    slots = max(s.positions.shape[-1] for s in states)
    padded = [s.pad(slots).tensors() for s in states]
    joined = {n: torch.cat([s[n] for s in padded], dim) for n in padded[0] if n != "seen" or dim == 0}
    return EvictionState(**({"seen": states[0].seen} | joined))


@dataclass(frozen=True)
class Attended:
    """What attending a batch gives.

    Attributes:
        output: [B, H, T, V] in the query's dtype; 0 where no segment covers a token.
        state: final state, one row per segment (of those in `Segments.final`); None unless asked for.
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
    """How to scale the logits, what to return beside the output, and what a policy's function sees of the layer.

    Attributes:
        scale: what query · key is multiplied by.
        return_state, trace: whether to return the final state, and what was evicted.
        layer, layers: the layer's number, from 0, and how many the model has.
        rotary: its rotary embedding, where it is known and a rule needs it.
        projection: the projection after its attention, where a rule needs it.
        softmax: what the layer makes of the logits.
    """

    scale: float
    return_state: bool = False
    trace: bool = False
    layer: int = 0
    layers: int = 1
    rotary: Rotary | None = None
    projection: Projection | None = None
    softmax: Softmax = PLAIN

    def heads(self, heads: Tensor) -> Options:
        """Those of the KV heads `heads` int64 [K'], in their order."""
        return self if self.softmax.plain else replace(self, softmax=self.softmax.heads(heads))


class AttentionCall(NamedTuple):
    """One call of the attention: what every backend takes, in the order of its arguments.

    Attributes:
        query: [B, H, T, D].
        key: [B, K, T, D] and
        value: [B, K, T, V], any floating dtype and strides.
        segments: what to attend.
        options: what to return.
        state: the state that the parentless segments start from, one row for each in their order; None: empty caches.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    segments: Segments
    options: Options
    state: EvictionState | None = None


def rounded_slots(slots: Tensor) -> Tensor:
    """Numbers of slots, int64, rounded up to few different ones: to multiples of 16, or by at most an eighth."""
    unit = 2 ** (slots.clamp(min=1).double().log2().floor().long() - 3).clamp(min=4)
    return (slots + unit - 1) // unit * unit


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed in float32 (invariant 8)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def remembered(rule: Rule) -> int | None:
    """`M` of a rule whose states have a memory; None where they have none.

    What an oracle knows beforehand is of no use to a sequence that continues, so its states have none.
    """
    return None if rule.priority_fn is None or rule.precompute is not None else rule.memory


def last_queries(rule: Rule, before: Tensor | None, query: Tensor, read: Tensor) -> Tensor | None:
    """The queries of the last `W` tokens, [B, K, G, W, D], of rows that read some more; None where a rule sees none.

    Args:
        before: the same before these tokens; None: there were none.
        query: [B, K, G, T, D], the tokens' queries.
        read: int64 [B], how many of them each row has read.
    """
    if not rule.queries:
        return None
    every = joined_queries(rule, before, query)
    at = read.to(query.device)[:, None] + torch.arange(rule.queries, device=query.device)
    return every.gather(3, at[:, None, None, :, None].expand(*every.shape[:3], -1, every.shape[-1]))


def joined_queries(rule: Rule, before: Tensor | None, query: Tensor) -> Tensor:
    """`before` and the tokens after it, [B, K, G, W + T, D]; arguments as in `last_queries`."""
    B, K, G, _, D = query.shape
    before = query.new_zeros(B, K, G, rule.queries, D) if before is None else before.to(query.dtype)
    return torch.cat([before, query], 3)
