"""Traces: what follows from the evicted positions, on a case small enough to follow by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from a2sf import evicting_attention
from a2sf.engine.state import Attended, Options
from a2sf.engine.trace import Trace, attention_mass, load, overlap, save, steps_of
from a2sf.errors import Notice
from a2sf.report.traced import picture

# a budget of 2: one layer, two KV heads; the first head drops the oldest, the second always drops the newest but one
EVICTED = np.array([[[-1, -1, 0, 1, 2], [-1, -1, 1, 2, 3]]], np.int32)
EVICTED_AT = np.array([[[2, 3, 4, 5, 5], [5, 2, 3, 4, 5]]], np.int32)  # the steps at which they went
RECEIVED = np.array([[[0.5, 1.5, 1.0, 1.0, 1.0], [2.0, 0.5, 1.0, 0.5, 1.0]]], np.float32)
LOST = np.array([[[0, 0, 0, 0.25, 0.5], [0, 0, 0, 0.75, 0]]], np.float32)
PIECES = ("a", " bee", " sea", "\n", " e")


def trace(evicted_at: np.ndarray = EVICTED_AT) -> Trace:
    return Trace(3, PIECES, 4, evicted_at, RECEIVED, LOST)


def test_kept_positions_at_every_step():
    kept = trace()
    assert [np.flatnonzero(kept.retained(t)[0, 0]).tolist() for t in range(5)] == [[0], [0, 1], [1, 2], [2, 3], [3, 4]]
    assert [np.flatnonzero(kept.retained(t)[0, 1]).tolist() for t in range(5)] == [[0], [0, 1], [0, 2], [0, 3], [0, 4]]
    assert np.array_equal(kept.retained(), kept.retained(4))


def test_ages_of_what_was_evicted():
    assert sorted(trace().ages(0)) == [1, 1, 1, 2, 2, 2]


def test_masses_of_what_was_evicted_go_with_their_ages():
    assert trace().masses(0).tolist() == [0.5, 1.5, 1.0, 0.5, 1.0, 0.5]
    (row,) = trace().summary().to_dict("records")
    assert row == {"evicted": 3, "age": 1.5, "mass": pytest.approx(5 / 6), "lost": pytest.approx(0.15)}


@pytest.mark.parametrize("heads", [2, 6])
def test_attention_behind_an_eviction_is_that_of_the_engine(heads):
    """Token by token through the engine: without forgetting, a score is the attention received so far."""
    g = torch.Generator().manual_seed(0)
    T, budget = 300, 40  # more than one chunk of queries
    q = torch.randn(1, heads, T, 16, generator=g)
    k, v = torch.randn(2, 1, 2, T, 16, generator=g)
    evicted, state, before = torch.full((1, 2, T), -1, dtype=torch.int32), None, None
    for t in range(T):
        new = (x[:, :, t : t + 1] for x in (q, k, v))
        _, state = evicting_attention(*new, budget=budget, recent=20, forgetting_factor=1.0, state=before)
        for head in range(2) if t >= budget else ():
            held = {*before.positions[0, head].tolist(), t} - {-1}
            (evicted[0, head, t],) = held - set(state.positions[0, head].tolist())
        before = state
    received, lost = attention_mass(q, k, steps_of(Attended(q, None, evicted)), Options(16**-0.5))
    at = state.positions.long()
    torch.testing.assert_close(received.gather(2, at), state.scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(received.sum(-1), torch.full((1, 2), T * heads / 2.0), atol=1e-2, rtol=0)

    full = (
        (q @ k.repeat_interleave(heads // 2, 1).transpose(2, 3) / 4)
        .tril()
        .masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    )
    early = evicted[0, 0, :200]
    expected = full[0, : heads // 2, 200].softmax(-1)[:, early[early >= 0].long()].sum(-1).mean()
    torch.testing.assert_close(lost[0, 0, 200], expected)
    assert lost[..., : budget + 1].abs().max() == 0


def test_overlap_is_the_mean_jaccard_index():
    swapped = trace(EVICTED_AT[:, ::-1])
    # both heads, steps 0 to 4: 1, 1, then one of three positions in common
    assert overlap(trace(), swapped) == pytest.approx([(1 + 1 + 3 / 3) / 5])
    assert overlap(trace(), trace()) == pytest.approx([1.0])
    with pytest.raises(ValueError, match="same document"):
        overlap(trace(), Trace(3, ("x", *PIECES[1:]), 4, EVICTED_AT, RECEIVED, LOST))


def test_a_file_gives_back_what_was_written(tmp_path):
    small = Trace(7, ("é", "x"), 1, np.full((2, 1, 2), 2, np.int32), np.ones((2, 1, 2)), np.zeros((2, 1, 2)))
    save(tmp_path / "t.npz", [trace(), small])
    first, second = load(tmp_path / "t.npz")
    assert (first.document, first.pieces, first.context) == (3, PIECES, 4)
    for name, expected in (("evicted_at", EVICTED_AT), ("received", RECEIVED), ("lost", LOST)):
        assert np.array_equal(getattr(first, name), expected)
    assert (second.document, second.pieces, second.evicted_at.shape) == (7, ("é", "x"), (2, 1, 2))


@pytest.mark.parametrize("first", [{"evicted_3": EVICTED}, {"gone_3": EVICTED_AT}])
def test_files_of_earlier_versions_are_read(tmp_path, first):
    arrays = {
        **first,
        "received_3": RECEIVED,
        "lost_3": LOST,
        "pieces_3": np.array(PIECES),
        "context_3": 4,
    }
    np.savez_compressed(tmp_path / "old.npz", documents=np.array([3]), **arrays)
    (old,) = load(tmp_path / "old.npz")
    assert np.array_equal(old.evicted_at, EVICTED_AT)


def test_earlier_names_keep_working():
    with pytest.warns(Notice, match="retained"):
        assert np.array_equal(trace().kept(2), trace().retained(2))
    with pytest.warns(Notice, match="evicted_at"):
        assert np.array_equal(trace().gone, EVICTED_AT)


def test_several_evictions_of_one_step():
    """A cut at step 3 that takes three tokens of one head and one of the other."""
    evicted = torch.full((1, 2, 5), -1, dtype=torch.int32)
    evicted[0, 1, 3] = 2
    cuts = torch.tensor([[0, 0, 3, 0], [0, 0, 3, 2], [0, 0, 3, 1]])
    evicted_at = steps_of(Attended(torch.empty(0), None, evicted, cuts))
    assert evicted_at.tolist() == [[[3, 3, 3, 5, 5], [5, 5, 3, 5, 5]]]
    cut = Trace(3, PIECES, 4, evicted_at.numpy(), RECEIVED, LOST)
    assert np.flatnonzero(cut.retained(3)[0, 0]).tolist() == [3]
    assert cut.ages(0).tolist() == [3, 2, 1, 1]
    assert cut.masses(0).tolist() == [0.5, 1.5, 1.0, 1.0]


def test_a_picture_has_a_row_per_policy(tmp_path):
    picture({"One": trace(), "Two $": trace()}, tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text()
    assert drawn.count("share of layers and heads") == 2
    with pytest.raises(ValueError, match="one document"):
        picture({}, tmp_path / "q.svg")
