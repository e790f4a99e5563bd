"""Rows chunk by chunk on a GPU: what is launched in which order, in plain torch.

Only a trace waits for the GPU, and a rule with numbers of its own for each token, which are checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from a2sf.engine.kernels.gpu import plan
from a2sf.engine.kernels.gpu.jit import NEVER
from a2sf.engine.kernels.gpu.launch import Batch, ChunkSlots, Launches, Scanned
from a2sf.engine.priorities import token_numbers
from a2sf.engine.state import EvictionState, Made, Options
from a2sf.engine.tree import PaddedRows, RowResults
from a2sf.policies.ranking import terms

LOG2_E = 1.4426950408889634
FAR = 2**29
"""More than any number of tokens, and small enough to be added to a position."""
LONG = 1024
"""Tokens from which a prompt whose scores are not needed is read by SDPA, alone; shorter ones are one launch together."""


def batch_of(rows: PaddedRows, scale: float) -> Batch:
    """What launches for `rows` read. `by_depth` packs time before heads, so that the transposes copy nothing."""
    (B, H, T, D), (K, V) = rows.query.shape, (rows.key.shape[1], rows.value.shape[-1])
    query, key, value = (x.transpose(1, 2).contiguous() for x in (rows.query, rows.key, rows.value))
    limits, factor = rows.once("limits", lambda: _limits(rows))
    fixed = factor
    if rows.rule.weight is not None or rows.rule.bias is not None:
        fixed = _fixed(rows, rows.key, rows.value, rows.positions)
    return Batch(
        query=query.view(B, T, K, H // K, D),
        key=key,
        value=value,
        output=query.new_empty(B, T, K, H // K, V),
        limits=limits,
        factor=factor,
        fixed=fixed,
        scale=scale * LOG2_E,
        rule=rows.rule,
        spare=min(rows.schedule.spare, FAR),
    )


def _limits(rows: PaddedRows) -> tuple[Tensor, Tensor]:
    """`limits` and `factor` of a `Batch`."""
    limits = torch.stack([rows.state.seen, rows.budget, rows.recent, rows.sinks], 1).clamp(max=FAR).int()
    return limits, rows.forgetting_factor.float()


def _fixed(rows: PaddedRows, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """`m` and `b` of tokens, float32 [..., 2, tokens]; 0 where the rule has one of them only."""
    none = torch.zeros(positions.shape, device=keys.device)
    made = token_numbers(rows.rule, keys.float(), values.float(), positions)
    return torch.stack([none if x is None else x.float() for x in made], 2)


@dataclass(frozen=True)
class Group:
    """Rows of a batch that run together: as many columns, or none of them evicts.

    Attributes:
        rows: the whole batch.
        members: which of its rows.
        held: for each of them, how many tokens each KV head holds.
        state: their states.
    """

    rows: PaddedRows
    members: list[int]
    held: list[list[int]]
    state: EvictionState

    @staticmethod
    def of(rows: PaddedRows, members: list[int], held: list[list[int]]) -> Group:
        all_rows = members == list(range(len(rows.lengths)))
        state = rows.state if all_rows else rows.state.select(torch.tensor(members))
        return Group(rows, members, [held[i] for i in members], state)

    @property
    def lengths(self) -> list[int]:
        return [self.rows.lengths[i] for i in self.members]

    @property
    def index(self) -> Tensor:
        """The members as int64 on the rows' device."""
        return self.once("index", lambda: torch.tensor(self.members).to(self.rows.key.device, non_blocking=True))

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """What `make` gives, made once for the same rows of all layers, if their heads hold as much."""
        return self.rows.once((name, *self._key), make)

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        return tuple(self.members), tuple(map(tuple, self.held))

    def table(self, chunks: list[list[plan.Chunk]]) -> Tensor:
        """int32 [chunks, B, 4]: what launches read of each of the chunks, one list for a row."""
        numbers = [
            [[row, *row_chunks[i]] for row, row_chunks in zip(self.members, chunks, strict=True)]
            for i in range(len(chunks[0]))
        ]
        return torch.tensor(numbers, dtype=torch.int32).to(self.rows.key.device, non_blocking=True)

    def slots(self, N: int, numbers: bool) -> ChunkSlots:
        """The state as slots, with room for `N` columns; `numbers`: with those that the rule ranks by."""
        state, S, rule = self.state, max(map(max, self.held)), self.rows.rule
        B, K = state.positions.shape[:2]
        positions = torch.full((B, K, N), -1, dtype=torch.int32, device=state.keys.device)
        found = torch.empty(B, K, 4, N if numbers else 0, device=state.keys.device)
        keys, values = (x[:, :, :S].contiguous() for x in (state.keys, state.values))
        if S:
            held = state.positions[:, :, :S]
            positions[:, :, :S] = held
            if numbers:
                found[:, :, 0, :S] = state.scores[:, :, :S]
                if rule.mean_over_age:
                    factor, seen = (
                        x[self.index, None, None] for x in (self.rows.forgetting_factor, self.rows.state.seen)
                    )
                    found[:, :, 1, :S] = terms(factor, seen - 1 - held).float()
                if rule.weight is not None or rule.bias is not None:
                    found[:, :, 2:, :S] = _fixed(self.rows, keys, values, held)
        return ChunkSlots(positions, found, keys, values)

    def ran(
        self, output: Tensor, state: EvictionState | None, held: list[list[int]], evictions: list[Tensor]
    ) -> RowResults:
        none = torch.empty(0, 4, dtype=torch.int64, device=output.device)
        return RowResults(output, state, torch.cat([none, *evictions]), torch.tensor(held))


