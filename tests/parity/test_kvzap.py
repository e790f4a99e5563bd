"""KVzap: scores of random gates by plain torch from what each layer's attention reads, and what follows from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from a2sf import Budget, KVzap, PrunedCache, Schedule, pruning
from a2sf.errors import ConfigError
from a2sf.hf.attention import Plan, UnsupportedModel, attached, running
from a2sf.hf.reader import ModelReader, prepared_for
from a2sf.hf.settings import retention_of
from a2sf.policies.prepared import Numbers, Prepared
from tests.gates import random_gates, write_gates
from tests.models import shared, small

LAYERS, K, HIDDEN, PROMPT, TOKENS = 3, 2, 32, 24, 30
IDS = 3 + torch.randperm(90, generator=torch.Generator().manual_seed(0))[None, :TOKENS]
"""No token twice: in the first layer both would have the same score."""
TEXT = IDS[0, :PROMPT].tolist()


def by_torch(model, tensors: dict[str, Tensor], tokens: list[int]) -> list[Tensor]:
    """The scores [K, T] of each layer: its gate as a module of torch, on the input norm's output in the model's own pass."""
    read: dict[int, Tensor] = {}
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda m, args, out, i=i: read.update({i: out[0]}))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    linear = "layers.0.weight" in tensors
    inner = None if linear else tensors["layers.0.0.bias"].numel()
    gate = nn.Linear(HIDDEN, K) if linear else nn.Sequential(nn.Linear(HIDDEN, inner), nn.GELU(), nn.Linear(inner, K))
    found = []
    for i in range(len(read)):
        start = f"layers.{i}."
        gate.load_state_dict({n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)})
        with torch.no_grad():
            found.append(gate(read[i]).T)
    return found


@pytest.fixture(scope="module", params=[None, 8], ids=["linear", "mlp"])
def gates(request, tmp_path_factory):
    """The folder of some gates, and their tensors."""
    tensors = random_gates(LAYERS, K, HIDDEN, request.param)
    return str(write_gates(tmp_path_factory.mktemp("gates"), tensors)), tensors


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_scores_are_those_of_the_published_definition(gates, kind):
    folder, tensors = gates
    found = prepared_for(shared(kind), KVzap(gates=folder), TEXT)
    for numbers, want in zip(found.numbers, by_torch(shared(kind), tensors, TEXT), strict=True):
        torch.testing.assert_close(numbers.of, want, atol=1e-5, rtol=1e-5)


def retained(policy: KVzap, budget: int | None, then: str = "keep") -> list[list[set[int]]]:
    """What is held of the prompt, of each layer and head, after the prompt and further tokens were read."""
    model = shared("llama")
    cache = PrunedCache(model, policy, budget, schedule=f"prompt{'' if then == 'keep' else '-' + then}")
    with torch.inference_mode():
        model(IDS[:, :PROMPT], cache=cache)
        for t in range(PROMPT, TOKENS):
            model(IDS[:, t : t + 1], cache=cache)
    states = [cache.state(i).positions[0].tolist() for i in range(LAYERS)]
    return [[{p for p in head if p >= 0} for head in layer] for layer in states]


def test_a_budget_retains_the_best_of_the_whole_model(gates):
    """A window in every head, and beside the windows the tokens with the largest scores of all layers and heads."""
    folder, tensors = gates
    C, window = 9, 3
    scores = torch.stack(by_torch(shared("llama"), tensors, TEXT))
    scores[..., -window:] = torch.inf
    best = scores >= scores.flatten().topk(LAYERS * K * C).values[-1]
    held = retained(KVzap(gates=folder, window=window), C)
    counts = [sum(len(head) - (TOKENS - PROMPT) for head in layer) for layer in held]
    assert sum(counts) == LAYERS * K * C
    for layer, (of_layer, wanted) in enumerate(zip(held, best, strict=True)):
        # a layer's slots are a whole number for each head, so that it may have a token more or less than it wins
        assert abs(counts[layer] - int(wanted.sum())) <= K
        joint = [(layer_head, p) for layer_head in range(K) for p in of_layer[layer_head] if p < PROMPT]
        order = scores[layer].flatten().argsort(descending=True)[: counts[layer]].tolist()
        assert sorted(joint) == sorted((i // PROMPT, i % PROMPT) for i in order)


def test_with_equal_slots_each_head_retains_its_own_best(gates):
    folder, tensors = gates
    held = retained(KVzap(gates=folder, window=0, equal_slots=True), 9)
    for of_layer, scores in zip(held, by_torch(shared("llama"), tensors, TEXT), strict=True):
        for head, score in zip(of_layer, scores, strict=True):
            assert head == {*score.topk(9).indices.tolist(), *range(PROMPT, TOKENS)}


@pytest.mark.parametrize("then", ["keep", "step"])
def test_a_threshold_retains_what_reaches_it_and_the_newest(gates, then):
    """Under `step`, a token of the prompt is judged when it leaves the window; later ones have no score and stay."""
    folder, tensors = gates
    window, threshold = 4, 0.2
    end = PROMPT if then == "keep" else TOKENS
    held = retained(KVzap(gates=folder, threshold=threshold, window=window), None, then)
    sizes = set()
    for of_layer, scores in zip(held, by_torch(shared("llama"), tensors, TEXT), strict=True):
        for head, score in zip(of_layer, scores.tolist(), strict=True):
            stays = {p for p in range(PROMPT) if score[p] >= threshold or p >= end - window}
            assert head == stays | set(range(PROMPT, TOKENS))
            sizes.add(len(head))
    assert len(sizes) > 1


def test_scored_in_one_pass_and_generated_token_by_token(gates):
    model, schedule = shared("llama"), Schedule("prompt")
    for policy in (KVzap(gates=gates[0], window=2), KVzap(gates=gates[0], window=2, threshold=0.1)):
        budget = Budget(tokens=8) if policy.uses_budget else None
        ready = prepared_for(model, policy, TEXT)
        kept = retention_of(policy, budget, TOKENS, PROMPT, LAYERS, schedule, ready)
        plan = Plan.of_rows(
            [TOKENS],
            [0],
            lambda row, layer, kept=kept: kept[layer],
            LAYERS,
            schedule=schedule,
            prompt=lambda row: PROMPT,
        )
        with torch.inference_mode(), attached(model), running(plan):
            want = model(IDS, use_cache=False).logits
        cache = PrunedCache(model, policy, budget, context_tokens=PROMPT)
        with torch.inference_mode():
            got = [model(IDS[:, :PROMPT], cache=cache).logits]
            got += [model(IDS[:, t : t + 1], cache=cache).logits for t in range(PROMPT, TOKENS)]
        assert (torch.cat(got, 1) - want).abs().max() < 1e-3 * float(want.abs().max())


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "opt", "gemma3", "phi3", "gpt_neox", "gpt2", "gemma2", "gpt_oss"]
)
def test_hidden_states_are_what_the_projections_read(kind):
    """The model's own projection of them gives the values that were read."""
    model = small(kind)
    found = ModelReader(model, hidden_states=True).read(TEXT, lambda read: (read.hidden, read.value))
    for layer, (hidden, value) in enumerate(found):
        attention = next(
            m for m in model.modules() if getattr(m, "layer_idx", None) == layer and "Attention" in type(m).__name__
        )
        names = ("v_proj", "qkv_proj", "query_key_value", "c_attn")
        project = next(p for n in names if (p := getattr(attention, n, None)) is not None)
        with torch.inference_mode():
            made = project(hidden)
        heads, size = value.shape[0], value.shape[2]
        if kind == "gpt_neox":  # query, key and value of one head after another
            made = made.unflatten(-1, (heads, 3, size))[:, :, 2]
        else:
            made = made[:, -heads * size :].unflatten(-1, (heads, size))
        torch.testing.assert_close(made.transpose(0, 1), value, atol=1e-5, rtol=1e-5)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_policies_that_do_not_use_hidden_states_do_not_get_them():
    assert ModelReader(shared("llama")).read(TEXT, lambda read: read.hidden) == [None] * LAYERS


