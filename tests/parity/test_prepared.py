"""Policies that read a prompt before its cut: what they find, by the model's own attention, in scoring and generation."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from a2sf import CAKE, Budget, KVzip, PrunedCache, SimLayerKV, attend, pruning
from a2sf.errors import ConfigError, PolicyError, UserError
from a2sf.hf.attention import Plan, attached, running
from a2sf.hf.reader import prepared_for
from a2sf.hf.settings import retention_of
from a2sf.policies.prepared import Numbers, Prepared, divided
from a2sf.policies.schedule import Schedule
from tests.models import NO_SDPA, shared, small
from tests.policies import instances

PROMPT, TOKENS = 24, 30
IDS = torch.randint(3, 90, (2, TOKENS), generator=torch.Generator().manual_seed(0))
SMALL = [
    KVzip(sinks=2),
    KVzip(chunk=7, sinks=2),
    CAKE(window=4, kernel=3),
    SimLayerKV(sinks=1, recent=3, threshold=0.145),
]


def without_windows(kind: str) -> PreTrainedModel:
    """A model whose layers all attend to the whole text."""
    return small(kind, **({} if kind == "llama" else {"layer_types": ["full_attention"] * 3}))


def eager(tokens: list[int], kind: str = "llama") -> list[torch.Tensor]:
    """The model's own attention in each layer, [H, T, T]."""
    model = without_windows(kind)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return [
            a[0].double() for a in model(torch.tensor([tokens]), output_attentions=True, use_cache=False).attentions
        ]


@pytest.mark.parametrize("kind", ["llama", *NO_SDPA])
def test_kvzip_is_the_most_attention_of_the_repetition(kind):
    tokens = IDS[0, :PROMPT].tolist()
    found = prepared_for(without_windows(kind), KVzip(), tokens)
    for layer, attention in enumerate(eager(tokens + tokens, kind)):
        want = attention[:, PROMPT:, :PROMPT].amax(1).unflatten(0, (2, 2)).amax(1)
        torch.testing.assert_close(found.numbers[layer].of.double(), want, atol=1e-5, rtol=1e-4)
    # the model's best tokens: as many as there are slots, beside what every layer's sinks take
    budgets = found.budgets(3 * 10, PROMPT)
    assert sum(budgets) == 30
    every = torch.stack([n.of for n in found.numbers])
    best = (every >= every.flatten().topk(60).values[-1]).sum((1, 2)) / 2
    assert (torch.tensor(budgets) - best).abs().max() <= 1


def test_chunks_of_kvzip_see_the_sinks_and_themselves():
    tokens = IDS[0, :PROMPT].tolist()
    found = prepared_for(shared("llama"), KVzip(chunk=10, sinks=3), tokens)
    assert [n.of.shape for n in found.numbers] == [(2, PROMPT)] * 3
    # the second chunk by renormalizing the model's own attention to what the paper's softmax is over
    attention = eager(tokens + tokens[10:20])
    seen = [0, 1, 2, *range(10, 20), *range(24, 34)]
    for layer, of_layer in enumerate(attention):
        part = of_layer[:, 24:, seen]
        part = part / part.sum(-1, keepdim=True)
        want = part[..., 3:13].amax(1).unflatten(0, (2, 2)).amax(1)
        torch.testing.assert_close(found.numbers[layer].of[:, 10:20].double(), want, atol=1e-5, rtol=1e-4)


def test_cake_divides_by_entropy_and_variance():
    tokens = IDS[1, :PROMPT].tolist()
    policy = CAKE(window=4, tau1=2.0, tau2=0.5)
    found = prepared_for(shared("llama"), policy, tokens)
    for share, attention in zip(found.shares, eager(tokens), strict=True):
        window = attention[:, -4:, : PROMPT - 4]
        entropy = -sum(float(p * p.log()) for p in window.flatten() if p > 0)
        variance = float(((window - window.mean(1, keepdim=True)) ** 2).sum(1).div(3).sum())
        assert share == pytest.approx(entropy**0.5 * variance**2, rel=1e-3)
    assert sum(found.budgets(30, PROMPT)) == 30
    assert min(found.budgets(30, PROMPT)) >= 4


def test_cake_has_no_preferred_layer_where_its_window_holds_the_prompt():
    """And takes the variance of nothing, of which torch warns."""
    tokens = IDS[0, :PROMPT].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = prepared_for(shared("llama"), CAKE(window=PROMPT), tokens)
    assert len(set(found.shares)) == 1


