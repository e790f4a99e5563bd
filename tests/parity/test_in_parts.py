"""Long calls, prompts and requests are read in parts; that is the same as at once."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from a2sf import A2SF, Budget, PrunedCache, Schedule
from a2sf.errors import UserError
from a2sf.hf.calls import chunks
from a2sf.hf.scope import pruning
from a2sf.scoring.lm import PrunedLM
from a2sf.scoring.passes import looks, run
from a2sf.scoring.requests import EncodedRequests
from baselines.h2o import H2O
from tests.models import shared, small
from tests.parity.test_generation import ALL, BUDGET, PROMPTS, close, fits, ids_for
from tests.parity.test_lm import requests
from tests.policies import cases, label, tiered, ties
from tests.stand_in import StandIn

GREEDY = {"do_sample": False, "eos_token_id": None}
LAYERS = range(3)
PASS = 32
"""Tokens of a pass, fewer than a long request has."""

pytestmark = pytest.mark.usefixtures("stand_in")


@pytest.fixture
def parts(monkeypatch):
    """Sets how many columns a part has."""

    def of(columns: int) -> None:
        monkeypatch.setitem(chunks.TOKENS, "cpu", 1)
        monkeypatch.setattr(chunks, "LEAST", columns)

    return of


@pytest.fixture
def short_passes(monkeypatch):
    """A row of more than `PASS` tokens is a long one."""
    monkeypatch.setattr(run, "LEAST_PASS", PASS)


@contextmanager
def sizes(model):
    """The columns of each pass through the model's layers."""
    found: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda m, a, out: found.append(out.shape[1]))
    yield found
    handle.remove()


def evictions(cache: PrunedCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    cuts = cache.cuts(layer)
    return cache.evicted(layer), cuts[torch.argsort(cuts @ torch.tensor([97**3, 97**2, 97, 1]))]


@pytest.mark.parametrize(
    ("policy", "schedule", "name"),
    tiered(
        (
            (p, s, a)
            for a, normed in {
                "llama": False,
                "opt": False,
                "gemma3": True,
                "gpt2": False,
                "gemma2": False,
                "gpt_oss": False,
            }.items()
            for p, s in ALL
            if fits(p, a, normed)
        ),
        each=0,
        turn=4,
    ),
    ids=label,
)
def test_a_call_in_parts_is_the_call_at_once(parts, policy, schedule, name):
    model, ids = shared(name), ids_for(length=30)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    caches = []
    for columns in (100, 4):
        parts(columns)
        cache = PrunedCache(model, policy, BUDGET, schedule=schedule, context_tokens=PROMPTS, trace=True)
        with torch.no_grad(), sizes(model) as read:
            caches.append((cache, model(ids, attention_mask=mask, cache=cache).logits, list(read)))
    (at_once, expected, _), (cache, got, read) = caches
    first = 16 if schedule.prompt else 0  # the later of the two prompts' last tokens, 9 after 7 columns of padding
    assert sum(read) == 30
    assert len(read) > 3
    assert read[0] == (first or 3)
    close(got[mask.bool()], expected[mask.bool()])
    assert (cache.columns, cache.calls, cache.seen.tolist()) == (30, 1, [30, 23])
    for i in LAYERS:
        assert torch.equal(cache.state(i).positions, at_once.state(i).positions)
        for a, b in zip(evictions(cache, i), evictions(at_once, i), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("schedule", [None, Schedule("prompt", at="context", then="step"), Schedule("every", every=5)])
def test_generate_asks_for_the_last_logits_alone_and_writes_the_same(parts, schedule):
    model, ids = shared("qwen2"), ids_for(length=30)
    texts = []
    for columns in (100, 6):
        parts(columns)
        cache = PrunedCache(
            model, H2O(), Budget(ratio=0.4, base="context"), schedule=schedule, max_new_tokens=9, context_tokens=14
        )
        with sizes(model) as read:
            head = []
            handle = model.lm_head.register_forward_hook(lambda m, a, out, head=head: head.append(out.shape[1]))
            texts.append(model.generate(ids, cache=cache, max_new_tokens=9, num_beams=2, **GREEDY))
            handle.remove()
        assert set(head) == {1}
        assert read[:2] == ([30, 1] if columns > 30 else [14, 5] if schedule and schedule.prompt else [6, 6])
    assert torch.equal(*texts)


def test_a_ratio_is_one_of_the_whole_prompt(parts):
    model, ids = shared("llama"), ids_for(length=30)
    parts(5)
    cache = PrunedCache(model, A2SF(), Budget(ratio=0.3, base="context"))
    model.generate(ids, cache=cache, max_new_tokens=3, **GREEDY)
    assert cache.state(0).positions.shape[-1] == 9


@pytest.mark.parametrize("keep", [0, 3, 12])
@pytest.mark.parametrize("cached", [False, True])
def test_plain_calls_inside_pruning(parts, keep, cached):
    model, ids = shared("llama"), ids_for(length=30)
    mask = torch.ones_like(ids)
    mask[0, -8:] = 0
    found = []
    for columns in (100, 7):
        parts(columns)
        for schedule, context in ((None, None), (Schedule("prompt"), [13, 20])):
            with (
                torch.no_grad(),
                pruning(model, H2O(), Budget(ratio=0.3), max_new_tokens=0, schedule=schedule, context_tokens=context),
                sizes(model) as read,
            ):
                out = model(ids, attention_mask=mask, use_cache=cached, logits_to_keep=keep)
                assert (out.past_key_values is not None) == cached
                found.append(out.logits)
                assert (len(read) > 1) == (columns == 7)
                assert len(read) == 1 or max(read) < (8 if schedule is None else 21)
    for at_once, in_parts in zip(found[:2], found[2:], strict=True):
        real = mask[:, -(keep or 30) :].bool()
        close(in_parts[real], at_once[real])
        assert in_parts.shape == at_once.shape


def test_what_parts_cannot_tell_is_read_at_once(parts):
    model, ids = shared("llama"), ids_for(length=30)
    parts(5)
    for options in ({"output_hidden_states": True}, {"labels": ids}, {"return_dict": False}):
        cache = PrunedCache(model, A2SF(), BUDGET)
        with torch.no_grad(), sizes(model) as read:
            model(ids, cache=cache, **options)
        assert read == [30]
    turned = small("phi3", rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 20,
    }, original_max_position_embeddings=20)  # fmt: skip
    cache = PrunedCache(turned, A2SF(), BUDGET)
    with torch.no_grad(), sizes(turned) as read:
        turned(ids, cache=cache)
    assert read == [30]


def test_a_cache_whose_part_failed_is_not_used_again(parts):
    model, ids = shared("llama"), ids_for(length=30)
    parts(10)
    cache = PrunedCache(model, A2SF(), BUDGET)
    left = [2]

    def fail(*_):
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("in the second part")

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="second part"), torch.no_grad():
        model(ids, cache=cache)
    handle.remove()
    with pytest.raises(UserError, match="stopped midway"), torch.no_grad():
        model(ids, cache=cache)
    cache.reset()
    with torch.no_grad():
        close(model(ids, cache=cache).logits, model(ids, cache=PrunedCache(model, A2SF(), BUDGET)).logits)


