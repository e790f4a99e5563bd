"""A cut after the context and before the question: once for all questions, the same in scoring as in decoding."""

from __future__ import annotations

import pytest
import torch
from lm_eval.api.instance import Instance

from a2sf import Budget, PrunedCache, Schedule, make_policy
from a2sf.engine.invariants import SCHEDULES
from a2sf.errors import ConfigError, UserError
from a2sf.scoring.contexts import Contexts
from a2sf.scoring.lm import PrunedLM
from a2sf.scoring.requests import Requests
from tests.models import shared
from tests.policies import cases, label, tiered, ties
from tests.stand_in import StandIn

pytestmark = pytest.mark.usefixtures("stand_in")

CONTEXT = "a text that two questions share, of more than a few words"
QUESTIONS = [" who?", " where to?"]
ANSWERS = [" nobody", " here"]
CUTS = {
    (p.name, then): (p, Schedule("prompt", then=then, at="context"))
    for p, s in cases()
    if s.prompt and p.causal and p.evicts and not ties(type(p))  # the text has letters that come again
    for then in ("keep", "step")
}.values()


def lm_of(policy="snapkv", schedule="context", field="text", **more) -> PrunedLM:
    more = more or {"budget_tokens": 9}
    return PrunedLM(shared("llama"), policy, schedule=schedule, tokenizer=StandIn(), shared_context=field, **more)


