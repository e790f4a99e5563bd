"""Real architectures: a budget that evicts nothing gives the model's own logits, a smaller one the reference's."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama import modeling_llama

from a2sf import A2SF
from a2sf.hf.attention import NonFiniteError, Plan, UnsupportedModel, attached, mixes_windows, pruned_attention, running
from a2sf.hf.exactness import check_exact
from a2sf.hf.loading import ModelSpec, load
from a2sf.policies.base import UNLIMITED, Retention
from tests.conftest import SMOLLM2
from tests.models import CONFIGS, NO_SDPA, small

TOKENS = 40


def logits(model, retention: Retention, ids: torch.Tensor, mask: torch.Tensor | None = None, backend: str = "auto"):
    rows, length = ids.shape
    lengths = [length] * rows if mask is None else mask.sum(1).tolist()
    plan = Plan.of_rows(
        lengths,
        [0] * rows,
        lambda segment, layer: retention,
        model.config.get_text_config().num_hidden_layers,
        policy_on_sliding=not mixes_windows(model.config),
        backend=backend,
    )
    with torch.no_grad(), attached(model), running(plan):
        return model(ids, attention_mask=mask, use_cache=False).logits


def ids_for(seed: int = 0, rows: int = 2, length: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "own"), [(n, own) for n in CONFIGS for own in ("sdpa", "eager") if own == "eager" or n not in NO_SDPA]
)
def test_a_budget_that_evicts_nothing_gives_the_models_own_logits(name, own):
    model = small(name)
    model.set_attn_implementation(own)
    ids = ids_for()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    for budget in (UNLIMITED, TOKENS):
        got = logits(model, Retention(budget=budget), ids)
        assert (got - expected).abs().max() < 1e-4 * max(1, float(expected.abs().max()))
    assert model.config._attn_implementation == own  # given back


@pytest.mark.parametrize("name", CONFIGS)
def test_a_smaller_budget_gives_the_references(name):
    model, ids = small(name), ids_for()
    retention = Retention(budget=6, recent=2, sinks=1, forgetting_factor=0.5)
    got = logits(model, retention, ids)
    expected = logits(model, retention, ids, backend="reference")
    assert (got - expected).abs().max() < 1e-3 * max(1, float(expected.abs().max()))
    unpruned = logits(model, Retention(budget=UNLIMITED), ids)
    assert (got - unpruned).abs().max() > 1e-2  # it does prune


def test_padding_does_not_change_a_row():
    model, ids = small("llama"), ids_for()
    retention = Retention(budget=6, forgetting_factor=0.3)
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    padded = logits(model, retention, ids, mask)
    alone = logits(model, retention, ids[1:, :25])
    torch.testing.assert_close(padded[1, :25], alone[0], atol=1e-4, rtol=1e-4)


def test_gemma_keeps_its_sliding_layers_and_prunes_the_global_one():
    """A policy that keeps almost nothing changes a Gemma-3 less than the same model whose every layer is global."""
    model, ids = small("gemma3"), ids_for()
    plan_layers = []
    retention = Retention(budget=4, forgetting_factor=0.5)
    plan = Plan.of_rows([TOKENS] * 2, [0] * 2, lambda segment, layer: retention, 3, policy_on_sliding=False)
    for layer, window in enumerate((8, None, 8)):
        plan_layers.append((int(plan.segments(layer, window).budget[0]), int(plan.segments(layer, window).recent[0])))
    assert plan_layers == [(7, 7), (4, 0), (7, 7)]
    assert logits(model, retention, ids).isfinite().all()


def test_a_sliding_window_on_every_layer_is_honoured_or_refused():
    model = small("mistral", sliding_window=16)
    with torch.no_grad():
        expected = model(ids_for(), use_cache=False).logits
    got = logits(model, Retention(budget=UNLIMITED), ids_for())
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(UnsupportedModel, match="sliding window of 16 tokens"):
        logits(model, Retention(budget=6), ids_for())
    assert logits(model, Retention(budget=6), ids_for(length=16)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_supported_models_pass_the_check(name, dtype):
    check_exact(small(name).to(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_positions_that_do_not_follow_the_ids_are_found_in_every_dtype(dtype):
    model = load(ModelSpec(path=SMOLLM2, device="cpu", dtype=dtype)).model  # which passes the check
    rotary = model.model.rotary_emb
    own = rotary.forward
    rotary.forward = lambda x, position_ids: own(x, torch.arange(x.shape[1])[None].expand_as(position_ids))
    with pytest.raises(UnsupportedModel, match="does not reproduce"):
        check_exact(model)


def test_an_argument_the_engine_does_not_know_is_refused_by_name():
    x = torch.zeros(1, 4, 2, 8)
    layer = small("llama").model.layers[0].self_attn
    with (
        running(Plan.of_rows([2], [0], lambda s, i: Retention(budget=2), 0)),
        pytest.raises(UnsupportedModel) as raised,
    ):
        pruned_attention(layer, x, x[:, :2], x[:, :2], None, position_bias=torch.zeros(1))
    assert "position_bias" in str(raised.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_reported_with_the_layer(bad):
    model = small("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 4] = bad
    with pytest.raises(NonFiniteError, match="key of layer 1"):
        logits(model, Retention(budget=6), ids_for())


def test_no_model_class_is_patched():
    before = modeling_llama.LlamaAttention.forward
    logits(small("llama"), A2SF().retention(6, 0), ids_for())
    assert modeling_llama.LlamaAttention.forward is before