def long_requests():
    ids = torch.randint(3, 97, (6, 75), generator=torch.Generator().manual_seed(5))
    ids[1:3, :47] = ids[0, :47]  # beginnings in common
    return requests(ids, [62, 47, 46, 1, 10, 40], [75, 52, 65, 68, 30, 75])


def scored(lm: PrunedLM, monkeypatch, *, in_parts: bool):
    lm.scorer.tokens_per_pass = PASS
    monkeypatch.setattr(looks, "parts_save_memory", lambda *_: in_parts)
    with sizes(lm.model) as read:
        found = lm._loglikelihood_tokens(long_requests())
    return found, read


def same(got, expected) -> None:
    for (a, greedy), (b, expected_greedy) in zip(got, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-3)
        assert greedy == expected_greedy


@pytest.mark.usefixtures("short_passes")
@pytest.mark.parametrize(
    ("policy", "schedule"),
    tiered(((p, s) for p, s in cases() if p.causal and not ties(type(p))), each=0, turn=1),
    ids=label,
)
def test_long_requests_are_scored_in_parts(policy, schedule, monkeypatch):
    budget = Budget(ratio=0.25) if policy.uses_budget else None
    found = {}
    for in_parts in (False, True):
        lm = PrunedLM(shared("llama"), policy, budget, schedule=schedule, tokenizer=StandIn())
        found[in_parts], read = scored(lm, monkeypatch, in_parts=in_parts)
        assert (max(read) <= PASS) == in_parts
    same(found[True], found[False])


@pytest.mark.usefixtures("short_passes")
def test_a_row_of_several_systems_in_parts(monkeypatch):
    """Forests of states of their own, on columns of one row."""
    found = {}
    for in_parts in (False, True):
        lm = PrunedLM(shared("gemma3"), "full", tokenizer=StandIn())
        systems = [
            lm.scorer.system(A2SF(forgetting_factor=f), Budget(ratio=r), s)
            for f, r, s in ((0.3, 0.3, None), (0.9, 0.3, None), (0.5, 0.7, Schedule("prompt", then="step")))
        ]
        answers = [lm.scorer.answers(s) for s in systems]
        lm.scorer.tokens_per_pass = PASS
        monkeypatch.setattr(looks, "parts_save_memory", lambda *_, in_parts=in_parts: in_parts)
        with sizes(lm.model) as read:
            for _ in lm.scorer.score(EncodedRequests(lm, long_requests()), answers):
                pass
        assert (max(read) <= PASS) == in_parts
        found[in_parts] = [a[:2] for of in answers for a in of.computed.values()]
        assert len(found[in_parts]) == 18
    same(found[True], found[False])


def test_rows_are_read_in_parts_where_that_holds_less():
    """A small state is handed on; all that a full cache holds, of every layer, would be more than is spared."""
    read = {}
    for policy, budget in (("window", Budget(ratio=0.1)), ("full", None)):
        lm = PrunedLM(small("llama", intermediate_size=16), policy, budget, tokenizer=StandIn())
        lm.scorer.tokens_per_pass = 64
        with sizes(lm.model) as found:
            lm._loglikelihood_tokens([(None, list(range(3, 93)) * 2, [5, 6])])
        read[policy] = found[3:]  # after the trial of the model
    assert max(read["window"]) <= 64
    assert read["full"] == [181]
