"""Packed sequences come out as each does alone, for every policy and schedule: what is shared is what is certain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a2sf import Budget, attend
from a2sf.engine.state import Options
from a2sf.hf.settings import retention_of
from a2sf.scoring.passes.full_cache_prefix import cached_tokens, full_cache_prefix, pruned_scores
from a2sf.scoring.passes.packing import pack
from a2sf.scoring.passes.sequences import PassSettings, ScoredSequence, pass_of
from baselines.full import Full
from tests.policies import cases, label, tiered
from tests.tiers import examples

LONGEST, HEADS, KV_HEADS, SIZE, LAYERS = 26, 4, 2, 4, 2
CASES = cases()
G = torch.Generator().manual_seed(11)
# of each token at each position, so that equal beginnings have equal vectors and nothing ties
QUERY = torch.randn(2, LONGEST, HEADS, SIZE, generator=G, dtype=torch.float64)
KEY, VALUE = torch.randn(2, 2, LONGEST, KV_HEADS, SIZE, generator=G, dtype=torch.float64)


GROWING = [Budget(ratio=ratio, base="seen") for ratio in (0.1, 0.3, 0.55, 0.9, 1.0)]
BUDGETS = st.one_of(st.integers(1, 20), st.sampled_from(GROWING))
"""A number of tokens, or a share of those seen."""


def given_to(policy, budget):
    """The budget as the policy can hold it."""
    return max(budget, policy.min_budget) if isinstance(budget, int) else budget


@st.composite
def requests(draw):
    """Sequences with a common beginning, each with a prompt and a budget."""
    start = draw(st.lists(st.integers(0, 1), min_size=9, max_size=20))
    made = []
    for _ in range(draw(st.integers(2, 5))):
        end = draw(st.lists(st.integers(0, 1), max_size=6))
        tokens = (start[: draw(st.integers(1, len(start)))] + end)[:LONGEST]
        made.append((tuple(tokens), draw(st.integers(1, len(tokens))), draw(BUDGETS)))
    return made


def vectors(tokens: list[int], positions: list[int]):
    """Query [1, H, T, D], key and value [1, K, T, D] of tokens at positions."""
    return [x[tokens, positions].transpose(0, 1)[None] for x in (QUERY, KEY, VALUE)]


def request(policy, schedule, tokens, prompt, budget) -> ScoredSequence:
    given = given_to(policy, budget)
    limit = (Budget(tokens=given) if isinstance(given, int) else given) if policy.uses_budget else None
    kept = retention_of(policy, limit, len(tokens), prompt, LAYERS, schedule)
    return ScoredSequence(tokens, (0,) * (len(tokens) + 1 - prompt), kept, schedule)


def check_packed_is_alone(drawn, max_tokens):
    """`drawn`: policy, schedule, tokens, prompt and budget of each request."""
    todo = [request(*a).simplest for a in drawn]
    seen = []
    for row in pack([r.item() for r in todo], max_tokens=max_tokens):
        seen += row.items
        # a layer without rotary embedding or projection, as for `attend`
        made = pass_of(
            row, todo, PassSettings(LAYERS, True, "torch", torch.device("cpu"), [None] * LAYERS, [None] * LAYERS)
        )
        for layer in range(LAYERS):
            packed = made.attend(layer, *vectors(row.tokens, row.positions), Options(SIZE**-0.5), None)
            for which, i in enumerate(row.items):
                policy, schedule, tokens, prompt, budget = drawn[i]
                alone, state = attend(
                    policy,
                    *vectors(list(tokens), list(range(len(tokens)))),
                    budget=given_to(policy, budget),
                    schedule=schedule,
                    prompt=prompt if schedule.prompt else None,
                    layer=layer,
                    layers=LAYERS,
                    backend="reference",
                )
                got = packed[:, :, torch.from_numpy(row.columns(which))]
                torch.testing.assert_close(got, alone, atol=1e-9, rtol=0)
                cached = (state.positions >= 0).sum(-1).double().mean()
                kept = request(*drawn[i]).retention[layer]
                expected = cached_tokens(kept, schedule, len(tokens), prompt, KV_HEADS)
                if kept.rule.threshold is None:
                    assert expected == pytest.approx(cached)
                else:  # tokens of a high priority stay
                    assert expected <= cached
    assert sorted(seen) == list(range(len(drawn)))


@pytest.mark.parametrize(("policy", "schedule"), tiered(CASES, each=1, turn=2), ids=label)
@settings(max_examples=examples(4), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=requests(), max_tokens=st.sampled_from([20, 1000]))
def test_packed_is_alone(policy, schedule, drawn, max_tokens):
    check_packed_is_alone([(policy, schedule, *a) for a in drawn], max_tokens)


@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=requests(), max_tokens=st.sampled_from([20, 1000]), data=st.data())
def test_rows_of_a_pass_may_follow_different_policies_and_schedules(drawn, max_tokens, data):
    ways = data.draw(st.lists(st.sampled_from(CASES), min_size=1, max_size=4))
    check_packed_is_alone([(*way, *a) for way in ways for a in drawn], max_tokens)


@pytest.mark.parametrize(("policy", "schedule"), tiered(CASES), ids=label)
@settings(max_examples=examples(2), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prompt=st.integers(1, 20), budget=st.one_of(st.integers(1, 24), st.sampled_from(GROWING)))
def test_scores_are_counted_as_pruned_exactly_where_attention_was_not_full(policy, schedule, prompt, budget):
    kept = request(policy, schedule, (0,) * LONGEST, prompt, budget).retention[0]
    budget = given_to(policy, budget)
    qkv = vectors([0] * LONGEST, list(range(LONGEST)))
    more = {
        "schedule": schedule,
        "prompt": prompt if schedule.prompt else None,
        "backend": "reference",
        "layers": LAYERS,
    }
    pruned, _ = attend(policy, *qkv, budget=budget, **more)
    full, _ = attend(Full(), *qkv, budget=None, backend="reference")
    differs = (pruned - full).abs().amax((0, 1, 3)) > 1e-9
    clean = full_cache_prefix([kept], schedule, prompt, KV_HEADS, total=LONGEST)
    expected, found = pruned_scores(LONGEST - prompt + 1, clean, prompt), int(differs[prompt - 1 :].sum())
    if kept.rule.threshold is None:
        assert expected == found
    else:  # the number as if every token that a threshold may evict were evicted
        assert expected >= found
