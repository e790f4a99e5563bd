"""Models that mix full attention with sliding windows: slots are divided among the layers that policies act on."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from a2sf import Budget, PrunedCache, Schedule, make_policy
from a2sf.hf.attention import global_layers
from a2sf.hf.settings import retention_of
from a2sf.scoring.systems import System
from tests.architectures import EIGHT
from tests.models import enlarge

TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 2
ACTS = (False, False, True) * 2
SHARES = {"name": "x", "layers": [{"share": s} for s in (1, 9, 2, 1, 1, 6)]}
PROMPT = Schedule("prompt")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    settings = {**EIGHT, "num_hidden_layers": 6, "sliding_window": 8, "layer_types": TYPES}
    return enlarge(AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **settings))).eval()


@pytest.mark.parametrize(
    ("name", "settings", "schedule", "held"),
    [
        ("pyramidkv", {"window": 4}, PROMPT, [36, 4]),  # as a model of two layers
        ("chunkkv", {"by": {"name": "pyramidkv", "window": 4}}, PROMPT, [36, 4]),
        ("calibrated", {"file": SHARES}, Schedule(), [11, 29]),
        ("chunkkv", {"by": {"name": "calibrated", "file": SHARES}}, Schedule(), [11, 29]),
        ("snapkv", {"window": 4}, PROMPT, [20, 20]),
    ],
)
def test_the_slots_are_those_of_equal_budgets_in_the_layers_that_are_pruned(model, name, settings, schedule, held):
    assert global_layers(model.config) == ACTS
    policy, ids = make_policy(name, **settings), torch.arange(3, 63)[None]
    cache = PrunedCache(model, policy, 20, schedule=schedule)
    with torch.no_grad():
        model(ids, cache=cache)
    found = [set(cache.state(i).counts[0].tolist()) for i in (2, 5)]
    want = [{n} for n in held]
    assert found == want
    scored = System(policy, Budget(tokens=20), schedule, ACTS).retention(60, 60, 6)
    assert [{scored[i].budget} for i in (2, 5)] == want
    grown = retention_of(policy, Budget(ratio=0.35, base="seen"), 60, 60, 6, schedule, acts=ACTS)
    assert sum(grown[i].after(60).budget for i in (2, 5)) == 42  # 21 each
