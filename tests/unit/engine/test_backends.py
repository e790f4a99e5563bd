"""What ran is noted, whatever was requested."""

from __future__ import annotations

import pytest
import torch

from a2sf import Schedule, attend, evicting_attention, make_policy
from a2sf.engine.kernels import backends_run


@pytest.mark.parametrize(
    ("policy", "schedule", "backend", "ran"),
    [
        ("h2o", Schedule(), "auto", "numba"),
        ("h2o", Schedule(), "reference", "reference"),
        ("h2o", Schedule(), "torch", "torch"),
        ("tova", Schedule("every", every=2), "numba", "numba"),
        ("snapkv", Schedule("prompt"), "auto", "numba"),
        ("keydiff", Schedule(), "numba", "torch"),  # a function is no data
    ],
)
def test_what_ran(policy, schedule, backend, ran):
    prompt = torch.tensor([6]) if schedule.prompt else None
    tensors = torch.randn(1, 4, 9, 8), *torch.randn(2, 1, 2, 9, 8)
    with backends_run() as everything:
        with backends_run() as here:
            attend(make_policy(policy), *tensors, budget=4, schedule=schedule, prompt=prompt, backend=backend)
        attend(make_policy("h2o"), *tensors, budget=4, backend="reference")
    assert here == {ran}
    assert everything == {ran, "reference"}
    attend(make_policy("h2o"), *tensors, budget=4, backend="torch")  # nobody listens
    assert everything == {ran, "reference"}


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_autocast_around_it_lowers_no_precision(backend):
    q, k, v = torch.randn(1, 4, 40, 8), *torch.randn(2, 1, 2, 40, 8)
    options = {"budget": 9, "recent": 2, "forgetting_factor": 0.5, "backend": backend}
    want, kept = evicting_attention(q, k, v, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, state = evicting_attention(q, k, v, **options)
    assert got.equal(want)
    assert state.positions.equal(kept.positions)
