"""How many tokens a bounded cache may still read, what is cached in it, and layers that it does not have."""

from __future__ import annotations

import pytest
import torch

from a2sf import A2SF, Budget
from a2sf.errors import ConfigError
from a2sf.hf.cache.pruned import PrunedCache
from baselines.heads import Heads
from baselines.snapkv import SnapKV
from tests.models import shared

IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
GREEDY = {"do_sample": False, "eos_token_id": None}


def test_no_more_is_generated_than_the_budget_is_a_share_of():
    """Base total: with another max_new_tokens than that of generate, the budget would be of another length."""
    model = shared("llama")

    def cache(**more) -> PrunedCache:
        return PrunedCache(model, A2SF(), Budget(ratio=0.5), **{"max_new_tokens": 5, **more})

    short = cache()
    with pytest.raises(
        ConfigError, match=r"max_new_tokens=5 is not allowed: .* give PrunedCache the max_new_tokens of gen"
    ):
        model.generate(IDS, cache=short, max_new_tokens=6, **GREEDY)
    assert short.seen.tolist() == [24, 24]  # the fifth new token is not read
    turns = cache()
    text = model.generate(IDS, cache=turns, max_new_tokens=5, **GREEDY)
    ones = torch.ones(2, 27, dtype=torch.int64)
    question = torch.cat([text, IDS[:, :2]], 1)
    model.generate(question, cache=turns, attention_mask=ones, max_new_tokens=4, **GREEDY)  # a later turn is not of it
    assert turns.seen.tolist() == [30, 30]
    restored = cache()
    restored.load(turns.stored())
    with torch.no_grad():
        model(IDS[:, :1], cache=restored)
    for free in (Budget(ratio=0.5, base="context"), Budget(tokens=9), Budget(ratio=0.5, base="seen")):
        model.generate(IDS, cache=PrunedCache(model, A2SF(), free, max_new_tokens=2), max_new_tokens=4, **GREEDY)


def test_bytes_of_what_is_cached_and_of_what_is_reserved():
    """Twelve slots in each of two heads, in three layers: keys and values of 8 numbers, for two rows."""
    model = shared("llama")
    for policy, schedule in ((A2SF(), None), (SnapKV(window=3), "prompt"), (Heads(heads=[[0, 1]]), None)):
        cache = PrunedCache(model, policy, 12, schedule=schedule)
        assert cache.cached_nbytes == 0
        with torch.no_grad():
            model(IDS, cache=cache)
        cached = sum(int(cache.state(i).counts.sum()) for i in range(3))
        assert cached >= 3 * 2 * 2 * 12
        assert cache.cached_nbytes == cached * 2 * 8 * 4
        assert cache.nbytes > cache.cached_nbytes


def test_a_layer_that_a_model_does_not_have():
    model = shared("llama")
    cache = PrunedCache(model, A2SF(), 12, trace=True)
    with torch.no_grad():
        model(IDS, cache=cache)
    for asked in (cache.state, cache.evicted, cache.cuts):
        with pytest.raises(ConfigError, match="layer=9 is not allowed: the model has the layers 0 to 2"):
            asked(9)
