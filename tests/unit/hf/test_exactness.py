"""The trial finds what makes pruning inexact, also where a short text does not show it."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from a2sf import A2SF, Budget
from a2sf.hf import exactness
from a2sf.hf.attention import Plan, UnsupportedModel, attached, running
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.calls.logits import logits_at
from a2sf.hf.exactness import check_exact, require_exact
from a2sf.hf.scope import pruning
from a2sf.policies.base import Retention
from tests.architectures import EXPERTS, QWEN_EXPERTS
from tests.models import LLAMA_LIKE, random_model, small

IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
BUDGET = Budget(tokens=6)


def own_attention(name: str, forward, mask=sdpa_mask):
    """Register an attention of a model's own."""
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, mask)
    return name


def handing(model, **arguments):
    """`model`, whose layers hand more arguments to their attention."""
    for layer in model.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, _own=own, **kwargs: _own(*args, **kwargs, **arguments)
    return model


@pytest.mark.parametrize("name", ["output_router_logits", "cu_seq_lens_q", "deterministic", "something_new"])
def test_an_argument_without_effect_is_let_through(name):
    model = handing(small("llama"), **{name: 7})
    check_exact(model)
    PrunedCache(model, A2SF(), BUDGET)


@pytest.mark.parametrize(
    "name", ["softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices", "head_mask"]
)
def test_an_argument_known_to_matter_is_refused_by_name(name):
    with pytest.raises(UnsupportedModel, match=name):
        check_exact(handing(small("llama"), **{name: torch.zeros(1)}))


@pytest.mark.parametrize("sinks", [torch.zeros(2, 4, 20, 1), torch.zeros(4, dtype=torch.int64)])
def test_sinks_that_are_not_one_number_for_each_head_are_refused(sinks):
    with pytest.raises(UnsupportedModel, match=r"learned sinks \(sinks\) that the engine does not know") as raised:
        check_exact(handing(small("llama"), sinks=sinks))
    assert "\n" not in str(raised.value)


def test_an_argument_that_matters_is_found_by_trying():
    def tilted(module, query, key, value, attention_mask, tilt=None, **kwargs):
        return sdpa_attention_forward(
            module, query, key, value * (1 if tilt is None else tilt), attention_mask, **kwargs
        )

    model = small("llama")
    model.set_attn_implementation(own_attention("tilted", tilted))
    check_exact(model)
    with pytest.raises(UnsupportedModel, match=r"attention of layer 0 \(LlamaAttention, which is given .*tilt"):
        check_exact(handing(model, tilt=1.2))
    with pytest.raises(UnsupportedModel, match="not causal"):
        check_exact(handing(small("llama"), is_causal=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_small_deviation_is_found_in_every_dtype(dtype):
    def sharper(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling * 1.2, **kwargs)

    model = small("qwen2").to(dtype)
    check_exact(model)
    model.set_attn_implementation(own_attention("sharper", sharper))
    with pytest.raises(UnsupportedModel, match="not the softmax attention"):
        check_exact(model)


@pytest.mark.parametrize(
    ("kind", "settings", "does"),
    [
        ("phimoe", {**LLAMA_LIKE, **EXPERTS}, "does not let"),  # its mask has a window, of which its layers say nothing
        ("olmoe", {**LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2}, "lets"),  # the other way round
        (
            "qwen2_moe",
            {
                **LLAMA_LIKE,
                **QWEN_EXPERTS,
                "shared_expert_intermediate_size": 16,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            "does not let",
        ),
    ],
)
def test_a_window_longer_than_the_trial_is_found(kind, settings, does):
    with pytest.raises(UnsupportedModel, match=rf"layer 0 .* {does} token 1\d\d attend to token \d+"):
        check_exact(random_model(kind, **settings, sliding_window=100))
    check_exact(random_model(kind, **settings, sliding_window=256))  # as many tokens as it has positions
    check_exact(random_model("mistral", **LLAMA_LIKE, sliding_window=100))  # says so


def test_a_mask_by_chunks_longer_than_the_trial_is_found(monkeypatch):
    from transformers.models.llama import modeling_llama

    def chunks(batch, head, query, key):
        return query // 64 == key // 64

    own = modeling_llama.create_causal_mask
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **k: own(**k, and_mask_function=chunks))
    with pytest.raises(UnsupportedModel, match="does not let token 64 attend to token"):
        check_exact(small("llama"))


def test_a_mask_of_the_models_own_is_refused():
    model = small("llama")
    for layer in model.model.layers:
        own = layer.self_attn.forward
        mask = torch.ones(20, 20, dtype=torch.bool).tril(-2).logical_or(torch.eye(20, dtype=torch.bool))[None, None]
        layer.self_attn.forward = lambda *a, _own=own, _m=mask, **k: _own(*a, **{**k, "attention_mask": _m})
    with pytest.raises(UnsupportedModel, match="mask of its own"):
        exactness.compare_layers(model, IDS[:1])


def test_a_model_that_fails_is_refused_in_one_sentence():
    model = small("llama")
    model.model.norm.forward = lambda x: x[..., :3]
    with pytest.raises(UnsupportedModel, match=r"fails on a few tokens \(RuntimeError: ") as raised:
        check_exact(model)
    assert "\n" not in str(raised.value)


def test_a_cache_that_is_used_in_its_own_way_is_found_and_the_model_can_still_be_scored(monkeypatch):
    """A model whose layers add what their cache returns of earlier tokens to their keys."""
    from transformers.models.llama import modeling_llama

    own = modeling_llama.apply_rotary_pos_emb
    model, seen = small("llama"), []

    def update(cache, key, value, layer, *args, **kwargs):
        key, value = DynamicCache.update(cache, key, value, layer, *args, **kwargs)
        return key, value + key.shape[2] * 0.1

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *a, **k: seen.append(1) or own(*a, **k))
    check_exact(model)
    patched = type("Own", (DynamicCache,), {"update": update})
    monkeypatch.setattr(exactness, "DynamicCache", patched)
    with pytest.raises(UnsupportedModel, match="it can be scored, not generated with"):
        PrunedCache(model, A2SF(), BUDGET)
    with torch.no_grad(), pruning(model, A2SF(), BUDGET):
        before = len(seen)
        assert model(IDS, use_cache=False).logits.isfinite().all()
        with pytest.raises(UnsupportedModel, match="it can be scored, not generated with"):
            model(IDS)
        assert len(seen) == before + 3  # inside it is not tried again
    monkeypatch.setattr(exactness, "DynamicCache", DynamicCache)
    PrunedCache(model, A2SF(), BUDGET)  # a refusal is not remembered


def test_layers_that_call_their_attention_another_number_of_times_are_refused():
    model = small("llama")
    cache = PrunedCache(model, A2SF(), BUDGET)
    with torch.no_grad():
        model(IDS, cache=cache)
        attention = model.model.layers[1].self_attn
        own = attention.forward
        attention.forward = lambda *a, **k: (own(*a, **k), own(*a, **k))[0]
        with pytest.raises(UnsupportedModel, match="another number of times"):
            model(IDS[:, :1], cache=cache)


@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min, -65504.0])
def test_a_masked_vocabulary_hides_nothing_from_the_trial(value):
    model = small("llama")
    model.lm_head.register_forward_hook(lambda m, a, out: out.index_fill_(-1, torch.tensor([95, 96]), value))
    check_exact(model)
    PrunedCache(model, A2SF(), BUDGET)
    rotary = model.model.rotary_emb
    own = rotary.forward
    rotary.forward = lambda x, position_ids: own(x, torch.arange(x.shape[1])[None].expand_as(position_ids))
    with pytest.raises(UnsupportedModel, match="does not reproduce"):
        check_exact(model)


