"""On a GPU a model scores, generates and evicts as it does on the CPU."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from a2sf import A2SF, Budget, PrunedCache
from a2sf.engine import kernels
from a2sf.hf.calls import chunks
from a2sf.scoring.lm import PrunedLM
from baselines.h2o import H2O
from tests.models import CONFIGS, NO_SDPA, shared
from tests.parity.test_generation import BUDGET, PROMPTS, UNTIED, ids_for
from tests.parity.test_lm import requests
from tests.policies import cases, label
from tests.stand_in import StandIn

pytestmark = [
    pytest.mark.usefixtures("stand_in"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]


@pytest.fixture(scope="module")
def on():
    """A small model on a device, float32."""
    made = {}

    def model(name, device):
        if (name, device) not in made:
            made[name, device] = deepcopy(shared(name)).to(device)
        return made[name, device]

    return model


def with_shared_beginnings():
    """Requests with beginnings in common, of many lengths; a token comes once in each, so that no two rank as equals."""
    ids = ids_for(rows=9, length=60, seed=5)
    others = torch.tensor(sorted(set(range(3, 97)) - set(ids[0, :30].tolist())))
    for row in (3, 4, 5):
        ids[row, :30] = ids[0, :30]
        ids[row, 30:] = others.roll(row * 11)[:30]
    ids[6] = ids[0]
    return requests(ids, [30, 20, 5, 30, 30, 31, 40, 8, 1], [40, 60, 9, 37, 48, 32, 41, 60, 2])


def both(on, name, policy, schedule=None):
    """Log-likelihoods on the CPU and on the GPU, and what ran on each."""
    found = []
    for device in ("cpu", "cuda"):
        budget = Budget(ratio=0.25) if policy.uses_budget else None
        lm = PrunedLM(on(name, device), policy, budget, schedule=schedule, tokenizer=StandIn())
        assert lm.device.type == device
        with kernels.backends_run() as ran:
            scores = [score for score, _ in lm._loglikelihood_tokens(with_shared_beginnings())]
        found.append((scores, ran))
    return found


# one says that they are skipped: to make four hundred takes time
@pytest.mark.parametrize(("policy", "schedule"), cases() if torch.cuda.is_available() else cases()[:1], ids=label)
def test_log_likelihoods(on, policy, schedule):
    (expected, ran), (got, ran_there) = both(on, "llama", policy, schedule)
    expected_there = {"torch"} if "torch" in ran else set() if policy.name in ("full", "window") else {"triton"}
    assert ran_there
    assert expected_there <= ran_there <= {"triton", "dense", *ran} - {"numba"}
    assert got == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_architectures(on, name):
    (expected, _), (got, ran) = both(on, name, A2SF(forgetting_factor=0.5))
    assert ("triton" in ran) == (name not in NO_SDPA)
    assert got == pytest.approx(expected, abs=1e-3)


@UNTIED
def test_generating(on, policy, schedule):
    ids, mask = ids_for(), torch.ones(2, 24, dtype=torch.long)
    mask[1, :5] = 0
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    texts, kept = [], []
    for device in ("cpu", "cuda"):
        model = on("llama", device)
        cache = PrunedCache(model, policy, BUDGET, schedule=schedule, context_tokens=PROMPTS)
        texts.append(model.generate(ids.to(device), attention_mask=mask.to(device), cache=cache, **settings).cpu())
        kept.append([cache.state(layer).positions.cpu() for layer in range(3)])
    assert texts[0].equal(texts[1])
    assert all(a.equal(b) for a, b in zip(*kept, strict=True))


def test_long_calls_are_read_in_parts(on, monkeypatch):
    ids = ids_for(length=60).to("cuda")
    model, caches = on("llama", "cuda"), []
    for columns in (100, 7):
        monkeypatch.setitem(chunks.TOKENS, "cuda", 1)
        monkeypatch.setattr(chunks, "LEAST", columns)
        cache = PrunedCache(model, H2O(), BUDGET)
        with torch.no_grad():
            caches.append((cache, model(ids, cache=cache).logits))
    (at_once, expected), (parts, got) = caches
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    assert all(at_once.state(i).positions.equal(parts.state(i).positions) for i in range(3))