class ChunkPlan(NamedTuple):
    """The chunks of a group of rows.

    Attributes:
        table: int32 [chunks + 1, B, 4], what launches read of each.
        ends: for each row, what each KV head holds at the end.
        tokens, left: of each chunk, the most tokens of a row, and the most tokens that a row holds after it.
        several: whether more than one token may go in a step.
    """

    table: Tensor
    ends: list[list[int]]
    tokens: list[int]
    left: list[int]
    several: bool


def _planned(group: Group, N: int, most: int, spare: int) -> ChunkPlan:
    budgets = [group.rows.budgets[i] for i in group.members]
    planned = [
        plan.chunks(held, length, budget, spare, N, most)
        for held, length, budget in zip(group.held, group.lengths, budgets, strict=True)
    ]
    ends = [held for _, held in planned]
    several = spare > 0 or any(max(held) > budget for held, budget in zip(group.held, budgets, strict=True))
    count = max(len(chunks) for chunks, _ in planned)
    idle = [plan.Chunk(length, max(end), 0) for length, end in zip(group.lengths, ends, strict=True)]
    chunks = [of_row + [rest] * (count + 1 - len(of_row)) for (of_row, _), rest in zip(planned, idle, strict=True)]
    tokens = [max(of_row[i].tokens for of_row in chunks) for i in range(count)]
    left = [max(of_row[i + 1].held for of_row in chunks) for i in range(count)]
    return ChunkPlan(group.table(chunks), ends, tokens, left, several)


def evict(launches: Launches, group: Group, N: int, most: int, options: Options) -> RowResults:
    """Rows that evict, in chunks of `N` columns and at most `most` tokens; of the output only the batch's is filled."""
    rows, batch = group.rows, launches.batch
    planned = group.once(f"chunks of {N} and {most}", lambda: _planned(group, N, most, batch.spare))
    table, ends, count = planned.table, planned.ends, len(planned.tokens)

    slots, evictions = group.slots(N, numbers=True), []
    for i, n in enumerate(planned.tokens):
        shares = launches.shares(table[i], slots, n, N) if batch.rule.scored else batch.factor
        scanned = launches.scan(table[i], slots, shares, n, planned.several)
        launches.attend(table[i], slots, scanned.died, n)
        if options.trace:
            evictions.append(_trace(table[i], slots, scanned, batch.limits))
        if i + 1 < count or options.return_state:
            slots = launches.keep(table[i], slots, scanned, planned.left[i])

    state = None
    if options.return_state:
        S = slots.keys.shape[2]
        positions = slots.positions[:, :, :S].long()
        scores = slots.numbers[:, :, 0, :S].where(positions >= 0, 0)
        seen = rows.state.seen[group.index] + rows.length[group.index]
        state = EvictionState(positions=positions, scores=scores, keys=slots.keys, values=slots.values, seen=seen)
    return group.ran(batch.output, state, ends, evictions)


