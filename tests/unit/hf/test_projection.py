"""The projection after the attention: found where it is plain, refused in one sentence where it is not."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from a2sf import Budget, PrunedCache, make_policy
from a2sf.hf.attention import UnsupportedModel
from a2sf.hf.projection import projections, projections_of
from a2sf.hf.rotary import rotary_of
from a2sf.hf.scope import pruning
from tests.architectures import SUPPORTED
from tests.models import shared, small

KINDS = {a.kind: a for a in SUPPORTED}


def test_it_has_the_heads_of_the_attention_not_those_of_the_config():
    model = KINDS["persimmon"].model()  # its config has a number of key/value heads that it does not use
    assert [p.weights.shape for p in projections_of(model)] == [(4, 1, 8, 32)] * 3


@pytest.mark.parametrize("kind", ["diffllama", "whisper"])
def test_an_attention_that_is_more_than_heads_and_a_projection_is_refused(kind):
    with pytest.raises(UnsupportedModel, match="is not only a projection of its heads by plain weights"):
        projections_of(KINDS[kind].model())


def test_weights_that_are_not_what_is_computed_with_are_refused():
    """As those of a quantised layer, whose scales are kept elsewhere."""
    model = copy.deepcopy(shared("llama"))
    projection = model.model.layers[1].self_attn.o_proj
    own = projection.forward
    projection.forward = lambda x: own(x) * torch.linspace(0.5, 2, x.shape[-1])
    with pytest.raises(UnsupportedModel, match="what follows the attention of layer 1 of LlamaForCausalLM"):
        projections(model)


def replace_weights(model):
    model.load_state_dict(small("llama", seed=5).state_dict(), assign=True)


def cast_and_train(model):
    model.bfloat16()
    gone = model.model.layers[0].self_attn.o_proj.weight.data.clone()
    model.load_state_dict(small("llama", seed=5).bfloat16().state_dict())
    assert not torch.equal(gone, model.model.layers[0].self_attn.o_proj.weight)


def replace_modules(model):
    for layer, other in zip(model.model.layers, small("llama", seed=5).model.layers, strict=True):
        layer.self_attn.o_proj = other.self_attn.o_proj


def train_unseen(model):
    """By `data`, of whose changes PyTorch keeps no count."""
    for layer, other in zip(model.model.layers, small("llama", seed=5).model.layers, strict=True):
        layer.self_attn.o_proj.weight.data.copy_(other.self_attn.o_proj.weight)


CRITICAL = make_policy("criticalkv", by={"name": "snapkv", "window": 4})
CHANGES = [replace_weights, cast_and_train, replace_modules, train_unseen]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_after_the_first_use_are_followed(change):
    """By caches that are made before and after, and by plain calls."""
    model = small("llama")
    ids = torch.randint(3, 97, (1, 90), generator=torch.Generator().manual_seed(1))
    old = PrunedCache(model, CRITICAL, 24)

    def read(model, cache):
        with torch.inference_mode():
            logits = model(ids, cache=cache).logits
        return logits, [cache.state(i).positions.sort(-1).values for i in range(3)]

    _, first = read(model, PrunedCache(model, CRITICAL, 24))
    change(model)
    same = copy.deepcopy(model)  # nothing was found out about it yet
    gc.collect()
    expected, kept = read(same, PrunedCache(same, CRITICAL, 24))
    assert not all(map(torch.equal, kept, first))  # the change matters
    for cache in (old, PrunedCache(model, CRITICAL, 24)):
        logits, retained = read(model, cache)
        assert torch.equal(logits, expected)
        assert all(map(torch.equal, kept, retained))
    with torch.inference_mode():
        calls = []
        for one in (model, same):
            with pruning(one, CRITICAL, Budget(tokens=24), context_tokens=60):
                calls.append(one(ids, use_cache=False).logits)
    assert torch.equal(*calls)


def test_a_projection_that_does_more_after_its_first_use_is_refused():
    model = small("llama")
    cache = PrunedCache(model, CRITICAL, 24)
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, given, made: 2 * made)
    with pytest.raises(UnsupportedModel, match="layer 1 of LlamaForCausalLM is not only a projection"):
        model(torch.tensor([[5, 6, 7]]), cache=cache)


def test_frequencies_of_a_model_that_is_cast_are_its_own():
    model = small("llama")
    exact = rotary_of(model)[0].frequencies
    rounded = rotary_of(model.bfloat16())[0].frequencies
    assert torch.equal(rounded, exact.bfloat16().float())
    assert not torch.equal(rounded, exact)
