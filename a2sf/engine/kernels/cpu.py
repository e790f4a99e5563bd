"""The eviction recursion on the CPU: `attend_cpu` for whole sequences, `SlotCache` to go on token by token.

Both lay out work for the compiled functions of `cpu_run` and `cpu_step`. A work item is one tree of segments (a row is
one as well) and one KV head.
Time is O(T * C * D), memory O(C * D) per KV head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a2sf.engine.kernels import cpu_run
from a2sf.engine.kernels.bounds import check_fits, check_lengths, check_segments, check_state, check_tensors, per_token
from a2sf.engine.kernels.cpu_memory import allocate, make_scratch
from a2sf.engine.kernels.cpu_run import Given, Program
from a2sf.engine.kernels.cpu_simd import LANES
from a2sf.engine.kernels.cpu_state import COUNT, SEEN, Call, Scratch, Shape, Store
from a2sf.engine.kernels.cpu_threads import in_threads
from a2sf.engine.levels import traced
from a2sf.engine.state import Attended, EvictionState, Options, Segments
from a2sf.policies.rule import ACCUMULATED, Rule

LEAST_BLOCK, LARGEST_BLOCK = 4, 32
"""Tokens per block: more means longer matrix products, and more slots that are empty at a time."""
LEAST_WORK = 1_000_000
"""Multiplications that are worth waking a second thread."""
ITEMS_PER_THREAD = 4
"""With fewer work items than this, items are handed between threads (a quota) instead of run in one go."""


def attend_cpu(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: Options, state: EvictionState | None = None
) -> Attended:
    """The recursion, compiled; the contract of `a2sf.engine.eviction.reference` for CPU tensors that are not float64."""
    check_tensors(query, key, value)
    B, H, T, D = query.shape
    K, V = key.shape[1], value.shape[-1]
    if state is not None:
        check_state(state, int((segments.parent < 0).sum()), K, D, V, segments.rule)
    start = None if state is None else (state.positions >= 0).sum(-1).amax(-1)
    plan = _plan(segments, start, options.return_state)
    if plan.rows > B or plan.columns > T:
        raise ValueError(f"segments of {plan.rows} rows and {plan.columns} columns are not among the {B} and {T} given")
    most = 1 + segments.schedule.spare
    if start is not None and options.trace:
        most = max(most, 1 + int((start - segments.budget[segments.parent < 0]).max()))
    asked = _asked(segments.rule) | {"spare": segments.schedule.spare, "most": most}
    shape = Shape(K, H // K, D, V, plan.slots, plan.slots, plan.block, **asked)

    whole = plan.tokens == B * T
    output = (torch.empty if whole else torch.zeros)(B, T, H, V)
    evicted = torch.full((B, K, T, most), -1, dtype=torch.int32) if options.trace else _NO_TRACE
    call = _call(query, key, value, output, evicted, options.scale, segments.rule, _positions(segments, state, B, T))
    given = _canonical(state, segments.rule) if state is not None else _NONE
    final, final_state = _NONE, None
    if options.return_state:
        final_state = _empty_state(segments.count, K, plan.final_slots, D, V)
        final = _canonical(final_state)

    items, threads = plan.left.size * _items(shape), _threads(plan, shape)
    hand_over = threads > 1 and items < ITEMS_PER_THREAD * threads
    quota = max(plan.block, int(plan.tokens * _items(shape) / threads / 16)) if hand_over else 0
    heads = K if shape.shared else 1
    states = allocate((items if hand_over else threads) * plan.buffers * heads, shape)
    _run(threads, quota, plan, shape, call, states, make_scratch(threads, shape), given, final)
    if final_state is not None:
        final_state = _in_order(final_state)
    output = output.transpose(1, 2).to(query.dtype)
    if not options.trace:
        return Attended(output, final_state)
    row, head, column, e = (evicted >= 0).nonzero(as_tuple=True)
    gone = torch.stack([row, head, column, evicted[row, head, column, e].long()], 1)
    return Attended(output, final_state, *traced(gone, (B, K, T)))


class SlotCache:
    """Caches of a batch of rows in memory allocated once, for reading a sequence token by token or in short chunks.

    Besides `slots` cached tokens per KV head there is room for the token being read, rounded up to 16 slots in all.

    Args:
        rows, heads, group: B, K and H // K.
        slots: the largest budget of any row, or the longest sequence where that is less.
        D, V: sizes of keys and values.
        rule: how tokens are ranked.
        spare: tokens that may be cached beyond the budget before some are evicted; `slots` counts them.
    """

    def __init__(
        self,
        rows: int,
        heads: int,
        group: int,
        slots: int,
        D: int,
        V: int,
        rule: Rule = ACCUMULATED,
        spare: int = 0,
    ) -> None:
        self.rule = rule
        room = slots + 1 if slots >= 128 else -(-(slots + 1) // LANES) * LANES  # of few slots, some more do not matter
        self._shape = Shape(heads, group, D, V, -(-room // LANES) * LANES, room, LARGEST_BLOCK, spare, **_asked(rule))
        self._states = allocate(rows * heads, self._shape)
        self._scratch, self._scratch_of = make_scratch(1, self._shape._replace(block=1)), (1, 1)

    @property
    def rows(self) -> int:
        return len(self._states.counters) // self._shape.heads

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._states)

    @property
    def seen(self) -> Tensor:
        """Tokens read so far, int64 [B]."""
        return torch.from_numpy(self._states.counters[:: self._shape.heads, SEEN].copy())

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        budget: int | Tensor,
        recent: int | Tensor,
        sinks: int | Tensor = 0,
        forgetting_factor: float | Tensor,
        scale: float | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Read the next tokens of every row; arguments as in `a2sf.evicting_attention`, output [B, H, T, V].

        Raises:
            ValueError: if a row needs more slots than there are.
        """
        shape, B, T, D = self._shape, self.rows, query.shape[2], query.shape[3]
        check_fits(query, key, value, B, shape)
        room = shape.room
        length, limit = (np.broadcast_to(np.asarray(x), B) for x in (T if lengths is None else lengths, budget))
        check_lengths(length, limit, T)
        limit = limit + self._shape.spare
        after = self._states.counters[:: self._shape.heads, COUNT] + length
        need = np.minimum(after, limit + 1)
        if need.max() > room:
            raise ValueError(f"a row needs {need.max()} slots and the cache has {room}")
        block = np.minimum(np.where(after > limit, room - limit, T), self._shape.block)
        output = torch.zeros(B, T, query.shape[1], value.shape[-1])
        fixed = self.rule.weight is not None or self.rule.bias is not None
        positions = self.seen[:, None, None] + torch.arange(T) if fixed else None
        scale = D**-0.5 if scale is None else scale
        call = _call(query, key, value, output, _NO_TRACE, scale, self.rule, positions)
        self._run(length, 0, call, factor=forgetting_factor, rule=(budget, recent, sinks, block))
        return output.transpose(1, 2).to(query.dtype)

    def state(self) -> EvictionState:
        """What is cached, in canonical form."""
        shape, most = self._shape, max(1, int(self._states.counters[:, COUNT].max(initial=0)))
        state = _empty_state(self.rows, shape.heads, most, shape.D, shape.V)
        self._run(0, 0, final=_canonical(state))
        return _in_order(state)

    def load(self, state: EvictionState, forgetting_factor: Tensor | float = 1.0) -> None:
        """Take over a state of as many rows; the factor is that of what was read, for a rule that divides by age."""
        shape = self._shape
        check_state(state, self.rows, shape.heads, shape.D, shape.V, self.rule)
        if int((state.positions >= 0).sum(-1).max()) > shape.room:
            raise ValueError(f"the state holds more tokens than the cache's {self._shape.room} slots")
        self._run(0, cpu_run.GIVEN - np.arange(self.rows), given=_canonical(state, self.rule), factor=forgetting_factor)

    def reorder(self, rows: Tensor) -> None:
        """Keep `rows` in that order; a row may be taken several times (beam search)."""
        pick, B = rows.numpy(), self.rows
        before, self._states = self._states, allocate(len(pick) * self._shape.heads, self._shape)
        for new, old in zip(self._states, before, strict=True):
            new.reshape(-1)[:] = old.reshape(B, old.size // B)[pick].reshape(-1)

    def _run(
        self,
        length: np.ndarray | int,
        source: np.ndarray | int,
        call: Call | None = None,
        given: Given | None = None,
        final: Given | None = None,
        factor: Tensor | float = 1.0,
        rule: tuple[Any, ...] = (1, 0, 0, 1),
    ) -> None:
        """One segment per row that goes on in the row's states, unless `source` says otherwise."""
        B, shape = self.rows, self._shape
        steps = torch.empty((B, 11), dtype=torch.int64).numpy()
        scored = int(self.rule.scored)
        for i, column in enumerate((np.arange(B), np.arange(B), 0, length, source, 0, *rule, scored)):
            steps[:, i] = column
        factors = torch.empty(B).numpy()
        factors[:] = factor
        left = steps[:, cpu_run.LENGTH] + 1
        block = max(1, int(steps[:, cpu_run.BLOCK].max(initial=1)))
        plan = _Plan(Program(np.arange(B + 1), steps, factors), left, int(left.sum()), shape.slots, block, 1, 0)
        # a quota, so that every item has states of its own; large enough to run it in one go
        quota = int(left.max(initial=1))
        threads, shape = _threads(plan, shape), shape._replace(block=block)
        if self._scratch_of != (threads, block):  # kept, because a step of one token takes less time than making it
            self._scratch, self._scratch_of = make_scratch(threads, shape), (threads, block)
        given, final = given or _NONE, final or _NONE
        _run(threads, quota, plan, shape, call or _NO_CALL, self._states, self._scratch, given, final)


def _threads(plan: _Plan, shape: Shape) -> int:
    work = plan.tokens * shape.heads * shape.group * (shape.D + shape.V) * shape.slots
    return min(plan.left.size * _items(shape), torch.get_num_threads()) if work > LEAST_WORK else 1


def _items(shape: Shape) -> int:
    """Work items of a tree: heads run by themselves, or side by side where they keep the same tokens."""
    return 1 if shape.shared else shape.heads


def _run(
    threads: int,
    quota: int,
    plan: _Plan,
    shape: Shape,
    call: Call,
    states: Store,
    scratch: Scratch,
    given: Given,
    final: Given,
) -> None:
    left = np.repeat(plan.left, _items(shape))
    at = np.zeros((left.size, 2), np.int64)
    at[:, 0] = np.repeat(plan.program.first[:-1], _items(shape))
    busy = np.zeros(left.size, np.int64)
    work = (quota, plan.buffers, plan.program, shape, call, states, scratch, given, final, at, left, busy)
    in_threads(lambda thread: cpu_run.run(thread, *work), threads)


def _asked(rule: Rule) -> dict[str, int]:
    """What a rule asks of the kernel, as fields of `Shape`."""
    return {
        "counted": int(rule.counted),
        "by_age": int(rule.by_age),
        "weighted": int(rule.weight is not None),
        "biased": int(rule.bias is not None),
        "shared": int(rule.shared),
    }


def _fixed(rule: Rule, key: Tensor, value: Tensor, positions: Tensor) -> list[Tensor]:
    """`m` and `b` of tokens, float32; empty where the rule has none."""
    key, value = key.detach().float(), value.detach().float()
    fs = (rule.weight, rule.bias)
    made = (_NO_NUMBERS if f is None else per_token(f(key, value, positions), key) for f in fs)
    return [x.float().contiguous() for x in made]


def _positions(segments: Segments, state: EvictionState | None, rows: int, tokens: int) -> Tensor | None:
    """int64 [B, 1, T], the position of every packed token; None where the rule does not ask for it."""
    if segments.rule.weight is None and segments.rule.bias is None:
        return None
    at, end = torch.zeros(rows, 1, tokens, dtype=torch.int64), [0] * segments.count
    seen = iter(() if state is None else state.seen.tolist())
    columns = (segments.row, segments.start, segments.length, segments.parent)
    for i, (row, start, length, parent) in enumerate(zip(*(x.tolist() for x in columns), strict=True)):
        first = end[parent] if parent >= 0 else next(seen, 0)
        end[i] = first + length
        at[row, 0, start : start + length] = torch.arange(first, end[i])
    return at


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    evicted: Tensor,
    scale: float,
    rule: Rule = ACCUMULATED,
    positions: Tensor | None = None,
) -> Call:
    """`output` is float32 [B, T, H, V], `evicted` int32 [B, K, T, most] or empty, both contiguous; `positions` [B, 1, T]."""
    (q, q_strides), (k, k_strides), (v, v_strides) = (_flat(x) for x in (query, key, value))
    strides = np.array((q_strides, k_strides, v_strides), np.int64)
    scale_2 = np.float32(scale * math.log2(math.e))
    fixed = (_NO_NUMBERS,) * 2 if positions is None else _fixed(rule, key, value, positions.expand(*key.shape[:3]))
    weight, bias = (x.reshape(-1).numpy() for x in fixed)
    return Call(
        q, k, v, strides, output.view(-1).numpy(), evicted.view(-1).numpy(), weight, bias, query.shape[2], scale_2
    )