def test_cake_ranks_by_mean_and_variance_over_the_window():
    policy = CAKE(window=3, kernel=3, gamma=7.0)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 14, 8, generator=g).double() for h in (4, 2, 2))
    _, state = attend(policy, q, k, v, budget=6, schedule="prompt", prompt=14, prepared=[Prepared(shares=(1.0,))])
    for head in range(2):
        rows = []
        for query in range(11, 14):
            logits = q[0, 2 * head : 2 * head + 2, query] @ k[0, head, : query + 1].T * 8**-0.5
            rows.append(torch.nn.functional.pad(logits.softmax(-1), (0, 13 - query)))
        window = torch.stack(rows, 1)[..., :11]  # [G, W, tokens before it]
        score = (window.mean(1) + 7.0 * window.var(1)).mean(0)
        score = torch.nn.functional.avg_pool1d(score[None], 3, stride=1, padding=1)[0]
        best = sorted(score.topk(3).indices.tolist())
        assert state.positions[0, head].tolist() == [*best, 11, 12, 13]


def test_simlayerkv_finds_layers_that_look_at_both_ends():
    tokens = IDS[0, :PROMPT].tolist()
    paid = [1 - float(a[:, -1].mean(0)[2 : PROMPT - 5].sum()) for a in eager(tokens)]
    threshold = sorted(paid)[1]
    found = prepared_for(shared("llama"), SimLayerKV(sinks=2, recent=5, threshold=threshold - 1e-4), tokens)
    assert found.shares == tuple(float(p < threshold - 1e-4) for p in paid)
    assert sum(found.shares) == 1
    budgets = found.budgets(3 * 10, PROMPT)
    assert sorted(budgets) == [7, 7, 16]


def scored(policy, row: int, budget: Budget, then: str) -> tuple[torch.Tensor, tuple[int, ...]]:
    model, tokens = shared("llama"), IDS[row : row + 1]
    schedule = Schedule("prompt", then=then)
    ready = prepared_for(model, policy, tokens[0, :PROMPT].tolist())
    retained = retention_of(policy, budget, TOKENS, PROMPT, 3, schedule, ready)
    plan = Plan.of_rows(
        [TOKENS], [0], lambda row, layer: retained[layer], 3, schedule=schedule, prompt=lambda row: PROMPT
    )
    with torch.inference_mode(), attached(model), running(plan):
        return model(tokens, use_cache=False).logits, tuple(k.budget for k in retained)


@pytest.mark.parametrize("then", ["keep", "step"])
@pytest.mark.parametrize("policy", SMALL, ids=repr)
def test_scoring_and_generation_agree(policy, then):
    model, budget = shared("llama"), 8
    want, budgets = zip(*(scored(policy, row, Budget(tokens=budget), then) for row in range(2)), strict=True)
    assert all(sum(b) == 3 * budget for b in budgets)
    assert any(len(set(b)) > 1 for b in budgets)
    schedule = Schedule("prompt", then=then)
    with torch.inference_mode():
        for first in (PROMPT, PROMPT + 2):
            cache = PrunedCache(model, policy, budget, schedule=schedule, context_tokens=PROMPT)
            logits = [model(IDS[:, :first], cache=cache).logits]
            assert tuple(k.budget for k in cache.retention[1]) == budgets[1]
            for t in range(first, TOKENS):
                logits.append(model(IDS[:, t : t + 1], cache=cache).logits)
            held = sum(int(cache.state(i).counts[0].sum()) for i in range(3))
            assert held == 2 * 3 * (budget + (TOKENS - PROMPT) * (then == "keep"))
            assert (torch.cat(logits, 1) - torch.cat(want)).abs().max() < 1e-3 * float(want[0].abs().max())
        # padding on the left does not enter the prompt
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), IDS[:1]], 1)
        mask = (torch.arange(TOKENS + 3) >= 3)[None].long()
        cache = PrunedCache(model, policy, budget, schedule=schedule, context_tokens=PROMPT)
        got = model(padded, attention_mask=mask, cache=cache).logits[:, 3:]
        assert (got - want[0]).abs().max() < 1e-3 * float(want[0].abs().max())


