"""The driver of the readable scan (`scan.py`): some tokens at a time, two products of torch and the scan between them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from a2sf.bench.scan.scan import NEVER, keep, scan, subtract_largest, whole
from a2sf.engine.kernels.cpu.threads import in_threads
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Attended, AttentionCall, EvictionState, Options, Segments, accumulation_dtype
from a2sf.engine.tree import PaddedRows, RowResults, by_depth
from a2sf.policies.ranking import terms

TOGETHER = 64
"""The most tokens that are read together: more mean longer products, and more columns that are dead."""


class Columns:
    """What B rows have cached, and tokens that came since; those that died stay among them until room is needed.

    Attributes:
        used: how many columns are taken, of `room`.
        keys: [B, K, room, D] and
        values: [B, K, room, V].
        positions: int64 [B, K, room], ascending, -1 where there is no token.
        died: int32 [B, K, room], the step at which a token was evicted; NEVER if it is cached, -1 if there is none.
        numbers: [B, K, 4, room], `A`, `N`, `m` and `b`.
        evictions: int64 [n, 4] each, if traced: row, head, step and position.
    """

    def __init__(
        self, rows: BatchRetention, state: EvictionState, room: int, scale: float, trace: bool = False
    ) -> None:
        (B, K, S), dtype, self.used, self.room = state.positions.shape, state.keys.dtype, 0, whole(room)
        self.rows, self.scale, self.trace = rows, scale * math.log2(math.e), trace
        self.keys, self.values = (x.new_zeros(B, K, self.room, x.shape[-1]) for x in (state.keys, state.values))
        self.positions = torch.full((B, K, self.room), -1)
        self.died = torch.full((B, K, self.room), -1, dtype=torch.int32)
        without = torch.tensor([0.0, 1.0, float(rows.rule.scored), 0.0], dtype=dtype)  # of a rule that uses none
        self.numbers = without[:, None].repeat(B, K, 1, self.room)
        self.seen, self.steps = state.seen, torch.zeros_like(state.seen)
        self.evictions: list[Tensor] = []
        self.limits = torch.stack([rows.budget, rows.recent, rows.sinks], 1)
        self.factor = rows.forgetting_factor.to(dtype)
        self._put(state.keys, state.values, state.positions)
        self.numbers[:, :, 0, :S] = state.scores
        if rows.rule.mean_over_age:
            ages = state.seen[:, None, None] - 1 - state.positions
            self.numbers[:, :, 1, :S] = terms(rows.forgetting_factor[:, None, None], ages)

    def _put(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Take the next columns; position -1: there is no token."""
        at, rule = slice(self.used, self.used + keys.shape[2]), self.rows.rule
        self.keys[:, :, at], self.values[:, :, at], self.positions[:, :, at] = keys, values, positions
        self.died[:, :, at] = torch.where(positions >= 0, NEVER, -1)
        self.numbers[:, :, 0, at] = 0
        for i, function in ((2, rule.weight), (3, rule.bias)):
            if function is not None:
                self.numbers[:, :, i, at] = function(keys, values, positions)
        self.used = at.stop

    def read(self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Read the next tokens of each row, `lengths` [B] of the n given; the output [B, H, n, V]."""
        (B, H, n, D), K, rule = query.shape, key.shape[1], self.rows.rule
        if self.used + n > self.room:
            self.keep()
        first, offset = self.used, torch.arange(n)
        tokens = torch.full((B,), n) if lengths is None else lengths.clamp(0, n)
        positions = torch.where(offset < tokens[:, None], self.seen[:, None] + offset, -1)
        self._put(key, value, positions[:, None].expand(B, K, n))
        q, W = (query * self.scale).reshape(B, K, -1, D), whole(self.used)
        shares = (q @ self.keys[:, :, :W].transpose(2, 3)).view(B, K, H // K, n, W)
        _together(subtract_largest, B * H, shares, first)
        shares.exp2_()
        heads = K if rule.shared else 1
        _together(
            scan, B * K // heads, shares, q.view(B, K, H // K, n, D), self.keys, self.positions, self.died, self.numbers,
            first, tokens, self.steps, self.limits, self.factor, self.rows.schedule.spare, heads, rule.scored,
            rule.count_above_uniform, rule.mean_over_age,
        )  # fmt: skip
        self.seen, self.steps = self.seen + tokens, self.steps + tokens
        return (shares.flatten(2, 3) @ self.values[:, :, :W]).view(B, H, n, -1)

    def keep(self) -> None:
        """Make room: the columns that are left come first."""
        if self.trace:
            at = ((self.died >= 0) & (self.died != NEVER)).nonzero(as_tuple=True)
            self.evictions.append(torch.stack([*at[:2], self.died[at].long(), self.positions[at]], 1))
        columns = self.keys, self.values, self.positions, self.died, self.numbers
        self.used = keep(self.used, *(x.numpy() for x in columns))

    def state(self) -> EvictionState:
        """What is cached, in the canonical form."""
        self.keep()
        S = slice(max(1, self.used))
        gone = self.positions[:, :, S] < 0
        keys, values = (x[:, :, S].masked_fill(gone[..., None], 0) for x in (self.keys, self.values))
        scores, positions = self.numbers[:, :, 0, S].masked_fill(gone, 0), self.positions[:, :, S].clone()
        return EvictionState(positions=positions, scores=scores, keys=keys, values=values, seen=self.seen)


def _together(function: Callable[..., None], items: int, *given: object) -> None:
    """Call a compiled function in torch's threads, at most one for each item."""
    threads = min(torch.get_num_threads(), items)
    arrays = [x.numpy() if isinstance(x, Tensor) else x for x in given]
    in_threads(lambda thread: function(thread, threads, *arrays), threads)


def attend_in_chunks(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: Options, state: EvictionState | None = None
) -> Attended:
    """The recursion; arguments and result as in `a2sf.engine.eviction.reference`, for rules that the kernel runs itself."""
    rows = torch.arange(len(query))
    alone = segments.row.equal(rows) and bool((segments.parent < 0).all()) and not segments.start.any()
    if not alone or options.trace:
        return by_depth(_run_rows, AttentionCall(query, key, value, segments, options, state))
    # rows as they are, without packing
    dtype = accumulation_dtype(query.dtype)
    q, k, v = (x.to(dtype) for x in (query, key, value))
    start = EvictionState.empty(k, v, segments.rule) if state is None else state
    ran = _run(segments, (q, k, v), segments.length, start, options)
    after = torch.arange(query.shape[2]) >= segments.length[:, None]
    output = ran.output.masked_fill_(after[:, None, :, None], 0).to(query.dtype)
    return Attended(output, ran.state)


def _run_rows(rows: PaddedRows, options: Options) -> RowResults:
    return _run(rows, (rows.query, rows.key, rows.value), rows.length, rows.state, options)


def _run(
    rows: BatchRetention, tokens: tuple[Tensor, Tensor, Tensor], length: Tensor, state: EvictionState, options: Options
) -> RowResults:
    """Rows of `tokens` (query, key, value), of which the first `length` [B] are read."""
    T, S = tokens[0].shape[2], state.positions.shape[-1]
    n = min(T, TOGETHER, max(16, 2 * rows.most))
    columns = Columns(rows, state, min(S + T, max(S, rows.most) + n), options.scale, options.trace)
    parts = zip(*(x.split(n, dim=2) for x in tokens), strict=True)
    outputs = [columns.read(q, k, v, length - i * n) for i, (q, k, v) in enumerate(parts)]
    end = columns.state() if options.return_state or options.trace else None
    return RowResults(torch.cat(outputs, 2), end, torch.cat([torch.empty(0, 4, dtype=torch.int64), *columns.evictions]))
