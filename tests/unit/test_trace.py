"""Traces: what follows from the evicted positions, on a case small enough to follow by hand."""

from __future__ import annotations

import numpy as np
import pytest

from a2sf.trace import Trace, load, overlap, picture, save

# a budget of 2: one layer, two KV heads; the first head drops the oldest, the second always drops the newest but one
EVICTED = np.array([[[-1, -1, 0, 1, 2], [-1, -1, 1, 2, 3]]], np.int32)
PIECES = ("a", " bee", " sea", "\n", " e")


def trace(evicted: np.ndarray = EVICTED) -> Trace:
    return Trace(3, PIECES, 4, evicted)


def test_kept_positions_at_every_step():
    kept = trace()
    assert [np.flatnonzero(kept.kept(t)[0, 0]).tolist() for t in range(5)] == [[0], [0, 1], [1, 2], [2, 3], [3, 4]]
    assert [np.flatnonzero(kept.kept(t)[0, 1]).tolist() for t in range(5)] == [[0], [0, 1], [0, 2], [0, 3], [0, 4]]
    assert np.array_equal(kept.kept(), kept.kept(4))


def test_ages_of_what_was_evicted():
    assert sorted(trace().ages(0)) == [1, 1, 1, 2, 2, 2]


def test_overlap_is_the_mean_jaccard_index():
    swapped = trace(EVICTED[:, ::-1])
    # both heads, steps 0 to 4: 1, 1, then one of three positions in common
    assert overlap(trace(), swapped) == pytest.approx([(1 + 1 + 3 / 3) / 5])
    assert overlap(trace(), trace()) == pytest.approx([1.0])
    with pytest.raises(ValueError, match="same document"):
        overlap(trace(), Trace(3, ("x", *PIECES[1:]), 4, EVICTED))


def test_a_file_gives_back_what_was_written(tmp_path):
    save(tmp_path / "t.npz", [trace(), Trace(7, ("é", "x"), 1, np.full((2, 1, 2), -1, np.int32))])
    first, second = load(tmp_path / "t.npz")
    assert (first.document, first.pieces, first.context) == (3, PIECES, 4)
    assert np.array_equal(first.evicted, EVICTED)
    assert (second.document, second.pieces, second.evicted.shape) == (7, ("é", "x"), (2, 1, 2))


def test_a_picture_has_a_row_per_policy(tmp_path):
    picture({"One": trace(), "Two $": trace()}, tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text()
    assert drawn.count("share of layers and heads") == 2
    with pytest.raises(ValueError, match="one document"):
        picture({}, tmp_path / "q.svg")
