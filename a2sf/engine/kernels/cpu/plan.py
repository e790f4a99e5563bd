"""The order in which the CPU kernel runs segments, and the memory that takes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from a2sf.engine.checks import check_segments
from a2sf.engine.kernels.cpu import run as cpu_run
from a2sf.engine.kernels.cpu.run import Program
from a2sf.engine.kernels.cpu.simd import LANES
from a2sf.engine.kernels.cpu.state import whole
from a2sf.engine.state import Segments

LEAST_BLOCK, LARGEST_BLOCK = 4, 32
"""Tokens per block: more means longer matrix products, and more slots that are empty at a time."""


@dataclass(frozen=True)
class KernelPlan:
    """Segments in the order they are run, and the memory that takes.

    Attributes:
        program: depth-first, the tree with most work first.
        left: int64 [trees], tokens plus segments of each tree.
        tokens: of all trees.
        slots, block: the most slots and the largest block of any segment.
        buffers: states that a tree needs at a time.
        final_slots: the most tokens cached at the end of a segment.
        final: how many segments' states are returned.
        rows, columns: how many the segments need.
    """

    program: Program
    left: np.ndarray
    tokens: int
    slots: int
    block: int
    buffers: int
    final_slots: int
    final: int = 0
    rows: int = 0
    columns: int = 0


def make_plan(segments: Segments, start: Tensor | None, return_state: bool) -> KernelPlan:
    if start is not None:
        return _make_plan(segments, start.tolist(), return_state)
    return segments.once(("CPU plan", return_state), lambda: _make_plan(segments, None, return_state))


def _make_plan(segments: Segments, start: list[int] | None, return_state: bool) -> KernelPlan:
    """`start` is how many tokens each parentless segment's given state holds."""
    columns = (segments.row, segments.start, segments.length, segments.parent)
    row, first, length, parent = (x.tolist() for x in columns)
    budget, recent, sinks = (x.tolist() for x in (segments.budget, segments.recent, segments.sinks))
    needed = check_segments(row, first, length, parent, budget)
    count, spare = segments.count, segments.schedule.spare
    returned = [True] * count if segments.final is None else segments.final.tolist()
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
        need = whole(held[i] + LEAST_BLOCK if evicts else held[i])
        block[i] = min(LARGEST_BLOCK, need - held[i]) if evicts else LARGEST_BLOCK
        slots, most = max(slots, need), max(most, min(block[i], length[i]))
        if returned[i]:
            final_slots = max(final_slots, held[i])
        work[i] = length[i] * (held[i] + LANES)
    # scores matter where some later eviction has a choice
    scored = [return_state] * count
    for i in reversed(range(count)):
        scored[i] |= held[i] >= budget[i] + spare and recent[i] + sinks[i] < budget[i]
        if parent[i] >= 0:
            scored[parent[i]] |= scored[i]
            work[parent[i]] += work[i]

    # which of the returned states is the segment's; -1: it is not returned
    places = itertools.count()
    final = [next(places) if is_returned else -1 for is_returned in returned]
    order: list[int] = []
    steps: list[tuple[int, ...]] = []
    tree_first, left, buffers = [0], [], 1
    origin = {root: cpu_run.EMPTY if start is None else cpu_run.GIVEN - at for at, root in enumerate(roots)}
    for root in sorted(roots, key=lambda i: -work[i]):
        stack = [(root, origin[root], 0)]
        while stack:
            i, source, target = stack.pop()
            buffers = max(buffers, target + 1)
            rule = (budget[i], recent[i], sinks[i], block[i], int(scored[i] and segments.rule.scored))
            order.append(i)
            steps.append((final[i], row[i], first[i], length[i], source, target, *rule))
            if children[i]:
                # the last child continues in its parent's state, the others in a copy of it
                stack.append((children[i][-1], target, target))
                stack.extend((child, target, target + 1) for child in reversed(children[i][:-1]))
        left.append(sum(step[cpu_run.LENGTH] + 1 for step in steps[tree_first[-1] :]))
        tree_first.append(len(steps))
    program = Program(
        np.array(tree_first, np.int64),
        np.array(steps, np.int64).reshape(-1, 11),
        segments.forgetting_factor[order].float().numpy(),
    )
    return KernelPlan(
        program,
        np.array(left, np.int64),
        sum(length),
        whole(slots),
        max(most, 1),
        buffers,
        final_slots,
        sum(returned),
        *needed,
    )
