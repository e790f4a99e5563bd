"""The eviction recursion on the CPU for whole sequences: lays out work for the compiled functions of `run` and `step`.

A work item is one tree of segments (a row is one as well) and one KV head.
Time is O(T * C * D), memory O(C * D) per KV head.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from a2sf.engine.checks import check_state, check_tensors
from a2sf.engine.kernels.cpu import run as cpu_run
from a2sf.engine.kernels.cpu.memory import (
    NO_STATE,
    NO_TRACE,
    allocate,
    as_arrays,
    empty_slots,
    make_call,
    make_scratch,
    rule_flags,
)
from a2sf.engine.kernels.cpu.plan import KernelPlan, make_plan
from a2sf.engine.kernels.cpu.state import FlatStates, Given, KernelCall, Scratch, Shape
from a2sf.engine.kernels.cpu.threads import in_threads
from a2sf.engine.state import Attended, EvictionState, Options, Segments
from a2sf.engine.tree import traced

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
    start = None if state is None else state.counts.amax(-1)
    plan = make_plan(segments, start, options.return_state)
    if plan.rows > B or plan.columns > T:
        raise ValueError(f"segments of {plan.rows} rows and {plan.columns} columns are not among the {B} and {T} given")
    most = 1 + segments.schedule.spare
    if start is not None and options.trace:
        most = max(most, 1 + int((start - segments.budget[segments.parent < 0]).max()))
    if options.trace and segments.final is not None:
        # where a model's budget grows, that of a layer may be smaller in the next phase
        smaller = segments.budget[segments.parent.clamp(min=0)] - segments.budget
        most += max([0, *smaller[segments.parent >= 0].tolist()])
    flags = rule_flags(segments.rule) | {"spare": segments.schedule.spare, "most": most}
    shape = Shape(K, H // K, D, V, plan.slots, plan.slots, plan.block, **flags)

    unpadded = plan.tokens == B * T
    output = (torch.empty if unpadded else torch.zeros)(B, T, H, V)
    evicted = torch.full((B, K, T, most), -1, dtype=torch.int32) if options.trace else NO_TRACE
    call = make_call(
        query, key, value, output, evicted, options.scale, segments.rule, _positions(segments, state, B, T)
    )
    given = as_arrays(state, segments.rule) if state is not None else NO_STATE
    final, final_state = NO_STATE, None
    if options.return_state:
        final_state = empty_slots(plan.final, K, plan.final_slots, D, V)
        final = as_arrays(final_state)

    items, threads = plan.left.size * _items(shape), threads_for(plan, shape)
    hand_over = threads > 1 and items < ITEMS_PER_THREAD * threads
    quota = max(plan.block, int(plan.tokens * _items(shape) / threads / 16)) if hand_over else 0
    heads = K if shape.shared else 1
    states = allocate((items if hand_over else threads) * plan.buffers * heads, shape)
    run_plan(plan, threads, quota, shape, Work(call, states, make_scratch(threads, shape), given, final))
    if final_state is not None:
        final_state = final_state.compact(cleared=True)
    output = output.transpose(1, 2).to(query.dtype)
    if not options.trace:
        return Attended(output, final_state)
    row, head, column, e = (evicted >= 0).nonzero(as_tuple=True)
    events = torch.stack([row, head, column, evicted[row, head, column, e].long()], 1)
    return Attended(output, final_state, *traced([events], (B, K, T), output.device))


class Work(NamedTuple):
    """What the compiled functions read and write beside the plan."""

    call: KernelCall
    states: FlatStates
    scratch: Scratch
    given: Given = NO_STATE
    final: Given = NO_STATE


def threads_for(plan: KernelPlan, shape: Shape) -> int:
    """How many threads run a plan."""
    work = plan.tokens * shape.heads * shape.group * (shape.D + shape.V) * shape.slots
    return min(plan.left.size * _items(shape), torch.get_num_threads()) if work > LEAST_WORK else 1


def _items(shape: Shape) -> int:
    """Work items of a tree: one per head, or one in all where the heads retain the same tokens."""
    return 1 if shape.shared else shape.heads


def run_plan(plan: KernelPlan, threads: int, quota: int, shape: Shape, work: Work) -> None:
    """Run all work items; `quota` is how many tokens of one a thread reads before it puts it back, 0: all."""
    left = np.repeat(plan.left, _items(shape))
    at = np.zeros((left.size, 2), np.int64)
    at[:, 0] = np.repeat(plan.program.first[:-1], _items(shape))
    busy = np.zeros(left.size, np.int64)
    given = (quota, plan.buffers, plan.program, shape, *work, at, left, busy)
    in_threads(lambda thread: cpu_run.run(thread, *given), threads)


def _positions(segments: Segments, state: EvictionState | None, rows: int, tokens: int) -> Tensor | None:
    """int64 [B, 1, T], the position of every packed token, -1 for padding; None where the rule does not need it."""
    if segments.rule.weight is None and segments.rule.bias is None:
        return None
    at = torch.full((rows, 1, tokens), -1)
    ends = segments.ends(() if state is None else state.seen.tolist())
    places = (x.tolist() for x in (segments.row, segments.start, segments.length))
    for row, start, length, end in zip(*places, ends, strict=True):
        at[row, 0, start : start + length] = torch.arange(end - length, end)
    return at
