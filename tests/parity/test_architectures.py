"""Every architecture of docs/models.md: exact at a full budget, the same when scored and when decoded at a small one."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from a2sf import A2SF, Budget
from a2sf.errors import ConfigError
from a2sf.hf.attention import Plan, UnsupportedModel, attached, mixes_windows, running
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.calls.logits import logits_at
from a2sf.hf.exactness import check_exact
from a2sf.hf.scope import pruning
from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.model.softmax import PLAIN, Softmax
from tests.architectures import REFUSED, SUPPORTED, UNDECODABLE, WITH_SOFTMAX, Architecture, table
from tests.models import CONFIGS

TOKENS, BUDGET = 24, 6
DOCS = Path(__file__).parents[2] / "docs" / "models.md"
# in `make test` the small models that other tests take, and one of each kind that the table has something to say about
QUICK = [*SUPPORTED[: len(CONFIGS)], *{of.note: of for of in reversed(SUPPORTED)}.values()]
by_name = pytest.mark.parametrize(
    "of", [pytest.param(of, marks=[] if of in QUICK else pytest.mark.full) for of in SUPPORTED], ids=lambda of: of.kind
)


@cache
def model_of(of: Architecture) -> PreTrainedModel:
    return of.model()


@cache
def ids() -> torch.Tensor:
    return torch.randint(3, 88, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def scored(model: PreTrainedModel, retention: Retention, tokens: torch.Tensor) -> torch.Tensor:
    rows, length = tokens.shape
    layers = model.config.get_text_config().num_hidden_layers
    sliding = not mixes_windows(model.config)
    plan = Plan.of_rows([length] * rows, [0] * rows, lambda row, layer: retention, layers, policy_on_sliding=sliding)
    with torch.no_grad(), attached(model), running(plan):
        return model(tokens, use_cache=False).logits


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() < 1e-3 * max(1.0, float(b.abs().max()))


@by_name
def test_nothing_evicted_is_the_models_own(of):
    model = model_of(of)
    with torch.no_grad():
        own = model(ids(), use_cache=False).logits
    close(scored(model, Retention(budget=UNLIMITED), ids()), own)
    check_exact(model)


@pytest.mark.parametrize("of", WITH_SOFTMAX, ids=lambda of: of.kind)
def test_without_softcap_or_sinks_it_would_be_another_model(of, monkeypatch):
    model = model_of(of)
    with torch.no_grad():
        own = model(ids(), use_cache=False).logits
    monkeypatch.setattr(Softmax, "of", staticmethod(lambda *_: PLAIN))
    assert (scored(model, Retention(budget=UNLIMITED), ids()) - own).abs().max() > 0.1 * own.abs().max()
    with pytest.raises(UnsupportedModel, match="not the softmax attention that the engine computes"):
        check_exact(model)


@pytest.mark.parametrize("of", WITH_SOFTMAX, ids=lambda of: of.kind)
def test_compiled_kernels_are_refused_for_them_in_one_sentence(of):
    model, policy, budget = model_of(of), A2SF(), Budget(tokens=BUDGET)
    with torch.no_grad(), pruning(model, policy, budget, backend="numba"):
        for more in ({"use_cache": False}, {"cache": PrunedCache(model, policy, budget, backend="numba")}):
            with pytest.raises(
                ConfigError, match="backend=numba is not allowed: numba does not know the softcap or"
            ) as raised:
                model(ids(), **more)
            assert "\n" not in str(raised.value)


@by_name
def test_scoring_is_decoding_at_a_small_budget(of):
    model, budget = model_of(of), Budget(tokens=BUDGET)
    expected = scored(model, A2SF(forgetting_factor=0.5).retention(BUDGET, 0), ids())
    assert (expected - scored(model, Retention(budget=UNLIMITED), ids())).abs().max() > 1e-2  # it does prune
    for cuts in ([1] * TOKENS, [10, 5, 1, 8]):
        held, at = PrunedCache(model, A2SF(forgetting_factor=0.5), budget), 0
        with torch.no_grad():
            for n in cuts:
                close(model(ids()[:, at : at + n], cache=held).logits, expected[:, at : at + n])
                at += n


@by_name
def test_a_padded_row_is_the_row(of):
    model, policy, budget = model_of(of), A2SF(forgetting_factor=0.5), Budget(tokens=BUDGET)
    mask = torch.ones_like(ids())
    mask[1, :9] = 0
    held, alone = PrunedCache(model, policy, budget), PrunedCache(model, policy, budget)
    more = torch.full((2, 1), 5)
    with torch.no_grad(), pruning(model, policy, budget):
        together = model(ids(), attention_mask=mask, cache=held).logits
        close(together[1, 9:], model(ids()[1:, 9:], cache=alone).logits[0])
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        after = model(more, attention_mask=longer, cache=held).logits
        close(after[1], model(more[1:], cache=alone).logits[0])
        close(model(ids(), attention_mask=mask, use_cache=False).logits[1, 9:], together[1, 9:])


@by_name
def test_logits_where_they_are_requested(of):
    model, index = model_of(of), torch.tensor([2, 3, 11])
    with torch.no_grad():
        close(logits_at(model, index, input_ids=ids(), use_cache=False), model(ids(), use_cache=False).logits[:, index])


@pytest.mark.parametrize("of", REFUSED, ids=lambda of: of.kind)
def test_what_cannot_be_pruned_is_refused_with_the_reason(of):
    with pytest.raises(UnsupportedModel, match=of.refused) as raised:
        check_exact(of.model())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("of", UNDECODABLE, ids=lambda of: of.kind)
def test_what_can_be_scored_and_not_generated_with_says_so(of):
    model, policy, budget = of.model(), A2SF(forgetting_factor=0.5), Budget(tokens=BUDGET)
    check_exact(model)
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match=of.undecodable):
            PrunedCache(model, policy, budget)
    with torch.no_grad(), pruning(model, policy, budget):
        plain = model(ids(), use_cache=False).logits
        with pytest.raises(UnsupportedModel, match=of.undecodable):
            model(ids(), use_cache=True)
    close(plain, scored(model, policy.retention(BUDGET, 0), ids()))


def test_the_page_has_the_table():
    written = re.search(r"<!-- table:begin -->\n(.*?)\n<!-- table:end -->", DOCS.read_text(), re.DOTALL)
    assert written is not None
    assert written[1] == table(), "python -m tests.architectures prints it"
