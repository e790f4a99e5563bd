"""A policy that reads prompts beforehand does so for a few requests, whose answers are computed before the next are read."""

from __future__ import annotations

from unittest import mock

import pytest

from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policies
from a2sf.policies.schedule import Schedule
from a2sf.scoring import scorer as module
from a2sf.scoring.lm import PrunedLM
from a2sf.scoring.requests import EncodedRequests
from tests.models import shared
from tests.stand_in import StandIn

PROMPTS = [[5 + i, *range(20, 20 + 9)] for i in range(6)]
ENCODED = [(("", ""), prompt, [40 + choice, 7, 8]) for prompt in PROMPTS for choice in range(3)]


@pytest.fixture
def lm(stand_in):
    return PrunedLM(shared("llama"), tokenizer=StandIn())


def scored(lm, policy: str, at_once: int) -> tuple[list[int], list[float]]:
    """After each pass, of how many prompts the numbers were prepared; the log-likelihoods in the end."""
    requests = EncodedRequests(lm, ENCODED)
    system = lm.scorer.system(find_policies()[policy](), Budget(ratio=0.5), Schedule("prompt"))
    answers = lm.scorer.answers(system)
    with (
        mock.patch.object(module, "PREPARED_AT_ONCE", at_once),
        mock.patch.object(module, "prepared_for", wraps=module.prepared_for) as prepared,
    ):
        after = [prepared.call_count for _ in lm.scorer.score(requests, [answers])]
    assert answers.error is None
    assert answers.share == 1
    return after, [answers.computed[key].value for key in requests.keys]


def test_an_interruption_loses_little_of_what_was_prepared(lm):
    whole, expected = scored(lm, "kvzip", 100)
    assert whole[0] == 6
    after, values = scored(lm, "kvzip", 4)  # the first four requests end in the second prompt, which is not divided
    assert sorted(set(after)) == [2, 4, 6]
    assert values == pytest.approx(expected, abs=1e-4)


def test_other_policies_are_computed_in_full_passes(lm):
    after, _ = scored(lm, "snapkv", 4)
    assert after == [0]
