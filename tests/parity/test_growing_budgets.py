"""Budgets of base `seen` on models: one pass, chunks, token by token, `generate` and lm-eval's requests agree."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from a2sf import Budget, PrunedCache, Schedule, make_policy
from a2sf.errors import ConfigError, UserError
from a2sf.hf.scope import pruning
from a2sf.hf.settings import check_settings
from a2sf.scoring.lm import PrunedLM
from tests.models import shared
from tests.parity.test_generation import ALL, NOT_TIED, PROMPTS, TOKENS, check_kept, close, fits, ids_for, one_pass
from tests.parity.test_groups import answers_of, given, instances
from tests.parity.test_in_parts import parts  # noqa: F401 (a fixture)
from tests.parity.test_texts_together import GREEDY, by_itself, generated, requests_of
from tests.parity.test_texts_together import PROMPTS as TEXTS
from tests.policies import label, tiered
from tests.stand_in import StandIn

SEEN = Budget(ratio=0.35, base="seen")
USING = [(p, s) for p, s in ALL if p.uses_budget]

pytestmark = pytest.mark.usefixtures("stand_in")


@pytest.mark.parametrize(
    ("policy", "schedule", "chunks"),
    tiered(((p, s, chunks) for p, s in USING for chunks in ([1] * 20, [20], [1, 5, 3, 11], [9, 8, 2])), each=0, turn=2),
    ids=label,
)
def test_chunks_and_single_tokens_equal_one_pass(policy, schedule, chunks):
    model, ids = shared("llama"), ids_for()
    expected, evicted_at = one_pass(model, policy, schedule, ids, PROMPTS, SEEN)
    cache, at = PrunedCache(model, policy, SEEN, schedule=schedule, context_tokens=PROMPTS), 0
    with torch.no_grad():
        for size in [*chunks, *[1] * (TOKENS - sum(chunks))]:
            close(model(ids[:, at : at + size], cache=cache).logits, expected[:, at : at + size])
            at += size
            check_kept(cache, evicted_at, at - 1)
            C = max(1, math.floor(Fraction("0.35") * at))
            if policy.name in ("h2o", "window") and schedule.when == "step":
                assert (cache.state(0).counts == C).all()


@pytest.mark.parametrize(
    ("policy", "schedule", "name"),
    tiered(
        ((p, s, name) for p, s in NOT_TIED if p.uses_budget for name in ("llama", "gpt2", "opt") if fits(p, name)),
        each=0,
        turn=3,
    ),
    ids=label,
)
def test_rows_of_a_padded_batch_grow_by_themselves(policy, schedule, name):
    model, ids = shared(name), ids_for()
    lengths, more = [5, 20], 8
    mask, padded = torch.zeros(2, 20, dtype=torch.long), torch.zeros(2, 20, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, 20 - n :] = 1
        padded[row, 20 - n :] = ids[row, :n]
    settings = {"max_new_tokens": more, "do_sample": False, "eos_token_id": None}
    cache = PrunedCache(model, policy, SEEN, schedule=schedule)
    together = model.generate(padded, attention_mask=mask, cache=cache, **settings)
    for row, n in enumerate(lengths):
        own = PrunedCache(model, policy, SEEN, schedule=schedule)
        alone = model.generate(ids[row : row + 1, :n], cache=own, **settings)
        assert together[row, 20:].tolist() == alone[0, n:].tolist()
        expected, evicted_at = one_pass(model, policy, schedule, alone, [n], SEEN)
        assert torch.equal(alone[0, n:], expected[0, n - 1 : -1].argmax(-1))
        check_kept(own, evicted_at, n + more - 2)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize(
    "schedule", [Schedule(), Schedule("every", every=3), Schedule("prompt", then="step")], ids=label
)
def test_beams_plain_calls_and_parts(parts, backend, schedule):  # noqa: F811
    model, ids = shared("llama"), ids_for(rows=2, length=15)
    settings = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False, "eos_token_id": None}
    policy = make_policy("a2sf", forgetting_factor=0.6, recent_share=0.3)
    cached = model.generate(ids, cache=PrunedCache(model, policy, SEEN, schedule=schedule, backend=backend), **settings)
    with pruning(model, policy, SEEN, schedule=schedule, context_tokens=[15, 15], backend=backend):
        assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
        with torch.no_grad():
            plain = model(ids, use_cache=False).logits
    parts(4)
    with torch.no_grad(), pruning(model, policy, SEEN, schedule=schedule, context_tokens=[15, 15], backend=backend):
        close(model(ids, use_cache=False).logits, plain)


@pytest.mark.parametrize("schedule", [None, Schedule("every", every=3), Schedule("prompt", then="step")], ids=str)
def test_memory_of_decoding_follows_the_budget(schedule):
    """Slots are allocated for the budget at the end, where it is known, and else as they are needed."""
    model, ids = shared("llama"), ids_for(rows=2, length=20)
    policy = make_policy("h2o")
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    texts = []
    for new in (40, None):
        cache = PrunedCache(model, policy, SEEN, schedule=schedule, max_new_tokens=new)
        texts.append(model.generate(ids, cache=cache, **settings))
        spare = 2 if schedule is not None and schedule.when == "every" else 0
        assert (cache.state(1).counts <= math.floor(0.35 * 59) + spare).all()
        store = cache.layers[0]._attentions[0]._caches[0]
        if new and store._memory is not None:
            assert store._slots <= math.floor(0.35 * 60) + spare
    assert torch.equal(*texts)


def test_a_stored_cache_continues_and_another_share_is_refused():
    model, ids = shared("llama"), ids_for(rows=2)
    first, at_once = (PrunedCache(model, make_policy("h2o"), SEEN) for _ in range(2))
    with torch.no_grad():
        expected = model(ids, cache=at_once).logits
        model(ids[:, :11], cache=first)
        second = PrunedCache(model, make_policy("h2o"), SEEN)
        second.load(first.stored())
        close(model(ids[:, 11:], cache=second).logits, expected[:, 11:])
    other = PrunedCache(model, make_policy("h2o"), Budget(ratio=0.36, base="seen"))
    with pytest.raises(UserError, match="a share of the tokens seen, is not this cache's"):
        other.load(first.stored())
    constant = PrunedCache(model, make_policy("h2o"), Budget(tokens=1))
    with pytest.raises(UserError, match="a share of the tokens seen"):
        constant.load(first.stored())


SYSTEMS = [
    ("h2o", SEEN, Schedule()),
    ("h2o", Budget(ratio=0.6, base="seen"), Schedule("every", every=4)),
    ("window", SEEN, Schedule()),
    ("keydiff", SEEN, Schedule("prompt", then="every", every=3)),
    ("snapkv", SEEN, Schedule("prompt", then="step")),
    ("adakv", SEEN, Schedule("prompt", then="step")),
    ("h2o", Budget(tokens=20), Schedule()),
]


def test_systems_of_a_sweep_score_as_each_does_by_itself_and_as_token_by_token():
    """Log-likelihoods of systems with growing and with fixed budgets, in shared passes."""
    scorer_of = PrunedLM(shared("llama"), tokenizer=StandIn())
    of = [(make_policy(n), b, s) for n, b, s in SYSTEMS]
    for (policy, budget, schedule), answers in zip(of, answers_of(scorer_of, of), strict=True):
        scorer_of.use(policy, budget, schedule)
        alone = scorer_of.loglikelihood(instances(), disable_tqdm=True)
        assert [a for a, _ in given(answers)] == pytest.approx([a for a, _ in alone], abs=1e-3)
        for instance, (found, _) in list(zip(instances(), alone, strict=True))[-1:]:
            context, continuation = scorer_of._encode_pair(*instance.args)
            tokens = torch.tensor([context + continuation])
            cache = PrunedCache(shared("llama"), policy, budget, schedule=schedule, context_tokens=len(context))
            with torch.no_grad():
                read = [shared("llama")(tokens[:, i : i + 1], cache=cache).logits for i in range(tokens.shape[1] - 1)]
            scores = torch.cat(read, 1)[0].log_softmax(-1).gather(1, tokens[0, 1:, None])[-len(continuation) :]
            assert float(scores.sum()) == pytest.approx(found, abs=1e-3)


def test_generated_texts_are_those_of_each_alone(lm):
    lm.scorer.sequences_per_pass = 5  # so that rows come and go
    systems = [lm.scorer.system(make_policy(n), b, s) for n, b, s in SYSTEMS]
    requests = requests_of(lm, GREEDY, TEXTS[::2])
    for system, answers in zip(systems, generated(lm, requests, systems), strict=True):
        for i, key in enumerate(requests.keys):
            prompt = requests.instances[i].args[0]
            assert answers.answer(key).tokens == by_itself(lm, system, prompt, 12, **GREEDY), (system, prompt)


def test_what_cannot_grow_is_refused_before_anything_is_read():
    from tests.own_policies import Steady

    class Changing(Steady):
        name, label = "changing", "Changing"

        def retention(self, budget, layer):
            from a2sf import Retention

            return Retention(budget=budget, forgetting_factor=0.5 if budget > 100 else 1.0)

    class Big(Steady):
        name, label = "big", "Big"

        def retention(self, budget, layer):
            from a2sf import Retention

            return Retention(budget=budget, recent=3)

    with pytest.raises(ConfigError, match=r"budget.base=seen is not allowed: changing has another rule"):
        check_settings(Changing(), SEEN, 2)
    with pytest.raises(UserError, match="big does not fit a budget of 1 tokens"):
        check_settings(Big(), SEEN, 2)
    check_settings(make_policy("dms"), SEEN, 2, schedule=Schedule("every", every=3))  # it takes no budget
