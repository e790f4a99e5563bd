"""CaM against the paper's equations, written with loops over single tokens in float64."""

from __future__ import annotations

import pytest
import torch

from a2sf import CaM, attend, make_policy
from a2sf.errors import ConfigError
from baselines.cam import HEADS, LAYERS
from baselines.random import Draw


def plain(q, k, v, budget: int, window: int, seed: int, layer: int):
    """Outputs [H, T, D], and kept positions and values of each KV head: H2O, and merging before each eviction."""
    (H, T, D), K = q.shape, k.shape[0]
    out, kept, values = torch.zeros_like(q), [], []
    for h in range(K):
        cached, A, V = [], {}, {}
        for t in range(T):
            cached.append(t)
            A[t], V[t] = 0.0, v[h, t].clone()
            for g in range(h * H // K, (h + 1) * H // K):
                p = torch.stack([q[g, t] @ k[h, j] * D**-0.5 for j in cached]).softmax(0)
                out[g, t] = sum(p[i] * V[j] for i, j in enumerate(cached))
                for i, j in enumerate(cached):
                    A[j] += float(p[i])
            if len(cached) > budget:
                evicted = min(cached[: len(cached) - budget // 2], key=lambda j: (A[j], j))
                after = [j for j in cached if j > evicted][:window]
                mean = sum(A[j] for j in after) / len(after)
                at = torch.tensor([evicted + h * HEADS + layer * LAYERS])
                if float(Draw(seed)(torch.zeros(1).double(), None, at)) <= A[evicted] / mean:
                    for j in after:
                        V[j] = V[j] + V[evicted] / len(after)
                cached.remove(evicted)
        kept.append(cached)
        values.append(torch.stack([V[j] for j in cached]))
    return out, kept, torch.stack(values)


@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_the_equations(seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, 40, 8, generator=g).double() for h in (4, 2, 2))
    want, kept, values = plain(2 * q[0], k[0], v[0], 9, 3, seed, 5)
    for backend in ("reference", "torch"):
        out, state = attend(CaM(window=3, seed=seed), 2 * q, k, v, budget=9, layer=5, layers=6, backend=backend)
        assert state.positions[0].tolist() == kept
        torch.testing.assert_close(out[0], want)
        torch.testing.assert_close(state.values[0], values)
    _, others = attend(make_policy("h2o"), 2 * q, k, v, budget=9)
    assert others.positions[0].tolist() == kept  # merging changes values, not what H2O ranks by
    assert (state.values - others.values).abs().max() > 0.1


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("cam", "policy.by=cam is not allowed: cam is built on another policy itself; give another policy"),
        ("snapkv", "under every schedule"),
        ("key_norm", "by accumulated attention"),
        ("full", "full evicts nothing"),
        ("tova", "it retains the same tokens in all heads"),
        ("h3o", "did you mean"),
    ],
)
def test_what_cannot_be_merged_is_refused(by, message):
    with pytest.raises(ConfigError, match=message):
        CaM(by=by)
