"""`EvictionState` and `BatchRetention`: the one way to change a cache's state, and the one batch form of a retention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import EvictionState, Segments
from a2sf.errors import UserError
from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.rule import Cut, Rule
from a2sf.policies.schedule import Schedule


def state(positions: list[list[list[int]]], memory: bool = False) -> EvictionState:
    """Keys, values and scores are multiples of the positions, so that it shows where each went; 9 where a slot is empty."""
    at = torch.tensor(positions)
    numbers = at.where(at >= 0, 9).float()
    return EvictionState(
        positions=at,
        scores=numbers,
        keys=numbers[..., None] * torch.tensor([1.0, 10.0]),
        values=numbers[..., None] * torch.tensor([2.0, 20.0, 200.0]),
        seen=torch.full((len(at),), 12),
        memory=numbers[..., None] * 3 if memory else None,
    )


@pytest.mark.parametrize("memory", [False, True])
def test_compact_sorts_by_position_and_clears_what_is_empty(memory):
    got = state([[[5, -1, 2, 8], [-1, -1, 3, 1]]], memory).compact()
    assert got.positions.tolist() == [[[2, 5, 8], [1, 3, -1]]]
    assert got.scores.tolist() == [[[2, 5, 8], [1, 3, 0]]]
    assert got.keys[0, 1].tolist() == [[1, 10], [3, 30], [0, 0]]
    assert got.values[0, 0, 2].tolist() == [16, 160, 1600]
    assert (got.memory is not None) == memory
    assert got.memory is None or got.memory[0, 1, :, 0].tolist() == [3, 9, 0]
    assert state([[[5, -1, 2, 8]]]).compact(2).positions.tolist() == [[[2, 5]]]


@pytest.mark.parametrize("spare", [0, 3])
def test_compact_of_sorted_slots_clears_what_is_empty_and_changes_nothing_else(spare):
    one = state([[[1, 4, 6], [2, 3, -1]]], memory=True).pad(3 + spare)
    before = {name: x.clone() for name, x in one.tensors().items()}
    got = one.compact()
    assert got.positions.tolist() == [[[1, 4, 6], [2, 3, -1]]]
    assert got.scores.tolist() == [[[1, 4, 6], [2, 3, 0]]]
    assert got.keys[0, 1].tolist() == [[2, 20], [3, 30], [0, 0]]
    assert got.keys.untyped_storage().nbytes() == got.keys.nbytes  # no longer a part of the larger one
    assert all(torch.equal(x, before[name]) for name, x in one.tensors().items())


def test_compact_without_a_token():
    assert state([[[-1, -1]]]).compact().positions.tolist() == [[[-1]]]
    assert state([[[]]]).compact().positions.shape == (1, 1, 0)


def test_evict_leaves_the_others_in_order():
    out = torch.tensor([[[True, False, False], [False, False, True]]])
    got = state([[[1, 4, 6], [2, 3, 7]]]).evict(out)
    assert got.positions.tolist() == [[[4, 6], [2, 3]]]
    assert got.counts.tolist() == [[2, 2]]


def test_trim_is_a_view_and_contiguous_frees_the_rest():
    untrimmed = state([[[1, 4, -1, -1], [2, -1, -1, -1]]])
    got = untrimmed.trim()
    assert (got.most, got.positions.shape[-1]) == (2, 2)
    assert got.keys.data_ptr() == untrimmed.keys.data_ptr()
    own = got.contiguous()
    assert own.keys.untyped_storage().nbytes() == own.keys.nbytes
    assert own.nbytes == sum(x.nbytes for x in own.tensors().values())
    assert state([[[-1, -1]]]).trim().positions.shape[-1] == 1  # never without a slot


def test_one_row_has_memory_of_its_own():
    several = state([[[1, 4, -1, -1], [2, -1, -1, -1]], [[1, 2, 3, 4], [2, 3, 4, 5]]], memory=True)
    got = several.row(0)
    assert got.positions.tolist() == [[[1, 4], [2, -1]]]
    assert got.seen.tolist() == [12]
    for name, x in several.select(torch.tensor([0])).trim().tensors().items():
        one = got.tensors()[name]
        assert torch.equal(one, x), name
        assert one.untyped_storage().nbytes() == one.nbytes, name


def test_empty_slots_that_hold_what_is_not_finite_are_cleared():
    one = state([[[5, -1, 2, 8], [-1, -1, 3, 1]]], memory=True)
    for name in ("keys", "values", "memory"):
        one.tensors()[name][one.positions < 0] = torch.nan
    for sorted_already in (False, True):
        got = (one.compact().pad(4) if sorted_already else one).compact()
        assert got.positions.tolist() == [[[2, 5, 8], [1, 3, -1]]]
        assert all(not x[0, 1, 2].any() for n, x in got.tensors().items() if n in ("keys", "values", "memory"))


def test_rows_and_heads_of_several_states_are_joined():
    a, b = state([[[1, 4], [2, 3]]], memory=True), state([[[5, 6, 7], [0, 8, 9]]], memory=True)
    rows = EvictionState.stack([a, b])
    assert rows.positions.tolist() == [[[1, 4, -1], [2, 3, -1]], [[5, 6, 7], [0, 8, 9]]]
    assert not rows.memory[0, :, 2:].any()
    heads = EvictionState.join_heads([a, b], torch.tensor([3, 0, 1, 2]))
    assert heads.positions.tolist() == [[[0, 8, 9], [1, 4, -1], [2, 3, -1], [5, 6, 7]]]
    assert heads.seen.tolist() == [12]
    assert EvictionState.stack([a]) is a


def test_a_function_that_remembers_nothing_has_an_empty_memory():
    own = Rule(priority_fn=lambda step: step.scores)
    assert state([[[1]]]).for_rule(own).memory.shape == (1, 1, 1, 0)
    assert state([[[1]]]).for_rule(Rule()).memory is None
    full = state([[[1]]], memory=True)
    assert full.for_rule(replace(own, memory=1)) is full


ROWS = [Retention(budget=4, recent=2, sinks=1, forgetting_factor=0.5), Retention(budget=9)]


def test_numbers_of_rows():
    made = BatchRetention.of(ROWS, Schedule("every", every=3), [5, 6])
    numbers = [x.tolist() for x in (made.budget, made.recent, made.sinks, made.forgetting_factor)]
    assert numbers == [[4, 9], [2, 0], [1, 0], [0.5, 1.0]]
    assert (made.prompt, made.most) == (None, 11)  # no prompt under this schedule; two more than the budget
    turned = made.select(torch.tensor([1, 0, 1]))
    assert turned.budget.tolist() == [9, 4, 9]
    assert BatchRetention.of([]).budget.shape == (0,)
    segments = Segments.of_rows(made, torch.tensor([3, 4]))
    assert (segments.rule, segments.schedule, segments.parent.tolist()) == (made.rule, made.schedule, [-1, -1])
    with pytest.raises(UserError, match="other rules at other budgets"):
        BatchRetention.of([ROWS[0], replace(ROWS[1], rule=Rule(shared=True))])


def test_what_is_retained_after_a_prompt():
    looking_back = Rule(cut=Cut(kernel_size=3), weight=lambda k, v, p: p)
    once, steps = (BatchRetention.of(
        [replace(r, rule=looking_back) for r in ROWS], Schedule("prompt", then=then), [5, 6]
    ) for then in ("keep", "step"))  # fmt: skip
    assert once.prompts_read(torch.tensor([5, 6]))
    assert not once.prompts_read(torch.tensor([5, 5]))
    after = once.after_prompt()
    assert (after.budget.tolist(), after.rule, after.schedule) == ([UNLIMITED] * 2, Rule(scored=False), Schedule())
    after = steps.after_prompt()
    assert (after.budget.tolist(), after.rule.cut, after.rule.scored) == ([4, 9], None, False)
    assert after.rule.weight is looking_back.weight


def test_when_tokens_are_evicted():
    numbers = BatchRetention.of(ROWS, Schedule("prompt", then="step"), [3, 3]).per_head(2, torch.float32)
    count = torch.tensor([[[6], [2]], [[12], [9]]])
    for now, excess in ((1, [[0, 0], [0, 0]]), (2, [[2, 0], [3, 0]]), (7, [[2, 0], [3, 0]])):
        assert numbers.excess(count, torch.full((2, 1, 1), now))[..., 0].tolist() == excess
    positions = torch.arange(6).expand(2, 1, 6)
    free = numbers.unprotected(positions, positions < 5, torch.full((2, 1, 1), 4))
    assert free[:, 0].tolist() == [[False, True, True, False, False, False], [True] * 5 + [False]]