def test_a_model_whose_hidden_states_are_not_known_is_refused():
    model = small("llama")
    for layer in model.model.layers:
        kind = type(layer.self_attn)
        layer.self_attn.__class__ = type("Mixer", (kind,), {})
    with pytest.raises(UnsupportedModel, match="what the attention of layer 0 of the model reads is not known"):
        prepared_for(model, KVzap(), TEXT)


def test_random_gates_suit_any_model_and_are_always_the_same():
    first, again = (prepared_for(shared(kind), KVzap(), TEXT) for kind in ("llama", "llama"))
    assert all(torch.equal(a.of, b.of) for a, b in zip(first.numbers, again.numbers, strict=True))
    assert not torch.equal(first.numbers[0].of, first.numbers[1].of)


def test_gates_of_another_model_are_refused(tmp_path):
    wide = KVzap(gates=str(write_gates(tmp_path / "wide", random_gates(LAYERS, K, 48))))
    with pytest.raises(ConfigError, match=r"they read hidden states of 48 numbers, and this model's have 32"):
        prepared_for(shared("llama"), wide, TEXT)
    for layers, heads in ((4, K), (LAYERS, 3)):
        other = KVzap(gates=str(write_gates(tmp_path / f"{layers}-{heads}", random_gates(layers, heads, HIDDEN))))
        said = rf"a model of {layers} layers of {heads} key/value heads, and this one has 3 layers of 2"
        with pytest.raises(ConfigError, match=said):
            PrunedCache(shared("llama"), other, 8)
        with pytest.raises(ConfigError, match=said), pruning(shared("llama"), other, 8):
            pass


def test_gates_that_change_or_are_not_finite_are_refused(tmp_path):
    tensors = random_gates(LAYERS, K, HIDDEN)
    policy = KVzap(gates=str(write_gates(tmp_path / "a", tensors)))
    write_gates(tmp_path / "a", random_gates(LAYERS, K, HIDDEN, seed=1))
    with pytest.raises(ConfigError, match=r"policy\.gates=a is not allowed: it changed after it was first read"):
        prepared_for(shared("llama"), policy, TEXT)
    tensors["layers.1.bias"][0] = torch.nan
    policy = KVzap(gates=str(write_gates(tmp_path / "b", tensors)))
    with pytest.raises(ConfigError, match="some of its weights are not finite"):
        prepared_for(shared("llama"), policy, TEXT)


def test_the_newest_tokens_count_first_when_slots_are_divided():
    """Else a layer with small scores would have fewer slots than it must retain."""
    low = torch.zeros(1, 6)
    high = torch.arange(1.0, 7)[None]
    numbers = (Numbers(low), Numbers(high))
    assert Prepared(numbers, by_numbers=True, recent=2).budgets(8, 6) == (2, 6)
    assert Prepared(numbers, by_numbers=True, recent=2).budgets(6, 6) == (2, 4)
    assert Prepared(numbers, by_numbers=True).budgets(6, 6) == (1, 5)
    assert torch.equal(low, torch.zeros(1, 6))  # not in place
