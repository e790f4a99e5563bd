"""Functions and heads of a rule of one's own that cannot be right are refused, by every way to run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from a2sf import Policy, PrunedCache, Retention, Rule, Schedule, attend
from a2sf.errors import ConfigError, PolicyError, UserError
from a2sf.policies.rule import Step
from tests.models import shared

HERE = r"\(.*test_own_rules.py, line \d+\)"
SCHEDULES = [Schedule(), Schedule("every", every=2), Schedule("prompt"), Schedule("prompt", then="step")]


def own(rule: Rule, **more: Any) -> Policy:
    """A policy of one's own with this rule; its name is inherited, so that other tests do not find it."""
    known = type("Named", (), {"name": "own_rule", "label": "Own rule"})

    @dataclass(frozen=True, kw_only=True)
    class Own(known, Policy):
        def retention(self, budget: int, layer: int) -> Retention:
            return Retention(budget=budget, rule=rule)

    for name, x in more.items():
        setattr(Own, name, x)
    return Own()


def tensors(tokens: int = 9):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(2, heads, tokens, 8, generator=g) for heads in (4, 2, 2))


def nan(keys, values, positions):
    return values.norm(dim=-1) * torch.nan


def one_nan(keys, values, positions):
    return torch.where(positions == 2, torch.nan, values.norm(dim=-1))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize(("field", "what"), [("weight", "weights"), ("bias", "biases")])
@pytest.mark.parametrize("function", [nan, one_nan])
def test_nan_for_a_token_is_refused(function, field, what, backend, schedule):
    """Before, such a token counted as the best one, and the policy became a window."""
    policy = own(Rule(**{field: function}))
    with pytest.raises(
        PolicyError, match=rf"^{function.__name__} returns NaN among its {what} of cached tokens; .*{HERE}$"
    ):
        attend(policy, *tensors(), budget=4, schedule=schedule, prompt=7, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_nan_for_a_later_token_is_refused_in_a_cache(backend):
    def late(keys, values, positions):
        return torch.where(positions == 11, torch.nan, values.norm(dim=-1))

    model = shared("llama")
    cache = PrunedCache(model, own(Rule(weight=late)), 4, backend=backend)
    ids = torch.arange(3, 13)[None]
    out = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    model(out, past_key_values=cache)
    with pytest.raises(PolicyError, match="late returns NaN among its weights"):
        model(out, past_key_values=cache)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("field", ["weight", "bias"])
def test_nan_of_a_column_without_a_token_counts_for_nothing(field, backend):
    """Padding has keys of length 0."""

    def direction(keys, values, positions):
        return keys[..., 0] / keys.norm(dim=-1) + 2

    q, k, v = tensors()
    k = k * (torch.arange(9) < torch.tensor([[4], [9]]))[:, None, :, None]
    lengths = torch.tensor([4, 9])
    policy = own(Rule(**{field: direction}))
    out, state = attend(policy, q, k, v, budget=3, lengths=lengths, backend=backend)
    alone, _ = attend(policy, q[:1, :, :4], k[:1, :, :4], v[:1, :, :4], budget=3, backend=backend)
    torch.testing.assert_close(out[:1, :, :4], alone)
    attend(policy, q, k, v, budget=3, lengths=lengths, state=state, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_numbers_of_another_shape_are_refused(backend):
    said = rf"^<lambda> returns weights of shape \(2, 2\), and \(2, 2, 9\) is needed, one number per token {HERE}$"
    with pytest.raises(PolicyError, match=said.replace("<lambda>", ".*<lambda>")):
        attend(own(Rule(weight=lambda k, v, p: v[:, :, 0, 0])), *tensors(), budget=4, backend=backend)


def test_a_function_that_is_made_at_each_call_is_reported():
    class Made(Policy):
        name, label = "function_made_anew", "Function made anew"

        def retention(self, budget: int, layer: int) -> Retention:
            return Retention(budget=budget, rule=Rule(weight=lambda keys, values, positions: values.norm(dim=-1)))

    with pytest.raises(
        UserError, match=r"or its `retention` makes a new function at each call; .* outside of `retention`"
    ):
        attend(Made(), *tensors(), budget=4)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("priorities", [None, lambda self, step: step.scores], ids=["data", "function"])
def test_heads_that_a_layer_does_not_have(priorities, schedule, backend):
    more = {} if priorities is None else {"priorities": priorities}
    policy, said = own(Rule(full_heads=(0, 7)), **more), "full_heads=7 is not allowed: the layer has 2 key/value heads"
    with pytest.raises(ConfigError, match=said):
        attend(policy, *tensors(), budget=4, schedule=schedule, prompt=7, backend=backend)
    model = shared("llama")
    with pytest.raises(ConfigError, match=said):
        model(torch.arange(3, 13)[None], past_key_values=PrunedCache(model, policy, 4, schedule=schedule))


@pytest.mark.parametrize(
    ("heads", "said"),
    [((-1,), "counts key/value heads from 0, got -1"), ((1, 0, 1), r"has a key/value head twice, \(1, 0, 1\)")],
)
def test_heads_that_no_layer_has(heads, said):
    with pytest.raises(ValueError, match=f"full_heads {said}"):
        Rule(full_heads=heads)


def test_a_step_is_as_it_was():
    """The check changes no number: a weight of 1 is no weight."""

    def priorities(self, step: Step):
        return step.scores

    want = attend(own(Rule()), *tensors(), budget=4)[1].positions
    for rule, more in ((Rule(weight=lambda k, v, p: torch.ones(())), {}), (Rule(), {"priorities": priorities})):
        assert torch.equal(attend(own(rule, **more), *tensors(), budget=4)[1].positions, want)
