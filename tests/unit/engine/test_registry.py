"""A kernel is added in one place: `Backend` says what it serves and supports, and `attend` does the rest."""

from __future__ import annotations

import pytest
import torch

from a2sf import make_policy
from a2sf.engine import kernels
from a2sf.engine.kernels.registry import REGISTRY, TORCH, Backend
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Attended, AttentionCall, Options, Segments
from a2sf.errors import ConfigError
from a2sf.policies.schedule import Schedule

B, H, K, T, D = 2, 4, 2, 12, 8


class Mine(Backend):
    """Computes with torch what is in float32 and evicted step by step."""

    name, compiled = "mine", True

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def serves(self, query):
        return None if query.dtype == torch.float32 else f"it is for float32, and these are {query.dtype}"

    def supports(self, call):
        return "it evicts step by step" if call.segments.schedule.prompt or call.segments.rule.full_heads else None

    def attend(self, call) -> Attended:
        self.calls.append(call)
        return TORCH.attend(call)


@pytest.fixture
def mine(monkeypatch):
    made = Mine()
    monkeypatch.setattr(kernels, "REGISTRY", (made, *REGISTRY))
    monkeypatch.setattr(kernels, "BACKENDS", ("mine", *kernels.BACKENDS))
    return made


def call(policy: str, schedule: Schedule | None = None, dtype: torch.dtype = torch.float32, **settings):
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(B, n, T, D, generator=g).to(dtype) for n in (H, K, K))
    numbers = BatchRetention.of([make_policy(policy, **settings).keeps(4)] * B, schedule or Schedule(), [6, 7])
    return query, key, value, Segments.of_rows(numbers, torch.tensor([T, T - 2])), Options(0.3)


def test_auto_takes_it_where_it_comes_first(mine):
    with kernels.backends_run() as ran:
        got = kernels.attend(*call("h2o"))
    assert ran == {"mine"}
    assert torch.equal(got.output, kernels.attend(*call("h2o"), backend="torch").output)


def test_what_it_does_not_serve_is_for_others_and_refused_by_name(mine):
    with kernels.backends_run() as ran:
        kernels.attend(*call("h2o", dtype=torch.float64))
    assert ran == {"torch"}
    with pytest.raises(
        ConfigError, match=r"backend=mine is not allowed: it is for float32, and these are torch.float64"
    ):
        kernels.attend(*call("h2o", dtype=torch.float64), backend="mine")
    with pytest.raises(ConfigError, match="give auto or one of mine, reference"):
        kernels.attend(*call("h2o"), backend="nobody")


@pytest.mark.parametrize("settings", [{"schedule": Schedule("prompt", then="step")}, {"policy": "heads"}])
def test_calls_that_it_does_not_support_are_split_for_it(mine, settings):
    of_heads = {"heads": [[0, 1]]} if "policy" in settings else {}
    args = call(settings.get("policy", "h2o"), settings.get("schedule"), **of_heads)
    with kernels.backends_run() as ran:
        got = kernels.attend(*args, backend="mine")
    assert ran == {"mine"}
    assert len(mine.calls) == 2  # the prompt and what follows; full heads and the others
    assert all(mine.supports(c) is None for c in mine.calls)
    assert torch.allclose(got.output, kernels.attend(*args, backend="reference").output, atol=1e-5)


def test_a_call_that_cannot_be_split_is_for_torch(mine):
    args = call("adakv", Schedule("prompt", then="step"), window=2)
    with kernels.backends_run() as ran:
        kernels.attend(*args)
    assert (ran, mine.calls) == ({"torch"}, [])


def test_every_registered_backend_says_what_it_is():
    names = [b.name for b in REGISTRY]
    assert len(set(names)) == len(names)
    assert set(kernels.BACKENDS) == {b.name for b in REGISTRY if b.selectable}
    single, double = (torch.zeros(1, 1, 1, 1, dtype=d) for d in (torch.float32, torch.float64))
    served = {b.name for b in REGISTRY if b.serves(single) is None}
    assert {"reference", "numba", "torch"} <= served
    assert {b.name for b in REGISTRY if b.serves(double) is None} == {"dense", "reference", "torch"}
