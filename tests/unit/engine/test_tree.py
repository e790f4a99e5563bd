"""Trees of segments as batches of rows: little padding, and the same numbers however the rows are divided."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2sf import Schedule, make_policy
from a2sf.engine import tree
from a2sf.engine.eviction import reference
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Options, Segments
from a2sf.engine.stepwise import attend_torch
from tests.tiers import examples


def wasted(batches: list[list[int]], lengths: list[int]) -> float:
    padded = sum(len(batch) * max(1, *(lengths[i] for i in batch)) for batch in batches)
    return 1 - sum(lengths) / padded


@settings(max_examples=examples(50), deadline=None)
@given(lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=60))
def test_batches_hold_every_segment_once_and_little_padding(lengths):
    batches = tree._batches(list(range(len(lengths))), lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batch == sorted(batch) for batch in batches)
    if wasted(batches, lengths) > tree.PADDED:
        for batch in batches:
            by_length = sorted((lengths[i] for i in batch), reverse=True)
            saved = [(len(batch) - at) * (by_length[0] - n) for at, n in enumerate(by_length)]
            assert max(saved) < tree.WORTHWHILE


def test_long_rows_beside_many_short_ones_waste_a_tenth_at_most():
    draw = random.Random(0)
    lengths = [draw.randint(20, 60) for _ in range(1500)] + [draw.randint(3000, 4000) for _ in range(20)]
    assert wasted([list(range(len(lengths)))], lengths) > 0.9
    batches = tree._batches(list(range(len(lengths))), lengths)
    assert wasted(batches, lengths) <= tree.PADDED
    assert len(batches) <= 5


def test_rows_of_similar_length_are_one_batch():
    assert tree._batches([3, 1, 2], [0, 90, 100, 95]) == [[1, 2, 3]]
    assert len(tree._batches(list(range(40)), [5] * 39 + [100])) == 1  # little to save


@pytest.mark.parametrize("attend", [attend_torch, reference])
@pytest.mark.parametrize("name", ["h2o", "keydiff", "keyformer"])
@pytest.mark.parametrize("continued", [False, True])
def test_how_rows_are_divided_changes_nothing(attend, name, continued, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    length, parent = [3, 20, 7, 12, 1, 0, 25, 9], [-1, -1, 0, 0, 1, 1, 5, -1]
    policy = make_policy(name)
    retention = BatchRetention.of([policy.keeps(6, 0, 1, None, None)] * len(length), Schedule())
    starts = torch.tensor(length).cumsum(0) - torch.tensor(length)
    segments = {"row": torch.zeros_like(starts), "start": starts, "length": torch.tensor(length)}

    def tensors(rows: int, tokens: int) -> list[torch.Tensor]:
        return [torch.randn(rows, heads, tokens, 8, generator=generator) for heads in (4, 2, 2)]

    before, new = tensors(3, 4), tensors(1, sum(length))
    options = Options(8**-0.5, return_state=True, trace=True)
    found = []
    for worthwhile in (tree.WORTHWHILE, 1):
        monkeypatch.setattr(tree, "WORTHWHILE", worthwhile)
        state = None
        if continued:
            rows = Segments.of_rows(retention.select(torch.arange(3)), torch.tensor([2, 4, 3]))
            state = attend(*before, rows, options).state
        tree_ = Segments(**retention.retention(), **segments, parent=torch.tensor(parent))
        found.append(attend(*new, tree_, options, state))
        levels = next(value for key, value in vars(tree_)["_made"].items() if key[0] == "levels")
        assert (len(levels) > len({level.depth for level in levels})) == (worthwhile == 1)
    one, several = found
    torch.testing.assert_close(several.output, one.output, rtol=1e-6, atol=1e-6)
    assert several.evicted.equal(one.evicted)
    assert {tuple(c) for c in several.cuts.tolist()} == {tuple(c) for c in one.cuts.tolist()}
    assert several.state.positions.equal(one.state.positions)
    for key, value in one.state.tensors().items():
        torch.testing.assert_close(several.state.tensors()[key], value, rtol=1e-6, atol=1e-6)