@pytest.mark.parametrize("policy", SMALL, ids=repr)
def test_a_budget_that_grows_after_the_cut_is_scored_as_it_is_decoded(policy):
    model, budget = shared("llama"), Budget(ratio=0.34, base="seen")
    want = [scored(policy, row, budget, "step")[0] for row in range(2)]
    cache = PrunedCache(model, policy, budget, schedule=Schedule("prompt", then="step"), context_tokens=PROMPT)
    with torch.inference_mode():
        logits = [model(IDS[:, :PROMPT], cache=cache).logits]
        for t in range(PROMPT, TOKENS):
            logits.append(model(IDS[:, t : t + 1], cache=cache).logits)
            held = sum(int(cache.state(i).counts[0].sum()) for i in range(3))
            # fewer where the share of a layer grows faster than it reads
            assert 2 * 3 * (34 * PROMPT // 100) <= held <= 2 * 3 * (34 * (t + 1) // 100)
    assert (torch.cat(logits, 1) - torch.cat(want)).abs().max() < 1e-3 * float(want[0].abs().max())


def test_a_first_call_that_is_refused_leaves_nothing_in_the_cache():
    model = shared("llama")
    cache, fresh = (PrunedCache(model, KVzip(), 8) for _ in range(2))
    with pytest.raises(UserError, match="give the first call all of the prompt, as tokens"):
        model(inputs_embeds=model.get_input_embeddings()(IDS), cache=cache)
    assert not cache.retention
    assert torch.equal(model(IDS, cache=cache).logits, model(IDS, cache=fresh).logits)
    assert cache.prompt == [TOKENS, TOKENS]


def test_what_cannot_be_prepared_is_refused_in_one_sentence():
    model = shared("llama")
    cache = PrunedCache(model, KVzip(), 8, context_tokens=PROMPT)
    with pytest.raises(UserError, match="give the first call all of the prompt, as tokens"):
        model(IDS[:, :9], cache=cache)
    cache = PrunedCache(model, KVzip(), 8)
    model(IDS, cache=cache)
    with pytest.raises(UserError, match="what the policy kvzip has prepared for a prompt is not stored"):
        cache.stored()
    with pruning(model, KVzip(), 8, context_tokens=PROMPT), pytest.raises(UserError, match="use_cache=True"):
        model(IDS, use_cache=False)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 14, 8, generator=g) for h in (4, 2, 2))
    with pytest.raises(ConfigError, match="the policy kvzip needs what its prepare returned for each prompt"):
        attend(KVzip(), q, k, v, budget=6, prompt=14)
    attend(KVzip(), q, k, v, budget=14, prompt=14)  # nothing is cut

    class Odd(KVzip):
        name = "odd"

        def prepare(self, model, tokens):
            return Prepared(shares=(1.0, 2.0))

    with pytest.raises(PolicyError, match="policy odd prepares shares for 2 layers, and the model has 3"):
        prepared_for(model, Odd(), [5, 6, 7])


def test_nothing_is_read_beforehand_where_nothing_is_cut():
    class Never(KVzip):
        name = "never"

        def prepare(self, model, tokens):
            raise AssertionError

    model = shared("llama")
    with torch.inference_mode():
        model(IDS, cache=PrunedCache(model, Never(), TOKENS))
    assert [p.name for p in instances() if p.prepares and "prompt" not in p.schedules] == []


@given(
    st.integers(1, 400),
    st.integers(1, 60),
    st.lists(st.floats(0, 1e6), min_size=1, max_size=9).map(tuple),
    st.integers(0, 70),
)
def test_slots_are_divided_exactly_and_within_bounds(total, most, shares, least):
    found = divided(total, most, shares, least)
    assert sum(found) == total
    n = len(shares)
    if total >= n * most:
        assert max(found) - min(found) <= 1
        return
    assert min(found) >= min(least, total // n, most)
    assert max(found) <= most
    for a, b in zip(
        sorted(range(n), key=shares.__getitem__), sorted(range(n), key=shares.__getitem__)[1:], strict=False
    ):
        assert found[a] <= found[b] + 1


def test_numbers_decide_over_all_layers():
    numbers = (Numbers(torch.tensor([[9.0, 8, 7, 6]])), Numbers(torch.tensor([[5.0, 0, 0, 0]])))
    assert Prepared(numbers, by_numbers=True).budgets(5, 4) == (4, 1)
    assert Prepared(numbers, by_numbers=True).budgets(4, 4) == (3, 1)  # at least one each
    # a layer with a window of its own takes no part
    some = Prepared(shares=(1.0, 5.0, 3.0), acts=(True, False, True))
    assert some.budgets(3 * 4, 20) == (3, 4, 5)
