"""Calls under the prompt schedule: many segments take about as many operations as one, and give the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from a2sf import Schedule, make_policy
from a2sf.engine.kernels import attend
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Attended, Options, Segments
from a2sf.policies.base import Retention
from a2sf.policies.rule import AttentionRows, Cut, Rule

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
@pytest.mark.parametrize("name", ["h2o", "vatp", "snapkv", "pyramidkv", "keydiff", "keyformer", "roco"])
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


STORING = [
    ("keyformer", {}),
    ("roco", {"recent": 2}),
    ("scissorhands", {"window": 50}),
    ("scissorhands", {"window": 400}),
]


@pytest.mark.parametrize(("name", "settings"), STORING)
@pytest.mark.parametrize("parts", ["of one token", "of all", "uneven"])
def test_what_is_stored_for_each_token_does_not_depend_on_the_parts_of_the_rows(name, settings, parts):
    """One method serves a step and many rows of a prompt at once."""
    tokens, seen = 130, 7  # as many were cached before
    generator = torch.Generator().manual_seed(1)
    positions = torch.arange(tokens + seen).expand(1, KV_HEADS, -1)
    logits = 2 * torch.randn(1, KV_HEADS, GROUP, tokens, tokens + seen, generator=generator, dtype=torch.float64)
    now = torch.arange(seen, tokens + seen)
    p = logits.masked_fill(positions[:, :, None, None] > now[:, None], -torch.inf).softmax(-1)
    rule = make_policy(name, **settings).keeps(BUDGET).rule

    def stored(ends: list[int]) -> Tensor:
        memory = torch.zeros(1, KV_HEADS, tokens + seen, rule.memory, dtype=torch.float64)
        for begin, end in zip([0, *ends], ends, strict=False):
            n = end + seen  # tokens that are cached by then
            rows = AttentionRows(
                p[:, :, :, begin:end, :n], positions[..., :n], now[None, None, begin:end], memory[:, :, :n]
            )
            memory[:, :, :n] = rule.memory_fn(rows)
        return memory

    steps = stored(list(range(1, tokens + 1)))
    ends = {"of one token": [*range(1, 60), tokens], "of all": [tokens], "uneven": [3, 67, 68, 129, tokens]}[parts]
    torch.testing.assert_close(stored(ends), steps, rtol=1e-12, atol=0)
    assert (steps[..., 0] != steps[..., :1, 0]).any()


@pytest.mark.parametrize(("name", "settings"), STORING)
@pytest.mark.parametrize("then", ["keep", "step", "every"])
def test_a_prompt_read_whole_stores_and_retains_what_one_read_token_by_token_does(name, settings, then):
    """In a batch, in two calls that end within prompts, and with a prompt longer than the rows that are computed at once."""
    schedule = Schedule("prompt", then=then, **({"every": 3} if then == "every" else {}))
    generator = torch.Generator().manual_seed(2)
    total, prompts = 90, torch.tensor([80, 60, 1])
    query, key, value = (
        torch.randn(3, heads, total, SIZE, generator=generator) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    )
    policy, called = make_policy(name, **settings), 0
    rule = policy.keeps(BUDGET).rule

    def remember(rows: AttentionRows) -> Tensor:
        nonlocal called
        called += 1
        return rule.memory_fn(rows)

    counting = replace(rule, memory_fn=remember)
    stated = [replace(policy.keeps(BUDGET), rule=counting)] * 3
    retention = BatchRetention.of(stated, schedule, prompts)
    calls, states = {}, {}
    for backend in ("numba", "torch"):
        called, state, states[backend] = 0, None, []
        for begin, end in ((0, 70), (70, total)):
            segments = Segments.of_rows(retention, torch.full((3,), end - begin), torch.full((3,), begin))
            options = Options(SIZE**-0.5, return_state=True)
            state = attend(query, key, value, segments, options, state, backend=backend).state
            states[backend].append(state)
        calls[backend] = called
    for whole, stepwise in zip(states["numba"], states["torch"], strict=True):
        assert torch.equal(whole.positions, stepwise.positions)
        torch.testing.assert_close(whole.memory, stepwise.memory, rtol=2e-5, atol=1e-6)
    assert states["torch"][0].memory[0].any()  # in the middle of its prompt
    if then == "keep":
        assert not states["torch"][1].memory.any()
        assert calls["numba"] == 3 + 1 + 1
        assert calls["torch"] == 80 + 2  # none after the prompts, and two cuts of one row beside others


@pytest.mark.parametrize("backend", ["reference", "torch", "numba"])
@pytest.mark.parametrize(("name", "settings"), [*STORING, ("rkv", {})])
def test_a_cut_that_nothing_follows_leaves_neither_memory_nor_queries(backend, name, settings):
    """Where the prompt is all that is read, no later call of the rule could see them."""
    generator, tokens = torch.Generator().manual_seed(3), 24
    query, key, value = (
        torch.randn(1, heads, tokens, SIZE, generator=generator) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    )
    policy = make_policy(name, **settings)
    states = []
    for prompt in (tokens, tokens + 1):
        retention = BatchRetention.of([policy.keeps(BUDGET)], Schedule("prompt"), torch.tensor([prompt]))
        segments = Segments.of_rows(retention, torch.tensor([tokens]))
        options = Options(SIZE**-0.5, return_state=True)
        states.append(attend(query, key, value, segments, options, backend=backend).state)
    after, before = states
    stored = [n for n in ("memory", "queries") if (x := getattr(before, n)) is not None and x.numel()]
    assert stored
    for kind in stored:
        assert getattr(before, kind).any()
        assert not getattr(after, kind).any()


@pytest.mark.parametrize("backend", ["reference", "torch", "numba"])
def test_stored_numbers_rank_tokens_where_other_priorities_divide_the_slots(backend):
    tokens, generator = 30, torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(1, heads, tokens, SIZE, generator=generator) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    )
    rule = Rule(
        cut=Cut(floor=0.0),
        memory=1,
        memory_fn=lambda rows: rows.memory + rows.probabilities.sum((2, 3))[..., None],
        priority_fn=lambda step: step.memory[..., 0],
        division_fn=lambda step: step.keys.norm(dim=-1),
    )
    retention = BatchRetention.of([Retention(budget=BUDGET, rule=rule)], Schedule("prompt"), [tokens])
    segments = Segments.of_rows(retention, torch.tensor([tokens]))
    options = Options(SIZE**-0.5, return_state=True)
    state = attend(query, key, value, segments, options, backend=backend).state
    logits = query.unflatten(1, (KV_HEADS, GROUP)) @ key[:, :, None].transpose(-1, -2) * SIZE**-0.5
    later = torch.ones(tokens, tokens).triu(1).bool()
    attention = logits.masked_fill(later, -torch.inf).softmax(-1).sum((2, 3))[0]
    longest = key[0].norm(dim=-1).flatten().topk(KV_HEADS * BUDGET).indices // tokens
    for head, ranks in enumerate(attention):
        slots = int((longest == head).sum())
        kept = [p for p in state.positions[0, head].tolist() if p >= 0]
        assert kept == sorted(ranks.topk(slots).indices.tolist())
