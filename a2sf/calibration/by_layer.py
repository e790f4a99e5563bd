"""The error that any policy makes in each layer's output, given the queries, keys and values of the full cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from a2sf.calibration.capture import Layer, look, projections
from a2sf.errors import ConfigError
from a2sf.hf.attention import Plan
from a2sf.hf.layer_check import layers_of
from a2sf.hf.settings import check_settings, retention_of
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget
from a2sf.policies.schedule import STEP


def check_policies(policies: Sequence[Policy], ratios: Sequence[float], layers: int, kv_heads: int | None) -> None:
    """Refuse what makes no error step by step, or does not fit the model.

    Raises:
        ConfigError: naming the policy.
    """
    for policy in policies:
        if not policy.uses_budget:
            raise ConfigError("policy", policy.name, "it prunes nothing, so that there is no error; leave it out")
        if "step" not in policy.schedules:
            raise ConfigError(
                "policy", policy.name, "it evicts once after a prompt, and plain text has none; leave it out"
            )
        for ratio in ratios:
            check_settings(policy, Budget(ratio=ratio), layers, schedule=STEP, kv_heads=kv_heads)


def errors_by_layer(
    model: Any,
    passages: Sequence[Sequence[int]],
    policies: Sequence[Policy],
    ratios: Sequence[float],
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> np.ndarray:
    """Relative squared errors, mean over passages, float64 [policies, ratios, layers].

    A layer's error is the sum over all tokens of the squared difference of its output after its projection to the full
    cache's, over that output's own. What errors of earlier layers do to later ones is not in it.

    Args:
        passages: tokens of each sequence; a budget is a share of its length.
        policies: those that `check_policies` accepts; they evict step by step.
        track: shows progress over the passages.

    Raises:
        UnsupportedModel: if the model cannot be looked at.
    """
    project, layers = projections(model), layers_of(model)
    total = np.zeros((len(policies), len(ratios), layers))
    for ids in track(passages):
        T = len(ids)
        plans = [[_plan(policy, ratio, T, layers) for ratio in ratios] for policy in policies]

        def see(layer: Layer, plans: list[list[Plan]] = plans) -> None:
            weights, number = project[layer.number], layer.number
            full = layer.output[0].transpose(0, 1).flatten(1).float()  # [T, H * V]
            own = float((full @ weights).double().square().sum())
            for p, row in enumerate(plans):
                for r, plan in enumerate(row):
                    pruned = plan.attend(number, layer.query, layer.key, layer.value, layer.scale, None)
                    lost = pruned[0].transpose(0, 1).flatten(1).float() - full
                    total[p, r, number] += float((lost @ weights).double().square().sum()) / own

        look(model, ids, see)
    return total / len(passages)


def _plan(policy: Policy, ratio: float, tokens: int, layers: int) -> Plan:
    kept = retention_of(policy, Budget(ratio=ratio), tokens, tokens, layers)
    return Plan.of_rows([tokens], [0], lambda row, layer: kept[layer], layers)
