"""Conversations of several systems in one batch, against one conversation by itself, driven turn by turn."""

from __future__ import annotations

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from a2sf.engine.invariants import SCHEDULES
from a2sf.errors import ConfigError, UserError
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policies
from a2sf.policies.schedule import Schedule
from a2sf.scoring.generation.memory import cache_bytes
from a2sf.scoring.requests import Requests, value_of
from a2sf.scoring.systems import Answer
from a2sf.sweep.full_texts import FullTexts
from a2sf.tasks.turns import NEXT
from tests.policies import ties

HEAD = "What is it that two texts have in common? A beginning. "
TALKS = [
    [f"{HEAD}And then?", " So?", " And what came after that, if anything?"],
    [f"{HEAD}x"],
    ["Short", " y", " z", " What is the end of it?"],
]
"""Questions of three conversations, with other numbers and lengths of turns."""
NEW = 5
CHOSEN = ("full", "a2sf", "snapkv")


def request(questions, number=0, document=None, **settings):
    given = {"until": [], "max_gen_toks": NEW, "turns": 4, "do_sample": False, **settings}
    given = {k: v for k, v in given.items() if v is not None}
    return Instance("generate_until", document or {}, (NEXT.join(questions), given), 0, ("t", number, 1))


def requests_of(lm, talks=TALKS, document=None, **settings):
    made = [request(t, i, document, **settings) for i, t in enumerate(talks)]
    return Requests(lm, "generate_until", made, "context" if document else None)


def generated(lm, requests, of):
    answers = [lm.scorer.answers(s) for s in of]
    list(lm.scorer.score(requests, answers))
    assert [a.error for a in answers] == [None] * len(answers)
    return answers


def each_answer(answer):
    parts = torch.tensor(answer.tokens).split(answer.turns)
    return [p.tolist() for p in parts]


def by_itself(lm, questions, cache=None, new=NEW, **settings):
    """The answers of one conversation by transformers' `generate`, each on all of the text so far.

    Args:
        cache: kept from turn to turn; None: each turn reads everything anew, with transformers' own cache.
    """
    found, text = [], torch.empty(1, 0, dtype=torch.int64)
    for question in questions:
        text = torch.cat([text, torch.tensor([lm.tok_encode(question)])], dim=1)
        given = {} if cache is None else {"cache": cache}
        made = lm.model.generate(
            text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=new,
            pad_token_id=0,
            do_sample=False,
            **given,
            **settings,
        )
        found.append(made[0, text.shape[1] :].tolist())
        text = made
    return found


def cache_for(lm, system, questions, **more):
    follow = NEW * len(questions) + sum(len(lm.tok_encode(q)) for q in questions[1:])
    return PrunedCache(lm.model, system.policy, system.budget, schedule=system.schedule, max_new_tokens=follow, **more)


def systems(lm, names):
    for name in names:
        policy = find_policies()[name]()
        for schedule in SCHEDULES if policy.evicts else SCHEDULES[:1]:
            if schedule.when in policy.schedules:
                budget = Budget(tokens=max(40, policy.min_budget)) if policy.uses_budget else None
                yield lm.scorer.system(policy, budget, schedule)
                if budget and schedule == SCHEDULES[0]:
                    yield lm.scorer.system(policy, Budget(ratio=0.5), schedule)


def others():
    found = find_policies()
    return [n for n in sorted(found) if found[n].causal and not ties(found[n]) and n not in CHOSEN]


OTHERS = pytest.param(None, marks=[pytest.mark.full, pytest.mark.exhaustive])  # minutes


@pytest.mark.parametrize("names", [CHOSEN, OTHERS], ids=["chosen", "others"])
def test_turns_in_a_batch_are_those_of_one_conversation_by_itself(lm, names):
    lm.scorer.sequences_per_pass = 5  # so that rows come and go, in different turns
    of = list(systems(lm, names or others()))
    requests = requests_of(lm)
    for system, one in zip(of, generated(lm, requests, of), strict=True):
        for key, talk in zip(requests.keys, TALKS, strict=True):
            expected = by_itself(lm, talk, cache_for(lm, system, talk))
            assert each_answer(one.computed[key]) == expected, (system, talk)


