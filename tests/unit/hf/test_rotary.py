"""Keys before the rotary embedding: undone for models of every kind, or refused in one sentence."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import pytest
import torch

from a2sf import Policy, PrunedCache, Retention, attend
from a2sf.hf.attention import UnsupportedModel
from a2sf.hf.calls.around import cache_name_of
from a2sf.hf.rotary import rotary_of
from a2sf.policies.model.rotary import Rotary
from tests.architectures import SUPPORTED
from tests.models import CONFIGS, shared
from tests.own_policies import Watched

POSITIONAL = {"gpt2", "opt"}
"""Small models with absolute positions instead."""


@dataclass(frozen=True, kw_only=True)
class Seeing(Policy):
    """Notes what it is shown at a cut."""

    name, label, unrotated, queries = "seeing", "Seeing", True, 3
    seen: list = field(default_factory=list)

    def retention(self, budget, layer):
        return Retention(budget=budget)

    def priorities(self, step):
        self.seen.append(step)
        return step.keys[..., 0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_a_policy_sees_is_what_the_models_layers_project(kind):
    model = shared(kind)
    if kind in POSITIONAL:
        with pytest.raises(UnsupportedModel, match=r"the keys of layer 0 of .* depend on positions in another way"):
            PrunedCache(model, Seeing(), 4, schedule="prompt")
        return
    found = rotary_of(model)
    assert found is rotary_of(model)
    assert all(r is not None for r in found)
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    policy, projected = Seeing(), []
    cache = PrunedCache(model, policy, 4, schedule="prompt")
    last = [m for n, m in model.named_modules() if n.endswith(("k_norm", "k_proj"))]
    last = last if kind not in ("qwen3", "gemma3") else [m for n, m in model.named_modules() if n.endswith("k_norm")]
    hooks = [m.register_forward_hook(lambda m, i, out: projected.append(out.detach())) for m in last]
    with torch.inference_mode():
        model(ids, **{cache_name_of(model): cache}, use_cache=True)
    for hook in hooks:
        hook.remove()
    assert len(projected) in (0, len(found))
    seen = {step.layer: step for step in policy.seen}
    assert seen
    for layer, step in seen.items():
        assert step.layers == len(found)
        assert step.queries.shape[3] == 3
        assert int(step.prompt) == 12
        if not projected:
            continue  # the projection is of queries, keys and values together
        K, D = step.keys.shape[1], step.keys.shape[3]
        keys = projected[layer].reshape(1, 12, K, D) if projected[layer].ndim == 3 else projected[layer]
        keys = keys.transpose(1, 2) if keys.shape[1] != K else keys
        torch.testing.assert_close(step.unrotated_keys, keys, atol=1e-4, rtol=1e-4)
        assert (step.keys - keys).abs().max() > 0.01
        assert torch.allclose(step.rotary.rotate(step.unrotated_keys, step.positions), step.keys, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("of", SUPPORTED, ids=lambda of: of.kind)
def test_every_architecture_is_known_or_refused(of):
    model = of.model()
    with suppress(UnsupportedModel):
        assert len(rotary_of(model)) == model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_is_undone_and_is_relative(interleaved):
    g = torch.Generator().manual_seed(0)
    rotary = Rotary(torch.tensor([1.0, 0.1, 0.01]), scaling=1.5, interleaved=interleaved)
    x, y = torch.randn(2, 1, 2, 5, 8, generator=g).double()
    at = torch.tensor([0, 3, 4, 9, 1000])
    torch.testing.assert_close(rotary.unrotate(rotary.rotate(x, at), at), x)
    assert torch.equal(rotary.rotate(x, at)[..., 6:], x[..., 6:])  # beyond what is rotated
    x, y = x[..., :6], y[..., :6]
    a = (rotary.rotate(x, at) * rotary.rotate(y, at + 7)).sum(-1)
    b = (rotary.rotate(x, at + 50) * rotary.rotate(y, at + 57)).sum(-1)
    torch.testing.assert_close(a, b)
    # by complex numbers
    pairs = x[..., :6].unflatten(-1, (3, 2)) if interleaved else x[..., :6].unflatten(-1, (2, 3)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones(5, 3).double(), at[:, None] * rotary.frequencies.double()
    )
    real = torch.view_as_real(turned)
    expected = real.flatten(-2) if interleaved else real.transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(rotary.rotate(x, at)[..., :6], 1.5 * expected)


def test_without_a_model_keys_are_as_they_are():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 12, 8, generator=g) for h in (4, 2, 2))
    policy = Seeing()
    attend(policy, q, k, v, budget=4, schedule="prompt", prompt=10)
    (step,) = policy.seen
    assert step.rotary is None
    assert torch.equal(step.unrotated_keys, k[:, :, :10])
    assert torch.equal(step.queries.flatten(1, 2), q[:, :, 7:10])
    assert torch.equal(step.unrotated_queries, step.queries)
    assert step.query_positions.tolist() == [[[[7, 8, 9]]]]
    assert Watched().keeps(4).rule.unrotated
