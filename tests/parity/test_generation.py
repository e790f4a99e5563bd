"""Reading a sequence in one pass, in chunks and token by token through the bounded cache are the same thing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from a2sf.engine.trace import Trace
from a2sf.hf.attention import Plan, attached, mixes_windows, running
from a2sf.hf.generation import PrunedCache, pruning, retention_of
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policies
from tests.models import small
from tests.policies import of_models, ties

POLICIES = sorted(name for name, cls in of_models().items() if not ties(cls))
ARCHITECTURES = ["llama", "opt", "qwen2", "qwen3", "gpt_neox", "gpt2", "gemma3"]
TOKENS = 30
BUDGET = Budget(tokens=7)


def ids_for(rows: int = 2, length: int = TOKENS, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def one_pass(model, policy, budget: Budget, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [B, T, vocabulary] and, per layer, what is evicted at each step [B, K, T]."""
    rows, length = ids.shape
    layers = model.config.get_text_config().num_hidden_layers
    kept = retention_of(policy, budget if policy.uses_budget else None, length, length, layers)
    plan = Plan.of_rows(
        [length] * rows,
        [0] * rows,
        lambda row, layer: kept[layer],
        layers,
        policy_on_sliding=not mixes_windows(model.config),
        trace=True,
    )
    with torch.no_grad(), attached(model), running(plan):
        return model(ids, use_cache=False).logits, [plan.evicted[i] for i in range(layers)]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() < 1e-4 * max(1.0, float(b.abs().max()))


def check_kept(cache: PrunedCache, evicted: list[torch.Tensor], step: int) -> None:
    """Every layer's, row's and head's kept positions after `step` are those of the one pass."""
    for layer, gone in enumerate(evicted):
        positions = cache.state(layer).positions.numpy()
        for row in range(gone.shape[0]):
            evicted = gone[row : row + 1].numpy()
            trace = Trace(0, ("",) * gone.shape[-1], 0, evicted, received=evicted * 0.0, lost=evicted * 0.0)
            for head, kept in enumerate(trace.kept(step)[0]):
                assert np.flatnonzero(kept).tolist() == [p for p in positions[row, head] if p >= 0]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("policy", POLICIES)
def test_token_by_token_equals_one_pass(policy, name):
    model, ids, policy = small(name), ids_for(), find_policies()[policy]()
    expected, evicted = one_pass(model, policy, BUDGET, ids)
    cache = PrunedCache(model, policy, BUDGET)
    with torch.no_grad():
        for t in range(TOKENS):
            close(model(ids[:, t : t + 1], cache=cache).logits[:, 0], expected[:, t])
            check_kept(cache, evicted, t)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chunks", [[20], [1, 5, 3, 11], [9, 8, 2]])
def test_a_prompt_in_one_go_or_in_chunks_then_token_by_token(policy, chunks):
    model, ids, policy = small("llama"), ids_for(), find_policies()[policy]()
    expected, evicted = one_pass(model, policy, BUDGET, ids)
    cache, at = PrunedCache(model, policy, BUDGET, trace=len(chunks) == 3), 0
    with torch.no_grad():
        for size in [*chunks, *[1] * (TOKENS - sum(chunks))]:
            close(model(ids[:, at : at + size], cache=cache).logits, expected[:, at : at + size])
            at += size
            check_kept(cache, evicted, at - 1)
    if len(chunks) == 3:
        assert all(torch.equal(cache.evicted(i), e) for i, e in enumerate(evicted))


