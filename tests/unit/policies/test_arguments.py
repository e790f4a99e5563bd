"""What stands for a policy, a budget and a schedule, and what is refused in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

import a2sf
from a2sf import A2SF, H2O, TOVA, Budget, Policy, Retention, Schedule, attend, evicting_attention
from a2sf.errors import ConfigError
from a2sf.policies.arguments import budget_of, policy_of, schedule_of
from a2sf.policies.find import built_in

Q, K, V = (torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))


def test_every_policy_is_a_name_of_the_package():
    for cls in built_in().values():
        assert getattr(a2sf, cls.__name__) is cls
        assert cls.__name__ in a2sf.__all__


def test_policies():
    own = H2O(recent_share=0.25)
    assert policy_of(own) is own
    assert policy_of("tova") == policy_of(TOVA) == policy_of("baselines.tova:TOVA") == TOVA()


@dataclass(frozen=True, kw_only=True)
class Demanding(Policy):
    name: ClassVar[str] = "demanding"
    label: ClassVar[str] = "Demanding"
    share: float

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("h20", "did you mean h2o"),
        (None, "give a policy such as H2O"),
        (3, "give a policy such as H2O"),
        (Budget, "give a policy such as H2O"),
        (Demanding, "make one with its settings.*share"),
        (Policy, "make one with its settings"),
    ],
)
def test_what_is_no_policy(given, why):
    with pytest.raises(ConfigError, match=why):
        policy_of(given)


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        (None, None),
        (Budget(tokens=3), Budget(tokens=3)),
        (64, Budget(tokens=64)),
        (np.int64(64), Budget(tokens=64)),
        (0.2, Budget(ratio=0.2)),
        (np.float32(0.5), Budget(ratio=0.5)),
        ([3, 4], Budget(tokens=[3, 4])),
        ((0.1, 1), Budget(ratio=[0.1, 1.0])),
    ],
)
def test_budgets(given, budget):
    assert budget_of(given) == budget


@pytest.mark.parametrize("given", [0, -3, 2.9, 64.0, 0.0, True, "0.2", [], [3, 0.5, 7], float("nan"), {}])
def test_what_is_no_budget(given):
    with pytest.raises(ConfigError, match="budget"):
        budget_of(given)


def test_schedules():
    assert schedule_of(None) is None
    assert schedule_of("every4") == schedule_of(Schedule("every", every=4)) == Schedule("every", every=4)
    for given, why in (("promt", "give one of step"), (3, "give a Schedule"), (Schedule, "give a Schedule")):
        with pytest.raises(ConfigError, match=why):
            schedule_of(given)


def test_attend_accepts_names_and_numbers_for_the_objects():
    want = attend(A2SF(), Q, K, V, budget=3, schedule=Schedule("every", every=2))
    for policy in ("a2sf", A2SF):
        for budget in (3, Budget(tokens=3), torch.tensor([3]), np.int32(3)):
            got = attend(policy, Q, K, V, budget=budget, schedule="every2")
            assert torch.equal(got[0], want[0])
    per_layer = attend("a2sf", Q, K, V, budget=Budget(tokens=[9, 3]), layer=1, layers=2)[1]
    assert per_layer.positions.shape[-1] == 3


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"budget": 2.9}, r"budget=2.9 is not allowed: give a whole number"),
        ({"budget": torch.tensor([2.0])}, "give a whole number"),
        ({"budget": True}, "give a whole number"),
        ({"budget": "3"}, "give a whole number"),
        ({"budget": Budget(ratio=0.5)}, "attend takes a number of tokens"),
        ({"budget": 3, "lengths": torch.tensor([2.5])}, r"lengths=.* give a whole number"),
        ({"budget": 3, "lengths": torch.ones(1, dtype=torch.bool)}, r"lengths=.* give a whole number"),
        ({"budget": 3, "schedule": "prompt", "prompt": 4.5}, r"prompt=4.5 .* give a whole number"),
        ({"budget": 3, "layer": 0.5}, "layer=0.5 is not allowed"),
    ],
)
def test_attend_cuts_no_number_off(given, why):
    with pytest.raises(ConfigError, match=why):
        attend(A2SF(), Q, K, V, **given)


def test_numbers_of_evicting_attention():
    for given in ({"budget": 4.5, "recent": 1}, {"budget": 4, "recent": 1.5}, {"budget": 4, "recent": 1, "sinks": 0.5}):
        with pytest.raises(ConfigError, match="give a whole number"):
            evicting_attention(Q, K, V, forgetting_factor=0.5, **given)
    with pytest.raises(ConfigError, match="forgetting_factor"):
        evicting_attention(Q, K, V, budget=4, recent=1, forgetting_factor="0.5")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64])
def test_tensors_that_are_not_of_a_floating_dtype(dtype):
    """The output was cut off to the query's dtype."""
    scaled = [(3 * x).to(dtype) for x in (Q, K, V)]
    with pytest.raises(ConfigError, match=r"query=torch.* give a tensor of a floating dtype"):
        attend(A2SF(), *scaled, budget=4)
    with pytest.raises(ConfigError, match="value=torch"):
        evicting_attention(Q, K, scaled[2], budget=4, recent=1, forgetting_factor=0.5)
    with pytest.raises(ConfigError, match="key=ndarray"):
        attend(A2SF(), Q, K.numpy(), V, budget=4)
