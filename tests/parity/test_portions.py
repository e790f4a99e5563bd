"""A policy that reads prompts beforehand does so for a few requests, whose answers are computed before the next are read."""

from __future__ import annotations

from unittest import mock

import pytest
from lm_eval.api.instance import Instance

from a2sf.errors import PolicyError
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policies
from a2sf.policies.schedule import Schedule
from a2sf.scoring import scorer as module
from a2sf.scoring.lm import PrunedLM
from a2sf.scoring.requests import EncodedRequests, Requests
from a2sf.scoring.scorer import Scorer
from tests.models import shared
from tests.stand_in import StandIn

PROMPTS = [[5 + i, *range(20, 20 + 9)] for i in range(6)]
ENCODED = [(("", ""), prompt, [40 + choice, 7, 8]) for prompt in PROMPTS for choice in range(3)]


@pytest.fixture
def lm(stand_in):
    return PrunedLM(shared("llama"), tokenizer=StandIn())


def scored(lm, policy: str, at_once: int) -> tuple[list[int], list[float]]:
    """After each pass, of how many prompts the numbers were prepared; the log-likelihoods in the end."""
    requests, scorer = EncodedRequests(lm, ENCODED), Scorer(lm)
    answers = scorer.answers(scorer.system(find_policies()[policy](), Budget(ratio=0.5), Schedule("prompt")))
    with (
        mock.patch.object(module, "PREPARED_AT_ONCE", at_once),
        mock.patch.object(module, "prepared_for", wraps=module.prepared_for) as prepared,
    ):
        after = [prepared.call_count for _ in scorer.score(requests, [answers])]
    assert answers.error is None
    assert answers.share == 1
    return after, [answers.computed[key].value for key in requests.keys]


def test_an_interruption_loses_little_of_what_was_prepared(lm):
    whole, expected = scored(lm, "kvzip", 100)
    assert whole[0] == 6
    after, values = scored(lm, "kvzip", 4)  # three requests have the same prompt
    assert sorted(set(after)) == [2, 3, 4, 6]
    assert values == pytest.approx(expected, abs=1e-4)


def test_other_policies_are_computed_in_full_passes(lm):
    after, _ = scored(lm, "snapkv", 4)
    assert after == [0]


def test_a_prompt_is_prepared_when_its_text_is_begun(lm):
    settings = {"until": [], "max_gen_toks": 4, "do_sample": False}
    texts = [chr(65 + i) * 12 for i in range(6)]
    instances = [Instance("generate_until", {}, (t, settings), 0, ("task", i, 1)) for i, t in enumerate(texts)]
    found = {}
    for rows in (2, 6):
        scorer = Scorer(lm, sequences_per_pass=rows)
        answers = scorer.answers(scorer.system(find_policies()["kvzip"](), Budget(tokens=6), Schedule("prompt")))
        with mock.patch.object(module, "prepared_for", wraps=module.prepared_for) as prepared:
            after = [prepared.call_count for _ in scorer.score(Requests(lm, "generate_until", instances), [answers])]
        assert answers.error is None
        assert after[0] == rows
        assert after[-1] == 6
        found[rows] = {key: answer.tokens for key, answer in answers.computed.items()}
    assert found[2] == found[6]
    assert len(found[2]) == 6


def test_a_system_that_cannot_prepare_a_prompt_leaves_the_others_alone(lm):
    settings = {"until": [], "max_gen_toks": 4, "do_sample": False}
    instances = [Instance("generate_until", {}, (t * 12, settings), 0, ("task", i, 1)) for i, t in enumerate("ABC")]
    scorer = Scorer(lm)
    systems = [scorer.system(find_policies()[p](), Budget(tokens=6), Schedule("prompt")) for p in ("kvzip", "h2o")]
    kvzip, h2o = answers = [scorer.answers(s) for s in systems]
    with mock.patch.object(module, "prepared_for", side_effect=PolicyError("no")) as prepared:
        for _ in scorer.score(Requests(lm, "generate_until", instances), answers):
            pass
    assert prepared.call_count == 1
    assert str(kvzip.error) == "no"
    assert h2o.error is None
    assert len(h2o.computed) == 3
