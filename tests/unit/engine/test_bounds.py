"""What does not fit the compiled CPU kernel raises before it reads or writes memory: it looks at nothing itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from a2sf.engine.kernels.cpu import SlotCache, attend_cpu
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import EvictionState, Options, Segments
from a2sf.policies.base import Retention
from a2sf.policies.rule import Rule

B, H, K, T, D, V = 2, 4, 2, 6, 8, 12
Q, KEY, VALUE = torch.randn(B, H, T, D), torch.randn(B, K, T, D), torch.randn(B, K, T, V)
OPTIONS = Options(0.3)
RULE = BatchRetention.of([Retention(budget=5, recent=1, forgetting_factor=0.5)] * B)


def segments(**change: list[int]) -> Segments:
    numbers = {"row": [0, 1], "start": [0, 0], "length": [T, T], "parent": [-1, -1], "budget": [4, 4]}
    given = {name: torch.tensor(x) for name, x in (numbers | change).items()}
    zero = torch.zeros_like(given["row"])
    return Segments(**given, recent=zero, sinks=zero, forgetting_factor=torch.ones(len(zero), dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"row": [0, 2]}, "3 rows and 6 columns are not among the 2 and 6"),
        ({"row": [0, -1]}, "begins before its row"),
        ({"start": [0, 1]}, "2 rows and 7 columns are not among the 2 and 6"),
        ({"start": [-1, 0]}, "begins before its row"),
        ({"length": [T, 600]}, "2 rows and 600 columns"),
        ({"length": [T, -1]}, "less than no token"),
        ({"parent": [1, -1]}, "a segment's parent must come before it"),
        ({"budget": [4, 0]}, "budget is less than a token"),
        ({"budget": [4]}, "of several lengths"),
    ],
)
def test_segments_of_another_pass(change, why):
    with pytest.raises(ValueError, match=why):
        attend_cpu(Q, KEY, VALUE, segments(**change), OPTIONS)
    attend_cpu(Q, KEY, VALUE, segments(), OPTIONS)


def test_segments_that_served_another_call():
    """One object serves every layer: what it needs is known, and compared with each call's tensors."""
    made = segments()
    attend_cpu(Q, KEY, VALUE, made, OPTIONS)
    for tensors in ((x[:1] for x in (Q, KEY, VALUE)), (x[:, :, :1] for x in (Q, KEY, VALUE))):
        with pytest.raises(ValueError, match="are not among"):
            attend_cpu(*tensors, made, OPTIONS)


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        (Q, KEY[:, :, :3], VALUE),
        (Q, KEY, VALUE[:, :, :3]),
        (Q, KEY[..., :4], VALUE),
        (Q, KEY[:1], VALUE),
        (Q, KEY, VALUE[:, :1]),
        (Q[:, :3], KEY, VALUE),
        (Q, KEY[:, :0], VALUE[:, :0]),
    ],
)
def test_tensors_that_do_not_fit_together(query, key, value):
    with pytest.raises(ValueError, match="do not fit together"):
        attend_cpu(query, key, value, segments(), OPTIONS)
    with pytest.raises(ValueError, match=r"do not fit together|not of this cache"):
        SlotCache(B, K, H // K, 5, D, V).attend(query, key, value, RULE)


def test_tokens_of_another_cache():
    cache = SlotCache(B, K, H // K, 5, D, V)
    for query, key, value in (
        (Q[:1], KEY[:1], VALUE[:1]),
        (torch.cat([Q, Q]), torch.cat([KEY, KEY]), torch.cat([VALUE, VALUE])),
        (torch.cat([Q, Q], 1), torch.cat([KEY, KEY], 1), torch.cat([VALUE, VALUE], 1)),
        (torch.cat([Q, Q], 1), KEY, VALUE),
        (torch.cat([Q, Q], 3), torch.cat([KEY, KEY], 3), VALUE),
        (Q, KEY, torch.cat([VALUE, VALUE], 3)),
    ):
        with pytest.raises(ValueError, match="are not of this cache: 2 rows, 2 KV heads for 2 query heads each"):
            cache.attend(query, key, value, RULE)
    cache.attend(Q, KEY, VALUE, RULE)
    assert cache.seen.tolist() == [T, T]


@pytest.mark.parametrize("lengths", [[T, T + 1], [-1, 2], [2, 3, 4]])
def test_lengths_beyond_the_tokens(lengths):
    """As in a pass that a failed call left behind."""
    cache = SlotCache(B, K, H // K, 5, D, V)
    with pytest.raises(ValueError, match=r"not among the 6|broadcast"):
        cache.attend(Q, KEY, VALUE, RULE, lengths=torch.tensor(lengths))
    with pytest.raises(ValueError, match="less than one"):
        cache.attend(Q, KEY, VALUE, replace(RULE, budget=torch.tensor([5, 0])))
    assert cache.seen.tolist() == [0, 0]


def test_states_of_another_shape():
    state = EvictionState.empty(KEY, VALUE)
    state = attend_cpu(Q, KEY, VALUE, segments(), replace(OPTIONS, return_state=True), state).state
    assert state is not None
    others = [
        state.select(torch.tensor([0])),
        state.heads(torch.tensor([0])),
        replace(state, keys=state.keys[..., :4]),
        replace(state, values=state.values[:, :, :2]),
        replace(state, scores=state.scores[:1]),
        replace(state, seen=state.seen[:1]),
    ]
    for other in others:
        with pytest.raises(ValueError, match="is not one of 2 rows, 2 KV heads"):
            attend_cpu(Q, KEY, VALUE, segments(), OPTIONS, other)
        with pytest.raises(ValueError, match="is not one of 2 rows, 2 KV heads"):
            SlotCache(B, K, H // K, 5, D, V).load(other)
    apart = replace(state, positions=torch.stack([torch.arange(4), torch.arange(1, 5)]).expand(2, -1, -1))
    with pytest.raises(ValueError, match="heads hold different ones"):
        attend_cpu(Q, KEY, VALUE, replace(segments(), rule=Rule(shared=True)), OPTIONS, apart)


def test_a_rule_that_gives_too_few_numbers():
    short = replace(segments(), rule=Rule(weight=lambda key, value, positions: key[:, :, :3].norm(dim=-1)))
    with pytest.raises(
        ValueError, match=r"weights of shape \(2, 2, 3\), and \(2, 2, 6\) is needed, one number per token"
    ):
        attend_cpu(Q, KEY, VALUE, short, OPTIONS)
    ones = replace(segments(), rule=Rule(weight=lambda key, value, positions: torch.ones(())))
    plain = attend_cpu(Q, KEY, VALUE, segments(), OPTIONS).output
    assert torch.equal(attend_cpu(Q, KEY, VALUE, ones, OPTIONS).output, plain)
