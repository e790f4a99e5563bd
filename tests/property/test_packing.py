"""Packed sequences come out as each does alone, for every policy and schedule: what is shared is what is certain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a2sf import attend
from a2sf.engine import kernels
from a2sf.engine.eviction import Options
from a2sf.evaluation.packing import pack
from a2sf.evaluation.untouched import held, item, pruned_scores, untouched
from a2sf.hf.attention import Plan
from tests.policies import cases, label

LONGEST, HEADS, KV_HEADS, SIZE, LAYERS = 26, 4, 2, 4, 2
G = torch.Generator().manual_seed(11)
# of each token at each position, so that equal beginnings have equal vectors and nothing ties
QUERY = torch.randn(2, LONGEST, HEADS, SIZE, generator=G, dtype=torch.float64)
KEY, VALUE = torch.randn(2, 2, LONGEST, KV_HEADS, SIZE, generator=G, dtype=torch.float64)


@st.composite
def requests(draw):
    """Sequences that begin alike, each with a prompt and a budget."""
    start = draw(st.lists(st.integers(0, 1), min_size=9, max_size=20))
    made = []
    for _ in range(draw(st.integers(2, 5))):
        end = draw(st.lists(st.integers(0, 1), max_size=6))
        tokens = (start[: draw(st.integers(1, len(start)))] + end)[:LONGEST]
        made.append((tuple(tokens), draw(st.integers(1, len(tokens))), draw(st.integers(1, 20))))
    return made


def vectors(tokens: list[int], positions: list[int]):
    """Query [1, H, T, D], key and value [1, K, T, D] of tokens at positions."""
    return [x[tokens, positions].transpose(0, 1)[None] for x in (QUERY, KEY, VALUE)]


@pytest.mark.parametrize(("policy", "schedule"), cases(), ids=label)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(asked=requests(), max_tokens=st.sampled_from([20, 1000]))
def test_packed_is_alone(policy, schedule, asked, max_tokens):
    kept = [tuple(policy.keeps(max(C, policy.least_budget), i, LAYERS) for i in range(LAYERS)) for _, _, C in asked]
    items = [item(t, k, schedule, p, i) for i, ((t, p, _), k) in enumerate(zip(asked, kept, strict=True))]
    for row in pack(items, max_tokens=max_tokens):
        plan = Plan(
            row=[0] * len(row.start),
            start=row.start,
            length=row.length,
            parent=row.parent,
            retention=lambda s, layer, row=row: kept[row.owner[s]][layer],
            layers=LAYERS,
            schedule=schedule,
            prompt=lambda s, row=row: asked[row.owner[s]][1],
        )
        for layer in range(LAYERS):
            packed = kernels.attend(
                *vectors(row.tokens, row.positions), plan.segments(layer, None), Options(SIZE**-0.5), backend="torch"
            )
            for which, i in enumerate(row.items):
                tokens, prompt, budget = asked[i]
                alone, state = attend(
                    policy,
                    *vectors(list(tokens), list(range(len(tokens)))),
                    budget=max(budget, policy.least_budget),
                    schedule=schedule,
                    prompt=prompt if schedule.prompt else None,
                    layer=layer,
                    layers=LAYERS,
                    backend="reference",
                )
                got = packed.output[:, :, torch.from_numpy(row.last(which, len(tokens)))]
                torch.testing.assert_close(got, alone, atol=1e-9, rtol=0)
                cached = (state.positions >= 0).sum(-1).double().mean()
                assert held(kept[i][layer], schedule, len(tokens), prompt, KV_HEADS) == pytest.approx(cached)


@pytest.mark.parametrize(("policy", "schedule"), cases(), ids=label)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prompt=st.integers(1, 20), budget=st.integers(1, 24))
def test_scores_are_counted_as_pruned_exactly_where_attention_was_not_whole(policy, schedule, prompt, budget):
    budget = max(budget, policy.least_budget)
    kept = policy.keeps(budget)
    qkv = vectors([0] * LONGEST, list(range(LONGEST)))
    more = {"schedule": schedule, "prompt": prompt if schedule.prompt else None, "backend": "reference"}
    pruned, _ = attend(policy, *qkv, budget=budget, **more)
    full, _ = attend(policy, *qkv, budget=LONGEST, **more)
    differs = (pruned - full).abs().amax((0, 1, 3)) > 1e-9
    clean = untouched([kept], schedule, prompt, KV_HEADS)
    assert pruned_scores(LONGEST - prompt + 1, clean, prompt) == int(differs[prompt - 1 :].sum())
