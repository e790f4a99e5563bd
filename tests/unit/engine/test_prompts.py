"""Calls under the prompt schedule: many segments take about as many operations as one, and give the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from a2sf import Schedule, make_policy
from a2sf.engine.kernels import attend
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Attended, Options, Segments

KV_HEADS, GROUP, SIZE, BUDGET = 2, 2, 16, 8


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def forest(name: str, lengths: list[int], after: int, then: str) -> tuple[list[Tensor], Segments]:
    """Sequences in one row, each of which continues after its prompt; of each, the second half is a child of the first."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    tensors = [
        torch.randn(1, total, heads, SIZE, generator=generator).transpose(1, 2)
        for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    ]
    policy, schedule = make_policy(name), Schedule("prompt", then=then)
    stated = [policy.keeps(BUDGET, 0, 1, n - after, None) for n in lengths for _ in range(2)]
    length = torch.tensor([x for n in lengths for x in (n // 2, n - n // 2)])
    retention = BatchRetention.of(stated, schedule, [n - after for n in lengths for _ in range(2)])
    places = torch.arange(2 * len(lengths))
    segments = Segments(
        **retention.retention(),
        row=torch.zeros_like(places),
        start=length.cumsum(0) - length,
        length=length,
        parent=(places - 1).where(places % 2 == 1, -1),
    )
    return tensors, segments


def run(tensors: list[Tensor], segments: Segments, **options: bool) -> Attended:
    query, key, value = tensors
    return attend(query, key, value, segments, Options(SIZE**-0.5, **options), backend="numba")


@pytest.mark.parametrize("then", ["keep", "step"])
@pytest.mark.parametrize(
    ("name", "of_each"),
    [("h2o", 0), ("a2sf", 0), ("tova", 0), ("snapkv", 20)],  # snapkv: a product and what is made of it
)
def test_a_layer_takes_as_many_operations_for_many_prompts_as_for_one(name, of_each, then):
    operations_of = {}
    for several in (1, 16):
        tensors, segments = forest(name, [30 + i for i in range(several)], after=4, then=then)
        run(tensors, segments, return_state=True)  # what is made once for all layers
        with Operations() as operations:
            run(tensors, segments, return_state=True)
        operations_of[several] = operations.count
    assert operations_of[16] <= 1.1 * operations_of[1] + 2 * 15 * of_each, operations_of


@pytest.mark.parametrize("then", ["keep", "step"])
@pytest.mark.parametrize("name", ["h2o", "vatp", "snapkv", "pyramidkv", "keydiff"])
@pytest.mark.parametrize("after", [0, 5])
def test_a_sequence_has_the_same_numbers_whatever_is_read_beside_it(name, then, after):
    lengths = [30, 17, 41, 30]
    tensors, segments = forest(name, lengths, after, then)
    every = run(tensors, segments, return_state=True, trace=True)
    end = torch.tensor(lengths).cumsum(0).tolist()
    for i, n in enumerate(lengths):
        pick = torch.tensor([2 * i, 2 * i + 1])
        alone = Segments(
            **{k: v[pick] if isinstance(v, Tensor) else v for k, v in vars(segments).items() if k[0] != "_"}
        )
        alone.start.sub_(end[i] - n)
        alone.parent.copy_(torch.tensor([-1, 0]))
        ran = run([x[:, :, end[i] - n : end[i]] for x in tensors], alone, return_state=True, trace=True)
        assert ran.output.equal(every.output[:, :, end[i] - n : end[i]])
        of_row = every.state.select(pick).trim()
        for name_of, x in ran.state.tensors().items():
            assert x.equal(of_row.tensors()[name_of]), name_of
        assert ran.evicted.equal(every.evicted[:, :, end[i] - n : end[i]])
        mine = (every.cuts[:, 2] >= end[i] - n) & (every.cuts[:, 2] < end[i])
        shifted = every.cuts[mine] - torch.tensor([0, 0, end[i] - n, 0])
        assert ran.cuts.equal(shifted)


def test_nothing_waits_for_numbers_of_the_segments_twice(monkeypatch):
    """What follows from the segments alone is made once for all layers."""
    tensors, segments = forest("snapkv", [30, 40], after=4, then="keep")
    run(tensors, segments)
    split = next(value for key, value in vars(segments)["_made"].items() if key[0] == "split at prompts")
    made = dict(split.tables)
    assert made
    run(tensors, segments)
    assert list(split.tables.values()) == list(made.values())
    assert all(split.tables[key] is value for key, value in made.items())