def test_it_is_tried_once_per_model_and_dtype(monkeypatch):
    tried = []
    monkeypatch.setattr(exactness, "check_exact", lambda model: tried.append(model.dtype))
    model = small("llama")
    require_exact(model)
    assert tried == [torch.float32]
    monkeypatch.undo()
    check_exact(model)
    monkeypatch.setattr(exactness, "check_exact", lambda model: tried.append(model.dtype))
    require_exact(model)
    require_exact(model.half())
    assert tried == [torch.float32, torch.float16]


def test_a_cache_can_be_made_inside_pruning_first():
    model = small("llama")
    with torch.no_grad(), pruning(model, A2SF(), BUDGET):
        inside = model(IDS, cache=PrunedCache(model, A2SF(), BUDGET)).logits
    with torch.no_grad():
        torch.testing.assert_close(inside, model(IDS, cache=PrunedCache(model, A2SF(), BUDGET)).logits)


def test_a_model_that_cannot_choose_its_logits_gives_all_of_them():
    model, index = small("llama"), torch.tensor([1, 4])
    own = model.forward

    def forward(input_ids=None, use_cache=None, **kwargs):
        return own(input_ids=input_ids, use_cache=use_cache)

    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits[:, index]
        model.forward = forward
        torch.testing.assert_close(logits_at(model, index, input_ids=IDS, use_cache=False), expected)
        model.forward = lambda **kwargs: own(IDS[:, :7])
        with pytest.raises(UnsupportedModel, match="the logits of 2 of 20 tokens and gave 7"):
            logits_at(model, index, input_ids=IDS, use_cache=False)


def test_two_attentions_of_a_layer_show_the_heads_of_both():
    model = random_model("diffllama", **LLAMA_LIKE)
    policy = A2SF(forgetting_factor=0.5)
    cache, other = (PrunedCache(model, policy, BUDGET, trace=trace) for trace in (True, False))
    plan = Plan.of_rows([20] * 2, [0] * 2, lambda row, layer: Retention(budget=6, forgetting_factor=0.5), 3, trace=True)
    with torch.no_grad():
        with attached(model), running(plan):
            model(IDS, use_cache=False)
        model(IDS[:, :15], cache=cache)
        states = [cache.state(i) for i in range(3)]
        assert states[1].positions.shape[:2] == (2, 4)  # two KV heads, twice
        model(IDS[:, :1], cache=other)
        other.load(states)
        torch.testing.assert_close(model(IDS[:, 15:], cache=cache).logits, model(IDS[:, 15:], cache=other).logits)
    assert torch.equal(cache.evicted(1), plan.evicted[1])
    cache.batch_select_indices(torch.tensor([1, 1]))
    assert cache.batch_size == 2
    assert torch.equal(cache.state(2).positions[0], cache.state(2).positions[1])
