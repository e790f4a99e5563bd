"""Gradients are right, through the reference, or refused; never left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from a2sf import A2SF, Budget, CaM, Policy, attend, evicting_attention, pruning
from a2sf.errors import ConfigError, UserError
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.policies.schedule import schedule_for
from tests.models import small
from tests.policies import cases, label, tiered

IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))


def given(dtype: torch.dtype = torch.float64, heads: int = 4, tokens: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, tokens, 4), (1, 2, tokens, 4), (1, 2, tokens, 3))
    return [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]


def run(policy, schedule, query, key, value, state=None):
    budget = 4 if policy.uses_budget else None
    prompt = 6 if schedule_for(policy, schedule).prompt else None
    more = {"layers": 3, "layer": 1, "backend": "reference", "schedule": schedule, "prompt": prompt, "state": state}
    return attend(policy, query, key, value, budget=budget, **more)


EACH = {(p.name, label(s)): (p, s) for p, s in cases() if type(p).merge is Policy.merge}.values()


@pytest.mark.parametrize(("policy", "schedule"), tiered(EACH), ids=label)
def test_the_reference_has_gradients(policy, schedule):
    """The same as finite differences, which hold what is kept fixed as well: it changes in steps."""
    assert torch.autograd.gradcheck(lambda q, k, v: run(policy, schedule, q, k, v)[0], given(), fast_mode=True)


def test_a_policy_that_merges_has_none():
    with pytest.raises(UserError, match=r"merges what it evicts has no gradient; call it under torch\.no_grad"):
        run(CaM(), None, *given())
    with torch.no_grad():
        run(CaM(), None, *given())


def test_a_gradient_goes_through_a_state():
    at_once, parts = given(), given()
    run(A2SF(), None, *at_once)[0].square().sum().backward()
    first, state = run(A2SF(), None, *(x[:, :, :5] for x in parts))
    second, _ = run(A2SF(), None, *(x[:, :, 5:] for x in parts), state=state)
    (first.square().sum() + second.square().sum()).backward()
    for a, b in zip(at_once, parts, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    later = [x[:, :, 5:].detach() for x in parts]
    with pytest.raises(ConfigError, match="only reference has gradients"):
        attend(A2SF(), *later, budget=4, state=state, backend="torch")


@pytest.mark.parametrize("backend", ["auto", "numba", "torch"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_other_backends_refuse_them(backend, which):
    inputs = [x.detach().requires_grad_(i == which) for i, x in enumerate(given(torch.float32))]
    numbers = {"budget": 4, "recent": 0, "forgetting_factor": 0.2, "backend": backend}
    with pytest.raises(ConfigError, match="only reference has gradients"):
        evicting_attention(*inputs, **numbers)
    with pytest.raises(ConfigError, match="only reference has gradients"):
        attend(A2SF(), *inputs, budget=4, backend=backend)
    with torch.no_grad():
        assert not evicting_attention(*inputs, **numbers)[0].requires_grad


def gradients(model, **more) -> dict[str, Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS, **more).loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


def test_a_models_gradients_go_through_the_reference_or_are_refused():
    model = small("llama")
    own = gradients(model)
    for backend in ("auto", "torch"):
        for keep in (False, True):
            with pruning(model, A2SF(), Budget(tokens=1000), backend=backend):
                with pytest.raises(UserError, match="which only backend=reference can be"):
                    gradients(model, use_cache=keep)
                assert model(IDS, use_cache=keep).logits.isfinite().all()
    with pruning(model, A2SF(), Budget(tokens=1000), backend="reference"):
        ours = gradients(model, use_cache=False)
    torch.testing.assert_close(ours, own, atol=1e-4, rtol=1e-3)
    with pruning(model, A2SF(), Budget(tokens=6), backend="reference"):
        once = gradients(model, use_cache=False)
    cache = PrunedCache(model, A2SF(), Budget(tokens=6), backend="reference")
    torch.testing.assert_close(gradients(model, cache=cache), once, atol=1e-4, rtol=1e-3)
    assert (
        once["model.layers.0.self_attn.k_proj.weight"] - own["model.layers.0.self_attn.k_proj.weight"]
    ).abs().max() > 0.01
