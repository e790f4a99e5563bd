"""Systems that are computed together: the numbers of each alone, each token once, and no failure but one's own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from lm_eval.api.instance import Instance

from a2sf import Budget, Policy, Retention
from a2sf.hf.attention import NonFiniteError
from a2sf.policies.find import find_policies
from a2sf.policies.schedule import Schedule
from a2sf.scoring.lm import PrunedLM
from a2sf.scoring.passes import looks
from a2sf.scoring.passes import run as scoring
from a2sf.scoring.requests import Requests, request_hash
from tests.models import shared, small
from tests.policies import cases, representatives
from tests.stand_in import StandIn

pytestmark = pytest.mark.usefixtures("stand_in")

TEXT = "a lighthouse keeper counts the ships that pass by at night, and writes"
DOCUMENTS = [(TEXT[i : i + 30 + 3 * i], choice) for i in range(6) for choice in (" ten", " eleven or so", " t")]
BUDGETS = [Budget(ratio=0.2), Budget(ratio=0.5, base="context"), Budget(tokens=6), Budget(tokens=500)]


@dataclass(frozen=True, kw_only=True)
class Protective(Policy):
    """Protects more than a small budget holds."""

    name, label = "protective", "Protective"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, sinks=9)


@pytest.fixture
def lm():
    return PrunedLM(shared("llama"), tokenizer=StandIn())


@pytest.fixture
def read(monkeypatch):
    """How many tokens the model reads."""
    tokens, original = [0], looks.logits_in_parts

    def counting(*arguments, input_ids, **more):
        tokens[0] += input_ids.shape[1]
        return original(*arguments, input_ids=input_ids, **more)

    monkeypatch.setattr(looks, "logits_in_parts", counting)
    return tokens


def instances():
    return [Instance("loglikelihood", {}, d, 0, metadata=("sums", i // 3, 1)) for i, d in enumerate(DOCUMENTS)]


def ways(count: int):
    """Policies, budgets and schedules, every policy and schedule among them."""
    made = [
        (p, BUDGETS[i % len(BUDGETS)] if p.uses_budget else None, s) for i, (p, s) in enumerate(cases(prepared=True))
    ]
    fits = [(p, b, s) for p, b, s in made if b is None or b.tokens is None or b.tokens >= p.min_budget]
    return [w for w in fits if w[0].min_budget <= 4][:: max(1, len(fits) // count)]


def answers_of(lm, of):
    """Of each policy, budget and schedule, the answers that are computed together."""
    answers = [lm.scorer.answers(lm.scorer.system(*w)) for w in of]
    for _ in lm.scorer.score(Requests(lm, "loglikelihood", instances()), answers):
        pass
    return answers


def given(answers):
    """The log-likelihood of each document, and whether greedy decoding would have produced the continuation."""
    return [answers.answer(request_hash(r.args))[:2] for r in instances()]


@pytest.mark.parametrize("count", [10, pytest.param(30, marks=pytest.mark.full)])
def test_each_has_the_numbers_it_has_alone(lm, read, count):
    of = ways(count)
    answers = answers_of(lm, of)
    once, read[0] = read[0], 0
    for way, one in zip(of, answers, strict=True):
        got = given(one)
        lm.scorer.count(Requests(lm, "loglikelihood", instances()), one)
        lm.use(*way)
        alone = lm.loglikelihood(instances(), disable_tqdm=True)
        assert [a for a, _ in got] == pytest.approx([a for a, _ in alone], abs=1e-3)
        assert [g for _, g in got] == [g for _, g in alone]
        counts = one.counts
        assert (counts.tokens, counts.cached, counts.targets, counts.pruned) == (
            lm.counts.tokens,
            lm.counts.cached,
            lm.counts.targets,
            lm.counts.pruned,
        )
    assert once == pytest.approx(sum(a.counts.computed for a in answers))  # apportioned without a rest
    assert once < 0.8 * read[0]
    # an oracle is not read with prompts that are looked at, in parts
    together = [a.counts for a in answers if a.system.policy.causal]
    assert all(0 < c.together <= c.needed for c in together)


def test_what_no_budget_prunes_is_computed_once_for_all(lm, read):
    def computed(of):
        read[0] = 0
        found = [given(a) for a in answers_of(lm, of)]
        return read[0], found

    full = [w for w in ways(1000) if w[0].name == "full" and w[2] == Schedule()]
    once, expected = computed(full)
    others = [(p, Budget(tokens=5000), s) for p, _, s in ways(1000) if p.uses_budget]
    assert computed(full + others) == (once, expected * (1 + len(others)))


@pytest.mark.parametrize("among", [representatives, pytest.param(cases, marks=pytest.mark.full)])
def test_the_cut_after_a_prompt_leaves_its_context_to_all(lm, read, among):
    cuts = [(p, s) for p, s in among() if s.when == "prompt" and s.then == "keep"]
    of = [(p, Budget(tokens=6), s) for p, s in cuts if p.min_budget < 6 and not p.prepares]
    assert len(of) > 5
    answers_of(lm, of)
    longest = {len(c) for c, _ in DOCUMENTS}
    contexts = sum(longest)
    continuations = sum(len(t) - 1 for _, t in DOCUMENTS)
    assert read[0] <= contexts + len(of) * continuations


def test_a_failure_is_its_own(lm, monkeypatch):
    """NaN in the passes that read some member's requests, and a policy that protects more than its budget holds."""
    names = ("full", "h2o", "window", "protective")
    policies = [*(find_policies()[n]() for n in names[:3]), Protective()]
    of = [(p, Budget(ratio=0.1) if p.uses_budget else None) for p in policies]
    full, window = ([x for x, _ in given(a)] for a in answers_of(lm, [(*w, None) for w in of[::2]]))
    original = scoring.pass_of
    blamed = []

    def poisoned(row, todo, about):
        bad = [w for w, i in enumerate(row.items) if any(0 < k.recent < k.budget for k in todo[i].retention)]
        if bad:
            blamed.extend(row.items[w] for w in bad)
            raise NonFiniteError("the key of layer 1", torch.float32, sorted({row.path[w][-1] for w in bad}))
        return original(row, todo, about)

    monkeypatch.setattr(scoring, "pass_of", poisoned)
    answers = answers_of(lm, [(p, b, None) for p, b in of])
    found = {
        name: str(a.error) if a.error else [x for x, _ in given(a)] for name, a in zip(names, answers, strict=True)
    }
    assert blamed
    assert found["h2o"].startswith("task sums, document")
    assert "key of layer 1" in found["h2o"]
    assert "does not fit a budget" in found["protective"]
    assert found["full"] == pytest.approx(full, abs=1e-3)
    assert found["window"] == pytest.approx(window, abs=1e-3)


def test_what_one_policy_cannot_do_on_a_model_stops_no_other():
    """A policy cannot prune beyond a sliding window of the model's own; the full cache has no difficulty with it."""
    lm = PrunedLM(small("mistral", sliding_window=16), tokenizer=StandIn())
    full = lm.loglikelihood(instances(), disable_tqdm=True)
    of = [(find_policies()[n](), Budget(ratio=0.5) if n == "h2o" else None) for n in ("h2o", "full")]
    pruned, other = answers_of(lm, of)
    assert [a for a, _ in given(other)] == pytest.approx([a for a, _ in full], abs=1e-3)
    assert "sliding window of 16 tokens" in str(pruned.error)
