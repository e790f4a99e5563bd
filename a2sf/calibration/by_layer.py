"""The error of any policy in the output of each layer, given the queries, keys and values of the full cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from a2sf.calibration.capture import Captured, capture, projections
from a2sf.errors import ConfigError
from a2sf.hf.attention import Plan
from a2sf.hf.layer_check import layers_of
from a2sf.hf.settings import check_settings, retention_of
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget
from a2sf.policies.schedule import STEP


def check_policies(policies: Sequence[Policy], ratios: Sequence[float], layers: int, kv_heads: int | None) -> None:
    """Refuse policies that evict nothing under the step schedule, and settings that do not fit the model.

    Raises:
        ConfigError: if there is one; the message names the policy.
    """
    for policy in policies:
        if not policy.uses_budget:
            why = "it takes no budget" if policy.evicts else "it prunes nothing, so that there is no error"
            raise ConfigError("policy", policy.name, f"{why}; leave it out")
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
    """Relative squared errors of each layer's output, mean over passages.

    For each layer: the squared difference between the pruned and the full attention output, both after the output
    projection, summed over tokens, divided by the squared full output. Each layer is measured alone: it gets the inputs of
    the full cache, so that errors of earlier layers are not included.

    Args:
        model: a transformers model that `capture.check_model` accepts.
        passages: token ids of each sequence; a budget is a share of its length.
        policies: those that `check_policies` accepts; they run under the step schedule.
        ratios: budgets, as shares of a sequence's tokens.
        track: iterates over the passages and shows progress.

    Returns:
        float64 [policies, ratios, layers].

    Raises:
        UnsupportedModel: if the layers' activations cannot be captured.
    """
    project, layers = projections(model), layers_of(model)
    total = np.zeros((len(policies), len(ratios), layers))
    for ids in track(passages):
        T = len(ids)
        plans = [[_plan(policy, ratio, T, layers) for ratio in ratios] for policy in policies]

        def measure(layer: Captured, plans: list[list[Plan]] = plans) -> None:
            weights, number = project[layer.number], layer.number
            full = layer.output[0].transpose(0, 1).flatten(1).float()  # [T, H * V]
            norm = float((full @ weights).double().square().sum())
            for p, row in enumerate(plans):
                for r, plan in enumerate(row):
                    pruned = plan.attend(number, layer.query, layer.key, layer.value, layer.options, None)
                    lost = pruned[0].transpose(0, 1).flatten(1).float() - full
                    total[p, r, number] += float((lost @ weights).double().square().sum()) / norm

        capture(model, ids, measure)
    return total / len(passages)


def _plan(policy: Policy, ratio: float, tokens: int, layers: int) -> Plan:
    retention = retention_of(policy, Budget(ratio=ratio), tokens, tokens, layers)
    return Plan.of_rows([tokens], [0], lambda row, layer: retention[layer], layers)
