"""Many token sequences in one row, each common beginning computed once.

Sequences with equal beginnings share a segment as far as the model's outputs are certain to be equal: over all their common
tokens if their caches evolve in the same way, else as long as no cache was pruned (invariants 4 and 6 of docs/semantics.md;
`a2sf.scoring.passes.full_cache_prefix`).
What is left is a forest of segments, laid end to end in one row without padding; position ids say where in its own sequence
a token is.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

SHARE_AT_LEAST = 8
"""Shorter common beginnings ("Question:") are computed again: sharing them would chain unrelated documents together."""
OVERHANG = 1.25
"""A row may be so many times as long as its limit, or as its longest sequence, rather than cut a tree."""


@dataclass(frozen=True)
class Item:
    """A sequence to read.

    Attributes:
        tokens: its token ids.
        key: equal for sequences whose outputs are equal wherever their tokens are.
        shareable: how many of its first tokens may be computed with sequences of other keys.
    """

    tokens: tuple[int, ...]
    key: Hashable
    shareable: int


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

    def columns(self, which: int) -> np.ndarray:
        """Where in the row the tokens of sequence `which` (an index into `items`) are, int64 [its length]."""
        return np.concatenate([np.arange(self.start[s], self.start[s] + self.length[s]) for s in self.path[which]])

    def last(self, which: int, n: int) -> np.ndarray:
        """The same of its last `n` tokens, int64 [n]."""
        columns = self.columns(which)
        return columns[max(0, len(columns) - n) :]


def pack(items: Sequence[Item], *, max_tokens: int, max_items: int | None = None) -> Iterator[Pack]:
    """Read `items` in as few computed tokens as sharing allows, in rows of about `max_tokens`; the longest come first.

    A row is cut where sequences have little in common if that is near, and never inside a sequence, so a row may be
    longer: by one tree's overhang, or by one sequence that is longer than `max_tokens` itself.

    Args:
        items: the sequences.
        max_tokens: computed tokens per row.
        max_items: sequences per row; None: no limit.
    """
    items = numbered(items)
    row: list[list[int]] = []
    size = count = 0
    for unit in sorted(_units(items), key=lambda unit: -max(len(items[i].tokens) for i in unit)):
        row.append([])
        for i, new in _in_order(items, unit):
            longest = max((len(items[j].tokens) for j in row[-1]), default=0)
            room = OVERHANG * max(max_tokens, longest) if row[-1] else max_tokens
            if count and (size + new > room or count == max_items):
                yield build(items, row)
                row, size, count = [[]], 0, 0
            size += new if row[-1] else len(items[i].tokens)
            row[-1].append(i)
            count += 1
    if count:
        yield build(items, row)


def in_order(row: Pack, groups: Sequence[Sequence[int]]) -> tuple[Pack, list[int]]:
    """The same row with the segments of a group's sequences (indices into `items`) before those of the next, the rest last.

    Groups share no segment. Also returned: the column at which each group ends.
    """
    group_of = {s: n for n, group in enumerate(groups) for which in group for s in row.path[which]}
    order = sorted(range(len(row.start)), key=lambda segment: group_of.get(segment, len(groups)))
    start, tokens, positions = list(row.start), list[int](), list[int]()
    ends = [0] * len(groups)
    for segment in order:
        columns = slice(row.start[segment], row.start[segment] + row.length[segment])
        start[segment] = len(tokens)
        tokens += row.tokens[columns]
        positions += row.positions[columns]
        if segment in group_of:
            ends[group_of[segment]] = len(tokens)
    return replace(row, start=start, tokens=tokens, positions=positions), ends


def numbered(items: Sequence[Item]) -> list[Item]:
    """The same with numbers for keys, which are compared often."""
    numbers: dict[Hashable, int] = {}
    return [Item(i.tokens, numbers.setdefault(i.key, len(numbers)), i.shareable) for i in items]


def build(items: Sequence[Item], trees: Sequence[list[int]]) -> Pack:
    """One row of `trees`, lists of indices of items; those of different trees share nothing."""
    made = Pack()
    path_of: dict[int, list[int]] = {}
    for tree in trees:
        if tree:
            ordered = sorted(tree, key=lambda i: items[i].tokens)
            path_of |= _grow(made, items, ordered)
            made.items += ordered
    made.path = [path_of[i] for i in made.items]
    return made


def _units(items: Sequence[Item]) -> list[list[int]]:
    """Indices of items, those with a common beginning together."""
    order = sorted(range(len(items)), key=lambda i: items[i].tokens)
    units = [order[:1]] if order else []
    for previous, i in pairwise(order):
        if _common(items[previous].tokens, items[i].tokens) < SHARE_AT_LEAST:
            units.append([])
        units[-1].append(i)
    return units


def _in_order(items: Sequence[Item], unit: list[int]) -> Iterator[tuple[int, int]]:
    """The items of a unit as a walk through their tree meets them, each with the tokens it adds to those before it."""
    tree = build(items, [unit])
    before: list[int] = []
    for path, i in sorted(zip(tree.path, tree.items, strict=True)):
        yield i, sum(tree.length[s] for s in path[_common(before, path) :])
        before = path


def _grow(made: Pack, items: Sequence[Item], ordered: list[int]) -> dict[int, list[int]]:
    """Add the tree of the items `ordered`, which are in the order of their tokens; each one's path, by its index.

    Segments come as a walk through the tree meets them.
    """
    path_of: dict[int, list[int]] = {}
    waiting: list[tuple[list[int], list[int], int]] = [(ordered, [], 0)]
    while waiting:
        group, above, depth = waiting.pop()
        first, last = items[group[0]], items[group[-1]]
        end = _common(first.tokens, last.tokens)  # in sorted order the outermost two differ first
        several = len({items[i].key for i in group}) > 1
        if several:
            end = min(end, min(items[i].shareable for i in group))
        path = above
        if end > depth:
            made.parent.append(above[-1] if above else -1)
            made.start.append(len(made.tokens))
            made.length.append(end - depth)
            made.owner.append(group[0])
            made.tokens.extend(first.tokens[depth:end])
            made.positions.extend(range(depth, end))
            path = [*above, len(made.start) - 1]

        # past their shareable prefix only sequences of one key stay together; others split where their tokens differ
        parts: dict[Hashable, list[int]] = {}
        for i in group:
            item = items[i]
            if len(item.tokens) == end:
                path_of[i] = path
            else:
                key = item.key if several and item.shareable <= end else None
                parts.setdefault((key, item.tokens[end]), []).append(i)
        waiting += [(part, path, end) for part in reversed(parts.values())]
    return path_of


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return len(os.path.commonprefix([a, b]))  # type: ignore[list-item]  # works for any sequences