def _trace(table: Tensor, slots: ChunkSlots, scanned: Scanned, limits: Tensor) -> Tensor:
    """A chunk's evictions as `RowResults` has them; waits for the GPU."""
    row, head, column = ((scanned.died >= 0) & (scanned.died != NEVER)).nonzero(as_tuple=True)
    member, done, held, _ = (x[row] for x in table.long().unbind(1))
    came = limits[member, 0] + done + column - held
    position = torch.where(column < held, slots.positions[row, head, column], came)
    return torch.stack([member, head, done + scanned.died[row, head, column], position], 1)


def read(launches: Launches, group: Group, options: Options, *, alone: bool) -> RowResults:
    """Rows that evict nothing. `alone`: each by SDPA, without scores, from empty caches; else all in one launch."""
    rows, batch, T = group.rows, launches.batch, launches.batch.key.shape[1]
    slots = group.slots(max(map(max, group.held)), numbers=False)
    (B, K, S), device, scores = slots.positions.shape, batch.key.device, None
    if alone:
        _sdpa(batch, group, options.scale)
    else:
        scored = options.return_state and batch.rule.scored
        held = [max(h) for h in group.held]
        chunks = [[plan.Chunk(0, h, n)] for h, n in zip(held, group.lengths, strict=True)]
        table = group.once("prompts", lambda: group.table(chunks))[0]
        inside = torch.arange(S, device=device) < table[:, 2, None]
        died = torch.where((slots.positions < 0) & inside[:, None], -1, NEVER).int()
        sums = torch.empty(B, K, batch.query.shape[3], T, device=device) if scored else None
        launches.attend(table, slots, died, T, sums)
        if sums is not None:
            powers = rows.once(
                "powers",
                lambda: (rows.forgetting_factor.double()[:, None] ** torch.arange(T + 1, device=device)).float(),
            )
            scores = torch.zeros(B, K, S + T, device=device)
            scores[:, :, :S] = group.state.scores[:, :, :S]
            launches.received(table, slots, died, sums, powers, scores)
    ends = [[h + n for h in held] for held, n in zip(group.held, group.lengths, strict=True)]
    state = _read_state(group, slots, scores, max(1, *map(max, ends))) if options.return_state else None
    return group.ran(batch.output, state, ends, [])


def _sdpa(batch: Batch, group: Group, scale: float) -> None:
    """Attention as the model itself would compute it. Each row is alone: a library's last bits depend on the batch."""
    K, G = batch.query.shape[2:4]
    for row, n in zip(group.members, group.lengths, strict=True):
        heads = batch.query[row, :n].flatten(1, 2), batch.key[row, :n], batch.value[row, :n]
        q, k, v = (x.transpose(0, 1)[None] for x in heads)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=G > 1)
        batch.output[row, :n] = out[0].transpose(0, 1).unflatten(1, (K, G))


def _read_state(group: Group, slots: ChunkSlots, scores: Tensor | None, most: int) -> EvictionState:
    """Slots, then the new tokens; `scores` [B, K, S + T]."""
    rows, index, T = group.rows, group.index, group.rows.key.shape[2]
    seen, length = rows.state.seen[index], rows.length[index]
    (B, K, S), offset = slots.positions.shape, torch.arange(T, device=index.device)
    new = torch.where(offset < length[:, None], seen[:, None] + offset, -1)[:, None].expand(B, K, T)
    positions = torch.cat([slots.positions.long(), new], 2)
    if scores is None:
        scores = torch.zeros(positions.shape, device=index.device)
        scores[:, :, :S] = group.state.scores[:, :, :S]
    keys, values = (torch.cat([old, x[index]], 2) for old, x in ((slots.keys, rows.key), (slots.values, rows.value)))
    state = EvictionState(positions=positions, scores=scores, keys=keys, values=values, seen=seen + length)
    if S > 0:
        return state.compact(most)
    state = state.trim(most)  # in order already
    if min(group.lengths) == most:
        return state
    empty = state.positions[..., None] < 0
    return replace(state, keys=state.keys.masked_fill(empty, 0), values=state.values.masked_fill(empty, 0))