def _flat(x: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """The memory that `x` lies in as one dimension, float32, and its strides but the last, which is 1."""
    x = x.detach().float()
    if x.stride(-1) != 1:
        x = x.contiguous()
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.as_strided((span,), (1,)).numpy(), x.stride()[:3]


def _empty_state(rows: int, K: int, slots: int, D: int, V: int) -> EvictionState:
    return EvictionState(
        positions=torch.full((rows, K, slots), -1),
        scores=torch.zeros(rows, K, slots),
        keys=torch.zeros(rows, K, slots, D),
        values=torch.zeros(rows, K, slots, V),
        seen=torch.empty(rows, dtype=torch.int64),
    )


def _in_order(state: EvictionState) -> EvictionState:
    """Slots sorted by position, empty ones last, and no more of them than are needed."""
    most = max(1, int((state.positions >= 0).sum(-1).max())) if state.positions.numel() else 1
    order = state.positions.where(state.positions >= 0, 2**62).argsort(-1)[..., :most]
    keys, values = (x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (state.keys, state.values))
    return EvictionState(state.positions.gather(2, order), state.scores.gather(2, order), keys, values, state.seen)


def _canonical(state: EvictionState, rule: Rule = ACCUMULATED) -> Given:
    scores, keys, values = (x.detach().float().contiguous().numpy() for x in (state.scores, state.keys, state.values))
    weights, biases = (
        x.reshape(state.positions.shape if x.numel() else (0, 0, 0)).numpy()
        for x in _fixed(rule, state.keys, state.values, state.positions)
    )
    positions, seen = (x.contiguous().numpy() for x in (state.positions, state.seen))
    return Given(positions, scores, keys, values, seen, weights, biases)


_NO_NUMBERS = torch.empty(0)
_NONE = _canonical(_empty_state(0, 1, 0, 1, 1))
_NO_TRACE = torch.empty(0, dtype=torch.int32)
_NO_TOKENS = torch.empty(0, 1, 1, 1)
_NO_CALL = _call(_NO_TOKENS, _NO_TOKENS, _NO_TOKENS, _NO_TOKENS, _NO_TRACE, 1.0)


@dataclass(frozen=True)
class _Plan:
    """Segments in the order they are run, and the memory that takes.

    Attributes:
        program: depth-first, the tree with most work first.
        left: int64 [trees], tokens plus segments of each tree.
        tokens: of all trees.
        slots, block: the most slots and the largest block of any segment.
        buffers: states that a tree needs at a time.
        final_slots: the most tokens cached at the end of a segment.
        rows, columns: how many the segments need.
    """

    program: Program
    left: np.ndarray
    tokens: int
    slots: int
    block: int
    buffers: int
    final_slots: int
    rows: int = 0
    columns: int = 0


def _plan(segments: Segments, start: Tensor | None, return_state: bool) -> _Plan:
    if start is not None:
        return _make_plan(segments, start.tolist(), return_state)
    plans = segments.__dict__.setdefault("_cpu_plans", {})  # one object serves every layer of a model
    if return_state not in plans:
        plans[return_state] = _make_plan(segments, None, return_state)
    return plans[return_state]


def _make_plan(segments: Segments, start: list[int] | None, return_state: bool) -> _Plan:
    """`start` is how many tokens each parentless segment's given state holds."""
    columns = (segments.row, segments.start, segments.length, segments.parent)
    row, first, length, parent = (x.tolist() for x in columns)
    budget, recent, sinks = (x.tolist() for x in (segments.budget, segments.recent, segments.sinks))
    needed = check_segments(row, first, length, parent, budget)
    count, spare = segments.count, segments.schedule.spare
    children: list[list[int]] = [[] for _ in range(count)]
    roots: list[int] = []
    held, block, work = [0] * count, [0] * count, [0] * count
    slots = final_slots = most = 1
    for i in range(count):
        before = held[parent[i]] if parent[i] >= 0 else start[len(roots)] if start is not None else 0
        (children[parent[i]] if parent[i] >= 0 else roots).append(i)
        evicts = before + length[i] > budget[i] + spare
        held[i] = max(before, budget[i] + spare) if evicts else before + length[i]
        # the block depends on the segment's own budget alone, so that a row's rounding does not depend on other rows
        need = -(-(held[i] + LEAST_BLOCK) // LANES) * LANES if evicts else -(-held[i] // LANES) * LANES
        block[i] = min(LARGEST_BLOCK, need - held[i]) if evicts else LARGEST_BLOCK
        slots, final_slots, most = max(slots, need), max(final_slots, held[i]), max(most, min(block[i], length[i]))
        work[i] = length[i] * (held[i] + LANES)
    # scores matter where some later eviction has a choice
    scored = [return_state] * count
    for i in reversed(range(count)):
        scored[i] |= held[i] >= budget[i] + spare and recent[i] + sinks[i] < budget[i]
        if parent[i] >= 0:
            scored[parent[i]] |= scored[i]
            work[parent[i]] += work[i]

    steps: list[tuple[int, ...]] = []
    tree_first, left, buffers = [0], [], 1
    origin = {root: cpu_run.EMPTY if start is None else cpu_run.GIVEN - at for at, root in enumerate(roots)}
    for root in sorted(roots, key=lambda i: -work[i]):
        stack = [(root, origin[root], 0)]
        while stack:
            i, source, target = stack.pop()
            buffers = max(buffers, target + 1)
            rule = (budget[i], recent[i], sinks[i], block[i], int(scored[i] and segments.rule.scored))
            steps.append((i, row[i], first[i], length[i], source, target, *rule))
            if children[i]:
                # the last child goes on in its parent's state, the others work on a copy of it
                stack.append((children[i][-1], target, target))
                stack.extend((child, target, target + 1) for child in reversed(children[i][:-1]))
        left.append(sum(step[cpu_run.LENGTH] + 1 for step in steps[tree_first[-1] :]))
        tree_first.append(len(steps))
    order = [step[cpu_run.SEGMENT] for step in steps]
    program = Program(
        np.array(tree_first, np.int64),
        np.array(steps, np.int64).reshape(-1, 11),
        segments.forgetting_factor[order].float().numpy(),
    )
    slots = -(-slots // LANES) * LANES
    return _Plan(program, np.array(left, np.int64), sum(length), slots, max(most, 1), buffers, final_slots, *needed)
