"""Fourteen cases of `attend`, computed by an independent program: outputs and kept positions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from a2sf import Schedule, attend, make_policy
from tests.models import DEVICES

VECTORS = sorted((Path(__file__).parents[1] / "vectors" / "policies").glob("*.npz"))


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors(path: Path, backend: str, dtype: torch.dtype, device: str) -> None:
    case = np.load(path)
    q, k, v = (torch.from_numpy(case[name]).to(device, dtype) for name in ("query", "key", "value"))
    schedule = Schedule(**json.loads(str(case["schedule"])))
    output, state = attend(
        make_policy(str(case["policy"]), **json.loads(str(case["settings"]))),
        q, k, v,
        budget=torch.from_numpy(case["budget"]),
        schedule=schedule,
        prompt=torch.from_numpy(case["prompt"]) if schedule.prompt else None,
        lengths=torch.from_numpy(case["lengths"]),
        backend=backend,
    )  # fmt: skip
    # the stored outputs are rounded to float32
    tolerance = 2e-7 if dtype == torch.float64 else 2e-6
    for b, n in enumerate(case["lengths"].tolist()):
        np.testing.assert_allclose(
            output[b, :, :n].cpu().numpy(), case["output"][b, :, :n], atol=tolerance, rtol=tolerance
        )
        assert (output[b, :, n:] == 0).all()
        for h in range(k.shape[1]):
            kept = [p for p in state.positions[b, h].tolist() if p >= 0]
            assert kept == sorted(p for p in case["kept_final"][b, h].tolist() if p >= 0)


def test_all_are_there() -> None:
    assert len(VECTORS) == 14
