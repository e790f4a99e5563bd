"""Tokens that a threshold leaves are counted: by scoring, in generation, and by a cache that reads the same tokens."""

from __future__ import annotations

import pytest
import torch
from lm_eval.api.instance import Instance

from a2sf import PrunedCache, make_policy
from a2sf.policies.schedule import Schedule
from a2sf.scoring.requests import Requests
from tests.parity.test_texts_together import GREEDY, PROMPTS, requests_of

SCHEDULES = ["step", "every4", "prompt", "prompt-step"]
DMS = {"by": {"name": "random", "seed": 5}, "threshold": 0.4, "window": 5}


def held(lm, schedule: Schedule, tokens: list[int], prompt: int) -> float:
    """Tokens that a bounded cache holds after it has read some, mean over layers and heads."""
    cache = PrunedCache(lm.model, make_policy("dms", **DMS), schedule=schedule, context_tokens=prompt)
    with torch.no_grad():
        lm.model(torch.tensor([tokens]), cache=cache)
    counts = [cache.state(i).counts.double().mean() for i in range(len(cache.layers))]
    return float(torch.stack(counts).mean())


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_count_of_a_request_is_what_a_cache_holds(lm, name):
    schedule = Schedule.named(name)
    system = lm.scorer.system(make_policy("dms", **DMS), None, schedule)
    pairs = [(p, c) for p in PROMPTS[:2] for c in ("xyz", "q")]
    made = [Instance("loglikelihood", {}, pair, 0, ("t", i, 1)) for i, pair in enumerate(pairs)]
    requests = Requests(lm, "loglikelihood", made)
    answers = lm.scorer.answers(system)
    full = lm.scorer.answers(lm.scorer.system(make_policy("full"), None))
    list(lm.scorer.score(requests, [answers, full]))
    assert answers.error is None
    shares = []
    for key, (prompt, continuation) in zip(requests.keys, pairs, strict=True):
        before = lm.tok_encode(prompt)
        read = [*before, *lm.tok_encode(continuation)][:-1]
        found = answers.computed[key].cached
        assert found == [pytest.approx(held(lm, schedule, read, len(before)))]
        shares.append(found[0] / len(read))
    lm.scorer.count(requests, answers)
    assert answers.counts.shares == pytest.approx(shares)
    assert answers.counts.cache_share == pytest.approx(sum(shares) / len(shares))
    assert 0 < min(shares) < max(shares) < 1
    assert full.computed[requests.keys[0]].cached is None  # numbers say it
    assert full.counts.shares == []


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_count_of_a_text_is_what_a_cache_holds(lm, name):
    schedule = Schedule.named(name)
    system = lm.scorer.system(make_policy("dms", **DMS), None, schedule)
    requests = requests_of(lm, GREEDY, PROMPTS[:3], new=9)
    answers = lm.scorer.answers(system)
    list(lm.scorer.score(requests, [answers]))
    assert answers.error is None
    for key, prompt in zip(requests.keys, PROMPTS, strict=False):
        before, found = lm.tok_encode(prompt), answers.computed[key]
        read = [*before, *found.tokens[:-1]]
        assert found.cached == [pytest.approx(held(lm, schedule, read, len(before)))]
    lm.scorer.count(requests, answers)
    assert len(answers.counts.shares) == 3


def test_texts_that_are_searched_by_beams_are_refused(lm):
    """A search reads tokens of sequences that it drops, so that what is cached at the end is not the text's."""
    system = lm.scorer.system(make_policy("dms", **DMS), None)
    requests = requests_of(lm, {**GREEDY, "num_beams": 2}, PROMPTS[:1], new=4)
    answers = lm.scorer.answers(system)
    list(lm.scorer.score(requests, [answers]))
    assert "policy=dms is not allowed: how many tokens its threshold leaves" in str(answers.error)
