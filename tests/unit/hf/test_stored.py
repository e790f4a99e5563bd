"""A cache that is stored and loaded, in another process too, continues as if it had never stopped."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch

from a2sf import A2SF, H2O, Budget, PrunedCache, Schedule, SnapKV
from a2sf.errors import UserError
from baselines.adakv import AdaKV
from baselines.full import Full
from baselines.heads import Heads
from baselines.tova import TOVA
from tests.models import small
from tests.own_policies import Steady

IDS = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 20, dtype=torch.int64)
MASK[1, :7] = 0
TOKENS = Budget(tokens=6)


def filled(model, *settings: object, **more: object) -> PrunedCache:
    cache = PrunedCache(model, *settings, **more)
    with torch.no_grad():
        model(IDS[:, :20], attention_mask=MASK, cache=cache)
    return cache


def rest(model, cache: PrunedCache) -> torch.Tensor:
    mask = torch.cat([MASK, torch.ones(2, 4, dtype=torch.int64)], 1)
    with torch.no_grad():
        return torch.cat(
            [model(IDS[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache).logits for t in range(20, 24)]
        )


@pytest.mark.parametrize(
    ("name", "settings", "more"),
    [
        ("llama", (A2SF(), TOKENS), {}),
        ("llama", (A2SF(), Budget(ratio=0.4, base="context")), {}),
        ("llama", (SnapKV(), TOKENS), {}),
        ("llama", (H2O(), TOKENS), {"schedule": Schedule("every", every=3)}),
        ("llama", (A2SF(), TOKENS), {"schedule": "prompt", "context_tokens": 22}),
        ("llama", (A2SF(), Budget(ratio=0.4)), {"context_tokens": [9, 8], "max_new_tokens": 5}),
        ("llama", (AdaKV(window=2), TOKENS), {}),
        ("llama", (TOVA(), TOKENS), {}),
        ("llama", (Steady(), TOKENS), {}),
        ("llama", (Heads(heads=[[1, 0]]), TOKENS), {}),
        ("llama", (Full(),), {}),
        ("gemma3", (A2SF(), TOKENS), {}),
        ("gemma2", (A2SF(), TOKENS), {}),
        ("gpt_oss", (A2SF(), TOKENS), {}),
        ("gpt_oss", (AdaKV(window=2), TOKENS), {}),
        ("gpt_oss", (Heads(heads=[[1, 0]]), TOKENS), {}),
    ],
)
def test_it_continues_as_if_it_had_not_stopped(name, settings, more, tmp_path):
    model = small(name)
    cache = filled(model, *settings, **more)
    torch.save(cache.stored(), tmp_path / "cache.pt")
    fresh = PrunedCache(model, *settings, **more)
    fresh.load(torch.load(tmp_path / "cache.pt", weights_only=True))
    assert (fresh.columns, fresh.prompt, fresh.seen.tolist()) == (cache.columns, cache.prompt, [20, 13])
    assert fresh.retention == cache.retention
    torch.testing.assert_close(rest(model, fresh), rest(model, cache))
    for i in range(3):
        assert torch.equal(fresh.state(i).positions, cache.state(i).positions)


OTHER = """
import sys, torch
from a2sf import A2SF, Budget, PrunedCache
from tests.models import small
from tests.unit.hf.test_stored import rest
model = small("llama")
cache = PrunedCache(model, A2SF(), Budget(tokens=6))
cache.load(torch.load(sys.argv[1]))
torch.save(rest(model, cache), sys.argv[1])
"""


def test_another_process(tmp_path):
    model, file = small("llama"), tmp_path / "cache.pt"
    cache = filled(model, A2SF(), TOKENS)
    torch.save(cache.stored(), file)
    subprocess.run([sys.executable, "-c", OTHER, str(file)], check=True)
    torch.testing.assert_close(torch.load(file), rest(model, cache))


def test_rows_that_were_moved_keep_the_tokens_of_their_first_call():
    model, settings = small("llama"), (A2SF(), Budget(ratio=0.4))
    cache = filled(model, *settings, context_tokens=[9, 8], max_new_tokens=5)
    cache.batch_select_indices(torch.tensor([1, 0]))
    fresh = PrunedCache(model, *settings, max_new_tokens=5)
    fresh.load(cache.stored())
    assert fresh.stored()["first"] == [13, 20]
    assert fresh.retention == cache.retention


def test_what_does_not_fit_is_refused():
    model, another = small("llama"), small("gpt2")
    stored = filled(model, A2SF(), TOKENS).stored()
    for other, why in (
        (PrunedCache(model, H2O(), TOKENS), "the policy of a stored cache is A2SF"),
        (PrunedCache(model, A2SF(forgetting_factor=0.9), TOKENS), "the policy of a stored cache is A2SF"),
        (PrunedCache(model, A2SF(), Budget(tokens=7)), r"retains \[6\] tokens and this one \[7\]"),
        (PrunedCache(model, A2SF(), TOKENS, schedule="prompt"), "the schedule of a stored cache is step"),
        (PrunedCache(another, A2SF(), TOKENS), "the model of a stored cache is"),
        (PrunedCache(model, A2SF(), TOKENS, trace=True), "records a trace"),
    ):
        with pytest.raises(UserError, match=why):
            other.load(stored)
        assert other.seen is None
    with pytest.raises(UserError, match="in format 9"):
        PrunedCache(model, A2SF(), TOKENS).load(stored | {"format": 9})
    with pytest.raises(UserError, match="read nothing yet"):
        PrunedCache(model, A2SF(), TOKENS).stored()
    for store in (pickle.dumps, lambda c: torch.save(c, "/dev/null")):
        with pytest.raises(UserError, match=r"give cache\.stored\(\) to torch\.save"):
            store(filled(model, A2SF(), TOKENS))


def test_a_copy_of_model_and_cache_is_a_cache_of_the_copied_model():
    model = small("llama")
    twin, cache = copy.deepcopy((model, filled(model, A2SF(), TOKENS)))
    torch.testing.assert_close(rest(twin, cache), rest(model, filled(model, A2SF(), TOKENS)))


@pytest.mark.parametrize("rows", [[1, 0], [1, 1, 0]], ids=str)
def test_rows_are_moved_before_a_cut_that_is_still_to_come(rows):
    """As beams are: each keeps the length of its own prompt, also where the cache is stored before the cut."""
    model, prompts, order = small("llama"), [10, 15], torch.tensor(rows)
    settings = SnapKV(window=3, kernel=3), Budget(ratio=0.5, base="context")
    moved = PrunedCache(model, *settings, schedule="prompt", context_tokens=prompts)
    want = PrunedCache(model, *settings, schedule="prompt", context_tokens=[prompts[i] for i in rows])
    with torch.no_grad():
        model(IDS[:, :6], cache=moved)
        model(IDS[order, :6], cache=want)
        moved.batch_select_indices(order)
        assert moved.prompt == want.prompt == [prompts[i] for i in rows]
        loaded = PrunedCache(model, *settings, schedule="prompt", context_tokens=[prompts[i] for i in rows])
        loaded.load(moved.stored())
        logits = [model(IDS[order, 6:], cache=c).logits for c in (want, moved, loaded)]
    for cache, made in zip((moved, loaded), logits[1:], strict=True):
        torch.testing.assert_close(made, logits[0], atol=1e-5, rtol=1e-5)
        assert [k.budget for row in cache.retention for k in row] == [prompts[i] // 2 for i in rows for _ in range(3)]
        for i in range(3):
            assert torch.equal(cache.state(i).positions, want.state(i).positions)


@pytest.mark.parametrize("policy", [A2SF(), SnapKV(), TOVA(), Steady()])
def test_a_model_in_another_dtype_than_the_cache_is_refused(policy):
    """Between two calls, or since it was stored: the engine ended in an error of torch, or mixed keys of two dtypes."""
    model = copy.deepcopy(small("llama"))
    cache = filled(model, policy, TOKENS)
    held = cache.stored()
    for dtype in (torch.float64, torch.bfloat16):
        model.to(dtype)
        with pytest.raises(UserError, match=f"filled by a model in torch.float32, which is now in {dtype}"):
            rest(model, cache)
    model.double()
    fresh = PrunedCache(model, policy, TOKENS)
    fresh.load(held)
    with pytest.raises(UserError, match=r"filled by a model in torch.float32, which is now in torch.float64"):
        rest(model, fresh)
    cache.reset()
    with torch.no_grad():
        assert model(IDS, cache=cache).logits.dtype == torch.float64