def test_with_the_full_cache_each_turn_is_plain_generation_on_the_growing_text(lm):
    (system,) = systems(lm, ["full"])
    (answers,) = generated(lm, requests := requests_of(lm), [system])
    for key, talk, instance in zip(requests.keys, TALKS, requests.instances, strict=True):
        answer = answers.computed[key]
        assert each_answer(answer) == by_itself(lm, talk)
        texts = value_of(instance.args, answer)
        assert list(texts) == [lm.tok_decode([t for t in a if t != 2]) for a in each_answer(answer)]


def test_the_context_is_cut_once_before_all_questions(lm):
    context = "Two texts have a beginning in common, and nothing else that one could name."
    talks = [[f"{context} {q}", " And then?", " And?"] for q in ("What is it?", "x")]
    snapkv = find_policies()["snapkv"]()
    system = lm.scorer.system(snapkv, Budget(ratio=0.5, base="context"), Schedule("prompt", at="context"))
    requests = requests_of(lm, talks, {"context": context})
    (answers,) = generated(lm, requests, [system])
    for key, talk in zip(requests.keys, talks, strict=True):
        cache = cache_for(lm, system, talk, context_tokens=len(context))
        assert each_answer(answers.computed[key]) == by_itself(lm, talk, cache)
        assert int(cache.retention[0][0].budget) == len(context) // 2


def test_what_changes_scores_counts_from_each_turns_beginning(lm):
    (system,) = systems(lm, ["full"])
    settings = {"repetition_penalty": 1.3, "min_new_tokens": 4}
    (answers,) = generated(lm, requests := requests_of(lm, **settings), [system])
    for key, talk in zip(requests.keys, TALKS, strict=True):
        assert each_answer(answers.computed[key]) == by_itself(lm, talk, **settings)


def test_a_drawn_conversation_depends_on_nothing_else_in_the_batch(lm):
    of = [lm.scorer.system(find_policies()[n](), Budget(tokens=30)) for n in ("h2o", "window")]
    lm.scorer.seed = 7
    requests = requests_of(lm, do_sample=True, temperature=1.0, top_k=0)
    together = [a.computed for a in generated(lm, requests, of)]
    lm.scorer.sequences_per_pass = 1
    for system, expected in zip(of, together, strict=True):
        (again,) = generated(lm, requests, [system])
        assert {k: (a.tokens, a.turns) for k, a in again.computed.items()} == {
            k: (a.tokens, a.turns) for k, a in expected.items()
        }


def test_the_same_texts_come_from_lm_evals_entry_and_counts_are_of_all_turns(lm):
    policy = find_policies()["h2o"]()
    lm.use(policy, Budget(tokens=30))
    requests = requests_of(lm)
    found = lm.generate_until(requests.instances, disable_tqdm=True)
    (answers,) = generated(lm, requests, [lm.system])
    for texts, instance, key in zip(found, requests.instances, requests.keys, strict=True):
        assert list(texts) == list(value_of(instance.args, answers.computed[key]))
    lm.scorer.count(requests, answers)
    tokens = sum(len(a.tokens) for a in answers.computed.values())
    assert lm.counts.targets == answers.counts.targets == tokens
    read = 0
    for i, (key, talk) in enumerate(zip(requests.keys, TALKS, strict=True)):
        after = requests.after(i, answers.computed[key])
        assert len(after) == len(answers.computed[key].tokens) + sum(map(len, talk[1:]))
        read += len(talk[0]) + len(after) - 1
    assert answers.counts.tokens == read
    # whatever is predicted after the 30th token saw a pruned cache; "Short" alone has answers before
    short = answers.computed[requests.keys[2]]
    before = 5
    unpruned = 0
    for n, question in zip(short.turns, [*TALKS[2][1:], ""], strict=True):
        unpruned += sum(before + j <= 30 for j in range(n))
        before += n + len(question)
    assert answers.counts.pruned == tokens - unpruned


