"""Texts of several systems that are generated together, against transformers' `generate` of one prompt and one system."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from lm_eval.api.instance import Instance

from a2sf.engine.invariants import SCHEDULES
from a2sf.errors import ConfigError
from a2sf.hf.attention import NonFiniteError
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policies
from a2sf.policies.schedule import schedule_for
from a2sf.scoring.generation import rows as continuous
from a2sf.scoring.requests import Requests
from tests.policies import covering, ties

HEAD = "What is it that two texts have in common? A beginning. "
PROMPTS = [f"{HEAD}{q}" for q in ("And then?", "One, two, three, four", "x", "So what is the end of it?")] + ["Short"]
GREEDY = {"do_sample": False}
DRAWN = {"do_sample": True, "temperature": 1.0, "top_k": 0}


def systems(lm, every=True):
    """Each causal policy under each schedule that it supports, at two budgets; or a few that cover all, at one budget."""
    policies = [cls() for cls in find_policies().values() if not ties(cls)]  # a text has letters that come again
    able = [(p, s) for p in policies if p.causal for s in (SCHEDULES if p.evicts else SCHEDULES[:1])]
    able = [(p, s) for p, s in able if s.when in p.schedules]
    for policy, schedule in able if every else covering(able):
        budgets = (Budget(tokens=40), Budget(ratio=0.6, base="context"))[: 1 + every]
        for budget in budgets if policy.uses_budget else (None,):
            if budget is None or budget.tokens is None or policy.min_budget <= 40:
                yield policy.name, lm.scorer.system(policy, budget, schedule)


def requests_of(lm, settings, prompts=PROMPTS, new=12, times=1):
    given = {"until": [], "max_gen_toks": new, **settings}
    made = [Instance("generate_until", {}, (p, given), 0, ("t", i, times)) for i, p in enumerate(prompts)]
    return Requests(lm, "generate_until", [i for i in made for _ in range(times)])


def generated(lm, requests, of):
    answers = [lm.scorer.answers(s) for s in of]
    list(lm.scorer.score(requests, answers))
    assert [a.error for a in answers] == [None] * len(answers)
    return answers


def by_itself(lm, system, prompt, new, **settings):
    ids = torch.tensor([lm.tok_encode(prompt)])
    cache = PrunedCache(lm.model, system.policy, system.budget, schedule=system.schedule, max_new_tokens=new)
    made = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=new, pad_token_id=0, **settings
    )
    return made[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)])
def test_each_system_writes_what_it_writes_by_itself(lm, every):
    lm.scorer.sequences_per_pass = 11  # so that rows come and go
    named, prompts = list(systems(lm, every)), PROMPTS if every else PROMPTS[::2]
    requests = requests_of(lm, GREEDY, prompts)
    answers = generated(lm, requests, [s for _, s in named])
    for (name, system), one in zip(named, answers, strict=True):
        for key, prompt in zip(requests.keys, prompts, strict=True):
            found = one.computed[key]
            assert found.tokens == by_itself(lm, system, prompt, 12, **GREEDY), (name, system.schedule, prompt)
            assert found.finish == ("eos" if found.tokens[-1] == 2 else "length")
            assert found.ended == (found.finish == "eos")


def test_prompts_are_read_once_for_all_systems(lm):
    h2o = find_policies()["h2o"]()
    of = [lm.scorer.system(find_policies()["full"](), None)]
    of += [lm.scorer.system(h2o, Budget(tokens=n), schedule_for(h2o, s)) for n in (50, 60) for s in SCHEDULES]
    requests = requests_of(lm, GREEDY, PROMPTS[:1], new=1)  # no token is read after the prompt
    answers = generated(lm, requests, of)
    tokens = len(PROMPTS[0])
    assert tokens == 64
    assert sum(a.counts.computed for a in answers) < 2 * tokens
    assert sum(a.counts.needed for a in answers) == len(of) * tokens


def test_finished_rows_make_room_at_once(lm, monkeypatch):
    lm.scorer.sequences_per_pass = 4
    sizes, step = [], continuous.RowGenerator._step
    monkeypatch.setattr(continuous.RowGenerator, "_step", lambda self: (sizes.append(len(self.live)), step(self))[1])
    limits = [2, 9, 3, 9, 2, 9, 9, 2]
    made = [
        Instance("generate_until", {}, (p, {"until": [], "max_gen_toks": 9, "do_sample": False}), 0, ("t", i, 1))
        for i, p in enumerate(f"{HEAD}{i}" for i in range(8))
    ]
    requests = Requests(lm, "generate_until", made)
    take = continuous.Row.take

    def shorter(self, token):
        self.limit = limits[self.request]
        take(self, token)

    monkeypatch.setattr(continuous.Row, "take", shorter)
    system = lm.scorer.system(find_policies()["h2o"](), Budget(tokens=20))
    (answers,) = generated(lm, requests, [system])
    found = [len(answers.computed[k].tokens) for k in requests.keys]
    assert all(n <= limit for n, limit in zip(found, limits, strict=True))
    # one after the other in batches of four, the calls would be those of the longest text of each batch: 8 + 8
    assert sum(sizes) == sum(n - 1 for n in found)
    assert max(sizes) == 4
    assert len(sizes) < 16


def test_settings_that_change_scores_do_what_they_do_in_generate(lm):
    system = lm.scorer.system(find_policies()["window"](), Budget(tokens=30))
    settings = {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4}
    (answers,) = generated(lm, requests := requests_of(lm, settings), [system])
    for key, prompt in zip(requests.keys, PROMPTS, strict=True):
        assert answers.computed[key].tokens == by_itself(lm, system, prompt, 12, **settings)


def test_beams_are_searched_by_generate(lm):
    system = lm.scorer.system(find_policies()["window"](), Budget(tokens=30))
    settings = {"do_sample": False, "num_beams": 3}
    (answers,) = generated(lm, requests := requests_of(lm, settings), [system])
    for key, prompt in zip(requests.keys, PROMPTS, strict=True):
        expected = by_itself(lm, system, prompt, 12, **settings)
        assert answers.computed[key].tokens == expected[: expected.index(2) + 1 if 2 in expected else None]


def test_a_drawn_text_depends_on_nothing_but_document_draw_and_seed(lm):
    of = [lm.scorer.system(find_policies()[n](), Budget(tokens=30)) for n in ("h2o", "window")]
    lm.scorer.seed = 7
    requests = requests_of(lm, DRAWN, times=3)
    together = [a.computed for a in generated(lm, requests, of)]
    assert len(together[0]) == len(set(requests.keys)) == 3 * len(PROMPTS)
    assert len({tuple(a.tokens) for a in together[0].values()}) > 2 * len(PROMPTS)
    lm.scorer.sequences_per_pass = 2
    torch.manual_seed(99)
    for one, expected in zip(of, together, strict=True):
        (again,) = generated(lm, requests, [one])
        assert {k: a.tokens for k, a in again.computed.items()} == {k: a.tokens for k, a in expected.items()}
    lm.scorer.seed = 8
    (other,) = generated(lm, requests, of[:1])
    assert {k: a.tokens for k, a in other.computed.items()} != {k: a.tokens for k, a in together[0].items()}


def test_tokens_are_drawn_with_the_models_probabilities(lm):
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 5}
    n = 1500
    requests = requests_of(lm, settings, PROMPTS[:1], new=1, times=n)
    (answers,) = generated(lm, requests, [lm.scorer.system(find_policies()["full"](), None)])
    times = Counter(a.tokens[0] for a in answers.computed.values())
    with torch.no_grad():
        logits = lm.model(torch.tensor([lm.tok_encode(PROMPTS[0])])).logits[0, -1] / 0.7
    likeliest = logits.topk(5)
    expected = n * likeliest.values.softmax(-1)
    found = torch.tensor([times[int(t)] for t in likeliest.indices], dtype=torch.float32)
    assert found.sum() == n
    assert float(((found - expected) ** 2 / expected).sum()) < 18.5  # chi-square, 4 degrees of freedom, p = 0.001


def test_two_systems_with_equal_probabilities_draw_the_same_text(lm):
    policies = find_policies()
    of = [lm.scorer.system(policies["full"](), None), lm.scorer.system(policies["h2o"](), Budget(tokens=150))]
    first, second = generated(lm, requests_of(lm, DRAWN), of)
    assert {k: a.tokens for k, a in first.computed.items()} == {k: a.tokens for k, a in second.computed.items()}


def test_an_error_of_one_system_leaves_the_others_their_texts(lm, monkeypatch):
    policies = find_policies()
    of = [lm.scorer.system(policies[n](), Budget(tokens=30)) for n in ("h2o", "window", "streaming")]
    requests = requests_of(lm, GREEDY)
    expected = [{k: a.tokens for k, a in one.computed.items()} for one in generated(lm, requests, of)]
    step, calls = continuous.RowGenerator._logits, []

    def broken(self, lanes, rows):
        logits = step(self, lanes, rows).clone()
        calls.append(len(rows))
        if len(calls) > 3:
            for i, row in enumerate(rows):
                if row.answers.system.policy.name == "window":
                    logits[i, 5] = float("nan")
        return logits

    monkeypatch.setattr(continuous.RowGenerator, "_logits", broken)
    answers = [lm.scorer.answers(s) for s in of]
    list(lm.scorer.score(requests, answers))
    assert isinstance(answers[1].error, NonFiniteError)
    assert "task t, document" in str(answers[1].error)
    for i in (0, 2):
        assert answers[i].error is None
        assert {k: a.tokens for k, a in answers[i].computed.items()} == expected[i]


def test_an_error_of_any_kind_is_the_systems_in_which_it_comes_again(lm, monkeypatch):
    policies = find_policies()
    of = [lm.scorer.system(policies[n](), Budget(tokens=30)) for n in ("h2o", "window")]
    step = continuous.RowGenerator._logits

    def broken(self, lanes, rows):
        if any(r.answers.system.policy.name == "h2o" for r in rows):
            raise RuntimeError("something is wrong with h2o")
        return step(self, lanes, rows)

    monkeypatch.setattr(continuous.RowGenerator, "_logits", broken)
    answers = [lm.scorer.answers(s) for s in of]
    list(lm.scorer.score(requests_of(lm, GREEDY), answers))
    assert str(answers[0].error) == "something is wrong with h2o"
    assert answers[1].error is None
    assert len(answers[1].computed) == len(PROMPTS)


def test_what_ended_with_its_first_token_is_kept_though_the_next_call_fails(lm, monkeypatch):
    system = lm.scorer.system(find_policies()["h2o"](), Budget(tokens=30))
    requests = requests_of(lm, GREEDY)
    (expected,) = generated(lm, requests, [system])
    take, step, failed = continuous.Row.take, continuous.RowGenerator._logits, []

    def ends_one(self, token):
        self.limit = 1 if self.request == 1 else 12
        take(self, token)

    def broken_once(self, lanes, rows):
        if not failed:
            failed.append(True)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return step(self, lanes, rows)

    monkeypatch.setattr(continuous.Row, "take", ends_one)
    monkeypatch.setattr(continuous.RowGenerator, "_logits", broken_once)
    with pytest.warns(match="texts at a time"):
        (answers,) = generated(lm, requests, [system])
    found = {k: a.tokens for k, a in answers.computed.items()}
    all_tokens = {k: a.tokens for k, a in expected.computed.items()}
    assert found == all_tokens | {requests.keys[1]: all_tokens[requests.keys[1]][:1]}


def test_out_of_memory_halves_the_rows(lm, monkeypatch):
    system = lm.scorer.system(find_policies()["h2o"](), Budget(tokens=30))
    requests = requests_of(lm, GREEDY)
    (expected,) = generated(lm, requests, [system])
    step, sizes = continuous.RowGenerator._logits, []

    def crowded(self, lanes, rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return step(self, lanes, rows)

    monkeypatch.setattr(continuous.RowGenerator, "_logits", crowded)
    lm.scorer.sequences_per_pass = 5
    with pytest.warns(match="continues with 2 texts at a time"):
        (answers,) = generated(lm, requests, [system])
    assert sizes[0] == 5
    assert {k: a.tokens for k, a in answers.computed.items()} == {k: a.tokens for k, a in expected.computed.items()}


def test_an_oracle_is_refused(lm):
    answers = lm.scorer.answers(lm.scorer.system(find_policies()["future"](), Budget(tokens=30)))
    list(lm.scorer.score(requests_of(lm, GREEDY), [answers]))
    assert isinstance(answers.error, ConfigError)
