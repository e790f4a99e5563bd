"""Packing: every sequence is read in full, in order, and shared exactly as far as is certain."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from a2sf.scoring.passes.packing import SHARE_AT_LEAST, Item, Pack, pack

# few token ids, so that beginnings coincide
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=40).map(tuple)
items = st.lists(
    st.builds(
        lambda t, key, shareable: Item(t, key, shareable + 5 * key), tokens, st.integers(0, 2), st.integers(1, 12)
    ),
    min_size=1,
    max_size=20,
).map(lambda found: [Item(i.tokens, i.key, {0: 4, 1: 9, 2: 14}[i.key]) for i in found])


def read_along(row: Pack, which: int) -> tuple[list[int], list[int]]:
    """Tokens and positions of one sequence, along its path."""
    at = [p for s in row.path[which] for p in range(row.start[s], row.start[s] + row.length[s])]
    return [row.tokens[p] for p in at], [row.positions[p] for p in at]


@settings(max_examples=200, deadline=None)
@given(items=items, max_tokens=st.integers(1, 120), max_items=st.none() | st.integers(1, 5))
def test_every_sequence_is_read_once_in_full(items: Sequence[Item], max_tokens: int, max_items: int | None):
    seen = []
    for row in pack(items, max_tokens=max_tokens, max_items=max_items):
        assert max_items is None or len(row.items) <= max_items
        for which, i in enumerate(row.items):
            seen.append(i)
            got, positions = read_along(row, which)
            assert tuple(got) == items[i].tokens
            assert positions == list(range(len(got)))
            chain = row.path[which]
            assert [row.parent[s] for s in chain] == [-1, *chain[:-1]]
            assert row.last(which, len(got)).tolist() == [
                p for s in chain for p in range(row.start[s], row.start[s] + row.length[s])
            ]
        assert len(row.tokens) == sum(row.length)
        assert all(parent < segment for segment, parent in enumerate(row.parent))
    assert sorted(seen) == list(range(len(items)))


@settings(max_examples=200, deadline=None)
@given(items=items)
def test_sequences_of_different_keys_share_only_what_is_certain(items: Sequence[Item]):
    for row in pack(items, max_tokens=10_000):
        for a, i in enumerate(row.items):
            for b, j in enumerate(row.items):
                shared = sum(row.length[s] for s in set(row.path[a]) & set(row.path[b]))
                if items[i].key != items[j].key:
                    assert shared <= min(items[i].shareable, items[j].shareable)


def test_equal_keys_share_the_whole_beginning():
    context = tuple(range(30))
    (row,) = pack([Item((*context, 98), 0, 5), Item((*context, 99, 99), 0, 5), Item(context, 0, 5)], max_tokens=1000)
    assert len(row.tokens) == 33


def test_short_common_beginnings_do_not_chain_documents():
    start = tuple(range(SHARE_AT_LEAST - 1))
    (row,) = pack([Item((*start, 50, 51), 0, 99), Item((*start, 60, 61), 0, 99)], max_tokens=1000)
    assert row.parent == [-1, -1]


def test_the_choices_of_a_document_longer_than_a_row_share_its_context():
    context = tuple(range(100))
    (row,) = pack([Item((*context, 200 + i), 0, 5) for i in range(4)], max_tokens=20)
    assert len(row.tokens) == 104


def test_a_row_is_about_as_long_as_requested():
    many = [Item(tuple(range(i * 100, i * 100 + 50)), 0, 99) for i in range(20)]
    assert [len(row.tokens) for row in pack(many, max_tokens=200)] == [200] * 5