def scored(doc=CONTEXT) -> list[Instance]:
    pairs = [(CONTEXT + q, a) for q in QUESTIONS for a in ANSWERS]
    return [Instance("loglikelihood", {"text": doc}, pair, i % 2, ("t", i // 2, 1)) for i, pair in enumerate(pairs)]


def cache_for(lm: PrunedLM) -> PrunedCache:
    return PrunedCache(lm.model, lm.policy, lm.budget, schedule=lm.schedule, context_tokens=len(CONTEXT))


@pytest.mark.parametrize(("policy", "schedule"), tiered(CUTS, each=0), ids=label)
def test_scoring_is_decoding_with_a_cache_cut_after_the_context(policy, schedule):
    lm = lm_of(policy, schedule)
    got = lm.loglikelihood(scored(), disable_tqdm=True)
    read = ["".join(r.args)[:-1] for r in scored()]
    assert lm.counts.computed == len(
        {text[:i] for text in read for i in range(1, len(text) + 1)}
    )  # each beginning once
    # nothing was seen pruned but what comes after the cut, and that is all that is scored
    assert lm.counts.pruned == lm.counts.targets
    for request, (score, _) in zip(scored(), got, strict=True):
        ids = [*map(lm.tok_encode, request.args)]
        cache, logits = cache_for(lm), []
        with torch.no_grad():
            # the prompt in one call, which the cut comes within, then token by token
            logits.append(lm.model(torch.tensor([ids[0]]), cache=cache).logits[0, -1])
            for token in ids[1][:-1]:
                logits.append(lm.model(torch.tensor([[token]]), cache=cache).logits[0, -1])
        expected = sum(float(x.log_softmax(-1)[t]) for x, t in zip(logits, ids[1], strict=True))
        assert score == pytest.approx(expected, abs=1e-3)


def test_what_is_kept_of_the_context_does_not_depend_on_the_question():
    for policy in (make_policy("snapkv", window=4), make_policy("a2sf")):
        lm, kept, aware = lm_of(policy), [], []
        for question in QUESTIONS:
            ids = torch.tensor([lm.tok_encode(CONTEXT + question)])
            cache, without_end = cache_for(lm), PrunedCache(lm.model, policy, lm.budget, schedule=Schedule("prompt"))
            with torch.no_grad():
                lm.model(ids, cache=cache)
                lm.model(ids, cache=without_end)
            positions = cache.state(1).positions
            kept.append(positions[positions < len(CONTEXT)].tolist())
            aware.append(without_end.state(1).positions.flatten().tolist())
            assert (positions[0, 0] >= len(CONTEXT)).sum() == len(question)  # none of the question went
        assert kept[0] == kept[1]
        assert len(kept[0]) == 9 * positions.shape[1]
        assert aware[0] != aware[1]


def test_text_is_generated_with_the_same_cut():
    lm = lm_of("a2sf", budget=Budget(ratio=0.2, base="context"))
    settings = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    requests = [
        Instance("generate_until", {"text": CONTEXT}, (CONTEXT + q, settings), 0, ("t", i, 1))
        for i, q in enumerate(QUESTIONS)
    ]
    together = lm.generate_until(requests, disable_tqdm=True)
    assert lm.counts.pruned == lm.counts.targets
    for request, text in zip(requests, together, strict=True):
        cache, ids = cache_for(lm), torch.tensor([lm.tok_encode(request.args[0])])
        made = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        assert cache.retention[0][0].budget == int(0.2 * len(CONTEXT))
        assert StandIn().decode(made[0, ids.shape[1] :].tolist()) == text


def test_the_question_counts_where_it_is_decided_whether_a_policy_sees_the_context():
    """The context fits with its new tokens, and the question between them makes one leave."""
    schedule = Schedule("prompt", then="step", at="context")
    lm = lm_of("kvzap", schedule=schedule, budget_tokens=len(CONTEXT) + 6)
    settings = {"until": [], "max_gen_toks": 6, "do_sample": False}
    request = Instance("generate_until", {"text": CONTEXT}, (CONTEXT + QUESTIONS[0], settings), 0, ("t", 0, 1))
    (text,) = lm.generate_until([request], disable_tqdm=True)
    cache, ids = cache_for(lm), torch.tensor([lm.tok_encode(request.args[0])])
    made = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert int(cache.state(0).counts.max()) <= len(CONTEXT) + 6 < int(cache.seen[0])
    assert StandIn().decode(made[0, ids.shape[1] :].tolist()) == text


def test_a_token_across_the_contexts_end_is_the_questions():
    def pairs(text: str) -> list[str]:
        return [text[i : i + 2] for i in range(0, len(text), 2)]

    found = Contexts("text", pairs)
    assert found.tokens("xxabcd", {"text": "abc"}) == 2  # of xx ab cd
    assert found.tokens("abcabc?!", {"text": "abc"}) == 3  # an example before it holds the same text
    for prompt, document in (("abc", {"text": "abc"}), ("abd", {"text": "abc"}), ("abc", {}), ("abc", None)):
        with pytest.raises(UserError, match=r"schedule\.at=context"):
            found.tokens(prompt, document)


def test_a_mistake_gives_one_sentence():
    with pytest.raises(ConfigError, match=r"budget\.base=total is not allowed: schedule\.at=context cuts before"):
        lm_of("h2o", budget_ratio=0.5)
    with pytest.raises(ConfigError, match="the policy future supports only step"):
        lm_of("future")
    with pytest.raises(ConfigError, match=r"schedule\.at=context is not allowed: it needs the name"):
        lm_of(field=None).loglikelihood(scored(), disable_tqdm=True)
    with pytest.raises(UserError, match="a prompt does not hold that text"):
        lm_of().loglikelihood(scored("another text"), disable_tqdm=True)
    with pytest.raises(UserError, match="a request has none"):
        lm_of()._loglikelihood_tokens([(None, [5, 6, 7], [8])])
    with pytest.raises(UserError, match="a prompt of 62 tokens does not fit the model's 8 positions"):
        lm_of(max_length=8, budget_tokens=9).loglikelihood(scored()[:1], disable_tqdm=True)
    with pytest.raises(ConfigError, match="context_tokens=None"):
        PrunedCache(shared("llama"), make_policy("h2o"), Budget(tokens=5), schedule=Schedule("prompt", at="context"))


def test_one_systems_mistake_is_its_own():
    lm = lm_of()
    cuts = (Schedule("prompt", at="context"), SCHEDULES[0])
    answers = [lm.scorer.answers(lm.scorer.system(make_policy("h2o"), Budget(tokens=9), s)) for s in cuts]
    for _ in lm.scorer.score(Requests(lm, "loglikelihood", scored("another text"), "text"), answers):
        pass
    assert "a prompt does not hold that text" in str(answers[0].error)
    assert len(answers[1].computed) == 4
