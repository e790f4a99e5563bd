"""A policy looks at prompts in the first call through a cache; what follows is as after a reading beforehand."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from a2sf import PrunedCache
from a2sf.errors import PolicyError, UserError
from a2sf.hf.cache import budgets
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget
from a2sf.policies.schedule import Schedule
from baselines.cake import CAKE
from tests.models import shared
from tests.parity.test_looks import LOOKING, Odd

IDS = torch.randint(3, 90, (3, 26), generator=torch.Generator().manual_seed(0))
COLUMNS, LENGTHS = torch.arange(26), torch.tensor([26, 19, 1])
MASKS = {
    "equal": None,
    "left": (26 - LENGTHS[:, None] <= COLUMNS).long(),
    "right": (LENGTHS[:, None] > COLUMNS).long(),
}


def beforehand():
    """Prompts are read for a policy first."""
    return mock.patch.object(Policy, "looks", False)


def never_beforehand():
    return mock.patch.object(budgets, "prepared_for", side_effect=AssertionError)


def cache_for(model, policy, then="keep", **settings) -> PrunedCache:
    return PrunedCache(
        model, policy, 8 if policy.uses_budget else None, schedule=Schedule("prompt", then=then), **settings
    )


def read_on(model, cache, mask, **first) -> list[torch.Tensor]:
    """The logits of a prompt's tokens, without padding, and of four more."""
    with torch.inference_mode():
        made = model(**(first or {"input_ids": IDS}), attention_mask=mask, cache=cache).logits
        found = [made if mask is None else made[mask.bool()]]
        for t in range(4):
            mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            found.append(model(IDS[:, t : t + 1], attention_mask=mask, cache=cache).logits)
    return found


def check_same(one: PrunedCache, other: PrunedCache) -> None:
    """Check that two caches hold the same."""
    numbers = [[[(k.budget, k.recent, k.rule) for k in row] for row in c.retention] for c in (one, other)]
    assert numbers[0] == numbers[1]
    assert one.prompt == other.prompt
    for i in range(len(one.layers)):
        a, b = one.state(i).tensors(), other.state(i).tensors()
        assert a.keys() == b.keys()
        assert torch.equal(a["positions"], b["positions"])
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-5)


def close(some: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    """Check that logits differ by rounding alone: the prompts' last tokens are attended in a call of their own."""
    for a, b in zip(some, others, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("then", ["keep", "step"])
@pytest.mark.parametrize("policy", LOOKING, ids=repr)
def test_kept_tokens_and_logits_are_those_of_a_reading_beforehand(policy, then, padding):
    model, mask = shared("llama"), MASKS[padding]
    one, other = (cache_for(model, policy, then) for _ in range(2))
    with never_beforehand():
        got = read_on(model, one, mask)
    with beforehand():
        want = read_on(model, other, mask)
    close(got, want)
    check_same(one, other)
    assert one.state(0).counts.max() < 26 + (4 if then == "keep" else 0)  # something is evicted


@pytest.mark.parametrize("kind", ["gemma3", "qwen2", "gemma2", "gpt_oss"])
def test_layers_with_a_window_of_their_own_keep_it(kind):
    model, policy = shared(kind), LOOKING[0]
    one, other = (cache_for(model, policy, "step") for _ in range(2))
    with never_beforehand():
        got = read_on(model, one, MASKS["left"])
    with beforehand():
        close(got, read_on(model, other, MASKS["left"]))
    check_same(one, other)


def tokens_read(model, run) -> list[int]:
    """The columns of each call of the model's layers while `run` runs."""
    found: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, given: found.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        run()
    finally:
        handle.remove()
    return found


def test_each_prompt_is_read_once():
    model, policy = shared("llama"), CAKE(window=3, kernel=3)
    cache_for(model, policy)  # the model is checked at the first
    assert tokens_read(model, lambda: model(IDS, cache=cache_for(model, policy))) == [26]
    with beforehand():
        assert tokens_read(model, lambda: model(IDS, cache=cache_for(model, policy))) == [26] * 4


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=repr)
def test_beams_are_those_of_a_reading_beforehand(settings):
    model, policy, mask = shared("llama"), LOOKING[0], MASKS["left"]
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **settings}
    with never_beforehand():
        got = model.generate(IDS, cache=cache_for(model, policy, "step"), **given)
    with beforehand():
        assert torch.equal(got, model.generate(IDS, cache=cache_for(model, policy, "step"), **given))


def test_prompts_may_be_embeddings():
    model, policy = shared("llama"), LOOKING[0]
    one, other = (cache_for(model, policy) for _ in range(2))
    got = read_on(model, one, None, inputs_embeds=model.get_input_embeddings()(IDS))
    close(got, read_on(model, other, None))
    check_same(one, other)


@pytest.mark.parametrize("why", ["trace", "question", "memory"])
def test_elsewhere_prompts_are_read_beforehand(why):
    model, policy = shared("llama"), CAKE(window=3, kernel=3)
    settings: dict[str, Any] = {"trace": {"trace": True}, "question": {"context_tokens": 20}}.get(why, {})
    small = mock.patch.object(budgets, "tokens_in_caches", return_value=3 * 3 * 26 - 1)
    with small if why == "memory" else nullcontext():
        cache = cache_for(model, policy, **settings)
        assert len(tokens_read(model, lambda: model(IDS, cache=cache))) == 4
    with mock.patch.object(budgets, "tokens_in_caches", return_value=3 * 3 * 26):
        assert len(tokens_read(model, lambda: model(IDS, cache=cache_for(model, policy)))) == 1


def test_a_budget_that_grows_after_the_cut():
    model, policy, budget = shared("llama"), LOOKING[0], Budget(ratio=0.34, base="seen")
    one, other = (PrunedCache(model, policy, budget, schedule=Schedule("prompt", then="step")) for _ in range(2))
    with never_beforehand():
        got = read_on(model, one, None)
    with beforehand():
        close(got, read_on(model, other, None))
    check_same(one, other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("look", "policy odd fails in look: ValueError: could not convert"),
        ("type", "policy odd prepares a list; conclude must return a Prepared"),
        ("rule", "policy odd looks at a prompt while it is read, and has another rule .* define prepare instead"),
    ],
)
def test_after_an_error_of_the_policy_the_cache_begins_anew(wrong, message):
    model, cache = shared("llama"), cache_for(shared("llama"), Odd(sinks=1))
    with mock.patch.object(Odd, "wrong", wrong), pytest.raises(PolicyError, match=message):
        model(IDS, cache=cache)
    with pytest.raises(UserError, match=r"stopped midway; call cache\.reset"):
        model(IDS, cache=cache)
    cache.reset()
    got = read_on(model, cache, None)
    want = read_on(model, other := cache_for(model, Odd(sinks=1)), None)
    close(got, want)
    check_same(cache, other)


def test_hidden_states_are_noted_in_the_first_call_alone():
    model, cache = shared("llama"), cache_for(shared("llama"), LOOKING[0])
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    model(IDS, cache=cache)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    cache = cache_for(model, LOOKING[0])
    with mock.patch.object(type(model.model), "forward", side_effect=RuntimeError), pytest.raises(RuntimeError):
        model(IDS, cache=cache)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