@pytest.mark.parametrize(
    ("name", "budget"),
    [("llama", Budget(tokens=7)), ("opt", Budget(ratio=0.3, base="context")), ("gpt2", Budget(ratio=0.3))],
)
def test_left_padding_never_enters_the_cache_and_each_row_has_its_own_budget(name, budget):
    model, ids = small(name), ids_for(rows=3)
    lengths, more = [12, 20, 5], 8
    mask = torch.zeros(3, 20, dtype=torch.long)
    padded = torch.zeros(3, 20, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, 20 - n :] = 1
        padded[row, 20 - n :] = ids[row, :n]
    for policy in map(find_policies().get, POLICIES):
        common = {"max_new_tokens": more, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        cache = PrunedCache(model, policy(), budget, max_new_tokens=more)
        together = model.generate(padded, attention_mask=mask, cache=cache, **common)
        for row, n in enumerate(lengths):
            own = PrunedCache(model, policy(), budget, max_new_tokens=more)
            alone = model.generate(ids[row : row + 1, :n], cache=own, **common)
            assert together.sequences[row, 20:].tolist() == alone.sequences[0, n:].tolist()
            for a, b in zip(together.logits, alone.logits, strict=True):
                close(a[row], b[0])
            for layer in range(3):
                a, b = cache.state(layer).positions[row], own.state(layer).positions[0]
                assert [x[x >= 0].tolist() for x in a] == [x[x >= 0].tolist() for x in b]


def test_generate_chooses_what_scoring_the_same_text_would():
    model, ids = small("llama"), ids_for(rows=2, length=15)
    for policy in map(find_policies().get, POLICIES):
        cache = PrunedCache(model, policy(), BUDGET)
        text = model.generate(ids, cache=cache, max_new_tokens=12, do_sample=False, eos_token_id=None)
        expected, evicted = one_pass(model, policy(), BUDGET, text)
        assert torch.equal(text[:, 15:], expected[:, 14:-1].argmax(-1))
        check_kept(cache, evicted, 25)  # the last token was chosen, not read


def test_beams_equal_beams_that_read_everything_anew():
    """Beam search that reorders the cache finds the sequences that a search without a cache finds."""
    model, ids = small("llama"), ids_for(rows=2, length=15)
    for policy in map(find_policies().get, POLICIES):
        common = {"max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
        cached = model.generate(ids, cache=PrunedCache(model, policy(), BUDGET), **common)
        with pruning(model, policy(), BUDGET):
            anew = model.generate(ids, use_cache=False, **common)
            supplied = model.generate(ids, **common)
        assert torch.equal(cached, anew)
        assert torch.equal(cached, supplied)


def test_sampling_with_a_seed_equals_sampling_that_reads_everything_anew():
    model, ids = small("qwen2"), ids_for(rows=2, length=15)
    for policy in map(find_policies().get, POLICIES):
        common = {"max_new_tokens": 10, "do_sample": True, "num_return_sequences": 3, "top_k": 5}
        torch.manual_seed(3)
        cached = model.generate(ids, cache=PrunedCache(model, policy(), BUDGET), **common)
        torch.manual_seed(3)
        with pruning(model, policy(), BUDGET):
            assert torch.equal(cached, model.generate(ids, use_cache=False, **common))


def test_a_conversation_goes_on_in_the_cache_of_its_last_turn():
    model, ids, more = small("llama"), ids_for(rows=2, length=12), ids_for(rows=2, length=9, seed=1)
    for policy in map(find_policies().get, POLICIES):
        cache = PrunedCache(model, policy(), BUDGET)
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        first = model.generate(ids, cache=cache, **settings)
        second = model.generate(torch.cat([first, more], 1), cache=cache, **settings)
        expected, evicted = one_pass(model, policy(), BUDGET, second)
        assert torch.equal(second[:, -6:], expected[:, -7:-1].argmax(-1))
        check_kept(cache, evicted, second.shape[1] - 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_calls_inside_pruning_read_padded_rows_as_if_alone(side):
    model, ids = small("llama"), ids_for()
    mask = torch.ones_like(ids)
    mask[1, slice(0, 11) if side == "left" else slice(19, None)] = 0
    for policy in map(find_policies().get, POLICIES):
        for keep in (False, True):
            with torch.no_grad(), pruning(model, policy(), Budget(ratio=0.3)):
                together = model(ids, attention_mask=mask, use_cache=keep).logits
                alone = model(ids[1:, mask[1].bool()], use_cache=keep).logits[0]
            close(together[1, mask[1].bool()], alone)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_backends_and_float64(backend):
    model, ids, policy = small("llama"), ids_for(), find_policies()["a2sf"]()
    if backend == "reference":
        model = model.double()
    expected, evicted = one_pass(model, policy, BUDGET, ids)
    cache = PrunedCache(model, policy, BUDGET, backend="auto" if backend == "reference" else backend)
    with torch.no_grad():
        close(model(ids[:, :10], cache=cache).logits, expected[:, :10])
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
        for t in range(10, TOKENS):
            close(model(ids[[1, 0, 1], t : t + 1], cache=cache).logits[:, 0], expected[[1, 0, 1], t])
    check_kept(cache, [e[[1, 0, 1]] for e in evicted], TOKENS - 1)


def test_smollm2(smollm2):
    """The small real model: the same logits and kept sets, over all policies."""
    model, tokenizer = smollm2.model, smollm2.tokenizer
    text = "The keeper of the lighthouse counted the ships that passed in the night and wrote each one down by name."
    ids = tokenizer(text, return_tensors="pt").input_ids
    prompt = ids.shape[1] - 6
    for policy in map(find_policies().get, POLICIES):
        expected, evicted = one_pass(model, policy(), BUDGET, ids)
        cache = PrunedCache(model, policy(), BUDGET)
        with torch.no_grad():
            close(model(ids[:, :prompt], cache=cache).logits, expected[:, :prompt])
            for t in range(prompt, ids.shape[1]):
                close(model(ids[:, t : t + 1], cache=cache).logits[:, 0], expected[:, t])
                check_kept(cache, evicted, t)