def test_traces_and_bytes_are_of_all_turns(lm):
    (system,) = systems(lm, ["full"])
    (answers,) = generated(lm, requests := requests_of(lm), [system])
    size = cache_bytes(lm.scorer, [requests], answers)
    text = lm.model.config.get_text_config()
    per_token = 2 * text.head_dim * text.num_key_value_heads * text.num_hidden_layers * 4
    traces = lm.scorer.traces(requests, answers, len(TALKS))
    assert len(traces) == len(TALKS)
    for i, (key, talk, trace) in enumerate(zip(requests.keys, TALKS, traces, strict=True)):
        read = [*lm.tok_encode(talk[0]), *requests.after(i, answers.computed[key])]
        assert trace.tokens.tolist() == read
        assert size[key] == (len(read) - 1) * per_token  # the last token is never read


def test_the_full_caches_conversations_are_not_read_as_its_texts(lm):
    (system,) = systems(lm, ["full"])
    (answers,) = generated(lm, requests := requests_of(lm), [system])
    made = object.__new__(FullTexts)
    made.scorer = lm.scorer
    plain = Answer("x", False, 1, 1, tokens=[5])
    assert made._tokens({**answers.computed, "plain": plain}) == {"plain": [5]}
    assert len(answers.computed) == len(requests)


def test_a_stop_sequence_ends_one_turn_alone(lm):
    (system,) = systems(lm, ["full"])
    (plain,) = generated(lm, requests := requests_of(lm), [system])
    first = each_answer(plain.computed[requests.keys[2]])[0]
    stop = lm.tok_decode([first[2]])
    (answers,) = generated(lm, requests := requests_of(lm, until=[stop]), [system])
    answer = answers.computed[requests.keys[2]]
    turns = each_answer(answer)
    assert turns[0] == first[: first.index(first[2]) + 1]
    assert len(turns) == 4
    texts = value_of(requests.instances[2].args, answer)
    assert texts[0] == lm.tok_decode(turns[0][:-1])
    limited = any(len(t) == NEW and stop not in lm.tok_decode(t) and t[-1] != 2 for t in turns)
    assert answer.ended is not limited
    assert answer.finish == ("length" if limited else answer.finish)


def test_other_models_of_lm_eval_refuse_a_conversation(lm):
    with pytest.raises(ValueError, match="turns"):
        HFLM.generate_until(lm, requests_of(lm).instances, disable_tqdm=True)


@pytest.mark.parametrize(
    ("talk", "settings", "kind", "message"),
    [
        (["a", "b"], {"turns": None}, UserError, "give the task generation_kwargs.turns"),
        (["a", "b", "c"], {"turns": 2}, UserError, "has 3 questions, and generation_kwargs.turns allows 2"),
        (["aa", ""], {}, UserError, "question 2 of a conversation is empty"),
        (["aa", "b"], {"turns": 0}, ConfigError, "how many questions a conversation has at most, at least 1"),
        (["aa", "b"], {"turns": True}, ConfigError, "how many questions a conversation has at most"),
        (["aa", "b"], {"max_length": 50}, ConfigError, "it counts the prompt, and a conversation has several"),
        (["aa", "b"], {"num_beams": 2}, ConfigError, "leave out beams"),
        (["aa", "b" * 180], {"max_gen_toks": 10}, UserError, "with 1 later questions of a conversation"),
    ],
)
def test_what_is_refused(lm, talk, settings, kind, message):
    answers = lm.scorer.answers(lm.scorer.system(find_policies()["full"](), None))
    list(lm.scorer.score(requests_of(lm, [talk], **settings), [answers]))
    assert type(answers.error) is kind
    assert message in str(answers.error)
    assert "\n" not in str(answers.error)
