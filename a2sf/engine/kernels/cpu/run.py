"""The compiled workers of the CPU kernel: they run trees of segments, block by block, and copy, read and write states.

Compiled functions, here and in `step`, take what they share as named tuples (`state`), and numbers one by one: those of a
segment are columns of `Program.steps`, which no tuple needs to copy.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from a2sf.compat import numba
from a2sf.compat.numba import cached, inner, leaf
from a2sf.engine.kernels.cpu.simd import LANES, give, load, store, take
from a2sf.engine.kernels.cpu.state import COUNT, SEEN, TAINTED, USED, add_panel, padded
from a2sf.engine.kernels.cpu.step import block, block_together


class Program(NamedTuple):
    """Segments in depth-first order, grouped into trees."""

    first: Any  # int64 [trees + 1], each tree's first step
    steps: Any  # int64 [segments, 11], the columns named below
    factor: Any  # float32 [segments]


FINAL, ROW, START, LENGTH, SOURCE, TARGET, BUDGET, RECENT, SINKS, BLOCK, SCORED = range(11)
EMPTY, GIVEN = -1, -2
"""Values of SOURCE beside the buffer to copy: start empty, or from row `GIVEN - SOURCE` of the states that were given."""


@inner
def _begin(states, s):
    states.counters[s, COUNT] = states.counters[s, USED] = states.counters[s, SEEN] = states.counters[s, TAINTED] = 0


@leaf
def _copy_within(array, source, target, n):
    for i in range(0, n, LANES):
        store(array, target + i, load(array, source + i))


@inner
def _copy(states, source, target, shape):
    n, width = states.counters[source, USED] * LANES, padded(shape.V)
    a, b = source * shape.slots, target * shape.slots
    _copy_within(states.keys, a * shape.D, b * shape.D, n * shape.D)
    row = shape.room * width
    _copy_within(states.values, source * row, target * row, min(n, shape.room) * width)
    _copy_within(states.positions, a, b, n)
    _copy_within(states.scores, a, b, n)
    if shape.mean_over_age:
        _copy_within(states.terms, a, b, n)
    if shape.weighted:
        _copy_within(states.weights, a, b, n)
    if shape.biased:
        _copy_within(states.biases, a, b, n)
    for column in range(states.counters.shape[1]):
        states.counters[target, column] = states.counters[source, column]


@inner
def _import(states, s, shape, given, row, head, factor):
    """Start state `s` from a canonical state."""
    D, V, width = shape.D, shape.V, padded(shape.V)
    _begin(states, s)
    N = given.positions.shape[2]
    for i in range(N):
        if given.positions[row, head, i] < 0:
            break
        if i % LANES == 0:
            add_panel(states, s, shape)
        at = s * shape.slots + i
        states.positions[at] = given.positions[row, head, i]
        states.scores[at] = given.scores[row, head, i]
        if shape.mean_over_age:
            terms = given.seen[row] - given.positions[row, head, i]
            a = np.float64(factor)
            states.terms[at] = terms if a == 1 else -math.expm1(terms * math.log(a)) / (1 - a) if a > 0 else 1
        if shape.weighted:
            states.weights[at] = given.weights[row, head, i]
        if shape.biased:
            states.biases[at] = given.biases[row, head, i]
        clean = True
        for d in range(D):
            x = given.keys[row, head, i, d]
            clean &= np.isfinite(x)
            states.keys[(at - i % LANES) * D + d * LANES + i % LANES] = x
        for v in range(V):
            x = given.values[row, head, i, v]
            clean &= np.isfinite(x)
            states.values[(s * shape.room + i) * width + v] = x
        if not clean:
            states.counters[s, TAINTED] = 1
        states.counters[s, COUNT] += 1
    states.counters[s, SEEN] = given.seen[row]


@inner
def _export(states, s, shape, final, row, head):
    """Write state `s` to a canonical state whose slots are in no order yet; empty ones come last."""
    D, V, width, i = shape.D, shape.V, padded(shape.V), 0
    for slot in range(states.counters[s, USED] * LANES):
        at = s * shape.slots + slot
        if states.positions[at] < 0:
            continue
        final.positions[row, head, i] = states.positions[at]
        final.scores[row, head, i] = states.scores[at]
        for d in range(D):
            final.keys[row, head, i, d] = states.keys[(at - slot % LANES) * D + d * LANES + slot % LANES]
        for v in range(V):
            final.values[row, head, i, v] = states.values[(s * shape.room + slot) * width + v]
        i += 1
    final.seen[row] = states.counters[s, SEEN]


@inner
def _advance(program, shape, call, states, scratch, given, final, thread, item, base, buffers, at, left, quota):
    """Run work item `item` for about `quota` tokens; its states are `base`, `base + 1`, ...

    An item is a tree and a KV head, or a tree with all its heads where they share their tokens, `buffers` states for each.
    """
    heads = shape.heads if shape.shared else 1
    tree, head = (item, 0) if shape.shared else (item // shape.heads, item % shape.heads)
    # what other threads' numbers lie beside is written once, at the end
    i, done, rest = at[item, 0], at[item, 1], left[item]
    while i < program.first[tree + 1] and quota > 0:
        step, factor = program.steps[i], program.factor[i]
        s = base + step[TARGET]
        for h in range(heads):
            of_head = s + h * buffers
            if done != 0:
                break
            if step[SOURCE] == EMPTY:
                _begin(states, of_head)
            elif step[SOURCE] <= GIVEN:
                _import(states, of_head, shape, given, GIVEN - step[SOURCE], head + h, factor)
            elif step[SOURCE] != step[TARGET]:
                _copy(states, base + step[SOURCE] + h * buffers, of_head, shape)
        w = 0
        if done < step[LENGTH] and shape.shared:
            w = block_together(
                states, s, buffers, shape, call, scratch, thread, step[ROW], step[START] + done,
                min(step[BLOCK], step[LENGTH] - done), step[BUDGET], step[RECENT], step[SINKS], factor, step[SCORED] != 0,
            )  # fmt: skip
        elif done < step[LENGTH]:
            w = block(
                states, s, shape, call, scratch, thread, head, step[ROW], step[START] + done,
                min(step[BLOCK], step[LENGTH] - done), step[BUDGET], step[RECENT], step[SINKS], factor, step[SCORED] != 0,
            )  # fmt: skip
        done += w
        quota -= w
        rest -= w
        if done == step[LENGTH]:
            if final.seen.size and step[FINAL] >= 0:
                for h in range(heads):
                    _export(states, s + h * buffers, shape, final, step[FINAL], head + h)
            i += 1
            done = 0
            rest -= 1
    at[item, 0], at[item, 1], left[item] = i, done, rest


def _make_run(sources: int) -> Any:
    def run(thread, quota, buffers, program, shape, call, states, scratch, given, final, at, left, busy):
        """Run work items until none is left that another thread is not running.

        Without a quota a thread takes the next item and finishes it; each thread has `buffers` states. With a quota an
        item is put back after that many tokens, and the one with most left to do is taken next, so that two threads
        share three equal heads evenly; each item has states of its own.
        """
        first = 0
        while True:
            item = -1
            for i in range(first, busy.size):
                if busy[i] == 0 and (item < 0 or left[i] > left[item]):
                    item = i
                    if quota == 0:
                        break
            if item < 0 or left[item] == 0:
                return
            if quota == 0:
                first = item + 1
            if take(busy, item):
                base = (item if quota else thread) * buffers * (shape.heads if shape.shared else 1)
                limit = quota if quota else left[item]
                _advance(
                    program, shape, call, states, scratch, given, final, thread, item, base, buffers, at, left, limit
                )
                if quota:
                    give(busy, item)

    # numba looks only at this file to tell whether code on disk is out of date, and cannot read what names types that are
    # gone; so the files of each version have a name of their own
    run.__qualname__ = f"run_{sources:08x}"
    return cached(run)


_SOURCES = (Path(numba.__file__), *sorted(Path(__file__).parent.glob("*.py")))
run = _make_run(zlib.crc32(b"".join(p.read_bytes() for p in _SOURCES)))
