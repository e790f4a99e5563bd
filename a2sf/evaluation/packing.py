"""Many token sequences in one row, each common beginning computed once.

Sequences that begin alike share a segment as far as their caches are certain to be equal: all the way if their retention
is the same in every layer (and their prompts as long, where the schedule looks at it), else as long as nothing depends on
it (invariants 4 and 6 of docs/semantics.md; `a2sf.evaluation.untouched`). What is left is
a forest of segments, laid end to end in one row without padding; position ids say where in its own sequence a token is.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

SHARE_AT_LEAST = 8
"""Shorter common beginnings ("Question:") are computed again: sharing them would chain unrelated documents together."""


@dataclass(frozen=True)
class Item:
    """A sequence to read.

    Attributes:
        tokens: its token ids.
        key: equal for sequences whose caches evolve alike (same retention in every layer, same prompt).
        certain: tokens after which the state is the same whatever the key; 0: it is to share nothing.
    """

    tokens: tuple[int, ...]
    key: Hashable
    certain: int


@dataclass
class Pack:
    """One forward pass: a forest of segments in one row.

    Attributes:
        tokens, positions: int64 [N], the row.
        start, length, parent: per segment; parents come before children, -1 for none.
        owner: per segment, the index (in `items`) of a sequence that runs through it.
        items: indices of the sequences read here, as given to `pack`.
        path: per sequence, the segments it runs through, in order.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    path: list[list[int]] = field(default_factory=list)

    def last(self, which: int, n: int) -> np.ndarray:
        """Where in the row the last `n` tokens of sequence `which` (an index into `items`) are, int64 [n]."""
        found: list[np.ndarray] = []
        for segment in reversed(self.path[which]):
            end = self.start[segment] + self.length[segment]
            found.append(np.arange(max(self.start[segment], end - n), end))
            n -= len(found[-1])
            if n == 0:
                break
        return np.concatenate(found[::-1]) if found else np.empty(0, np.int64)


def pack(items: Sequence[Item], *, max_tokens: int, max_items: int | None = None) -> Iterator[Pack]:
    """Read `items` in as few computed tokens as sharing allows, in rows of about `max_tokens`.

    A row is cut where sequences have little in common if that is near, and never inside a sequence, so a row may be
    longer: by one tree's overhang, or by one sequence that is longer than `max_tokens` itself.

    Args:
        items: the sequences.
        max_tokens: computed tokens per row.
        max_items: sequences per row; None: no limit.
    """
    order = sorted(range(len(items)), key=lambda i: items[i].tokens)
    row: list[int] = []
    size = 0
    for at, i in enumerate(order):
        shared = _common(items[order[at - 1]].tokens, items[i].tokens) if row and items[i].certain else 0
        new = len(items[i].tokens) - (shared if shared >= SHARE_AT_LEAST else 0)
        room = max_tokens if shared < SHARE_AT_LEAST else 1.25 * max_tokens
        if shared >= max_tokens and (once := _certain(items[order[at - 1]], items[i], shared)) >= max_tokens:
            new, room = len(items[i].tokens) - once, once + room  # to read it once more would cost more than a row
        if row and (size + new > room or len(row) == max_items):
            yield _build(items, row)
            row, size = [], 0
            new = len(items[i].tokens)
        row.append(i)
        size += new
    if row:
        yield _build(items, row)


def _build(items: Sequence[Item], row: list[int]) -> Pack:
    """`row`: indices of items, in the order of their tokens."""
    made = Pack(items=row)
    path_of: dict[int, list[int]] = {}
    group = [row[0]]
    for previous, i in pairwise(row):
        if _common(items[previous].tokens, items[i].tokens) < SHARE_AT_LEAST:
            _grow(made, path_of, items, group, [])
            group = []
        group.append(i)
    _grow(made, path_of, items, group, [])
    made.path = [path_of[i] for i in row]
    return made


def _grow(made: Pack, path_of: dict[int, list[int]], items: Sequence[Item], group: list[int], above: list[int]) -> None:
    """Add the segment that all of `group` begin with after the segments `above`, then what follows it."""
    depth = sum(made.length[s] for s in above)
    first, last = items[group[0]], items[group[-1]]
    end = _common(first.tokens, last.tokens)  # in sorted order the outermost two differ first
    keys = {items[i].key for i in group}
    if len(keys) > 1:
        end = min(end, min(items[i].certain for i in group))
    path = above
    if end > depth:
        made.parent.append(above[-1] if above else -1)
        made.start.append(len(made.tokens))
        made.length.append(end - depth)
        made.owner.append(group[0])
        made.tokens.extend(first.tokens[depth:end])
        made.positions.extend(range(depth, end))
        path = [*above, len(made.start) - 1]

    # sequences whose cache is full by now go on only with their like; the others part where their tokens do
    parts: dict[Hashable, list[int]] = {}
    for i in group:
        item = items[i]
        if len(item.tokens) == end:
            path_of[i] = path
        else:
            full = item.key if len(keys) > 1 and item.certain <= end else None
            parts.setdefault((full, item.tokens[end]), []).append(i)
    for part in parts.values():
        _grow(made, path_of, items, part, path)


def _certain(a: Item, b: Item, common: int) -> int:
    """How many of the `common` first tokens of two sequences are computed once."""
    return common if a.key == b.key else min(common, a.certain, b.certain)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return len(os.path.commonprefix([a, b]))  # type: ignore[list-item]  # works for any sequences
