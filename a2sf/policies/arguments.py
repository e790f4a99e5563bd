"""A policy, a budget and a schedule as arguments of a function: the objects, or what plainly stands for them."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Sequence
from typing import Any

from a2sf.errors import ConfigError
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policy
from a2sf.policies.schedule import Schedule


def policy_of(given: Any) -> Policy:
    """The policy that is `given`: one, its name (`h2o`, or `module:Class`) or its class, with the settings' defaults.

    Raises:
        ConfigError: if it is nothing of these.
    """
    if isinstance(given, Policy):
        return given
    kind = find_policy(given) if isinstance(given, str) else given
    if not (inspect.isclass(kind) and issubclass(kind, Policy)):
        raise ConfigError("policy", repr(given), "give a policy such as H2O(), or its name")
    try:
        return kind()
    except TypeError as error:
        raise ConfigError("policy", kind.__qualname__, f"make one with its settings, {error}") from error


def budget_of(given: Any) -> Budget | None:
    """The budget that is `given`: one, a whole number of tokens, a share of at most 1, or a list of one per layer.

    Raises:
        ConfigError: if it is nothing of these.
    """
    if given is None or isinstance(given, Budget):
        return given
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    values = list(given) if listed else [given]
    if values and all(isinstance(x, numbers.Real) and not isinstance(x, bool) for x in values):
        if all(isinstance(x, numbers.Integral) for x in values):
            return Budget(tokens=[int(x) for x in values] if listed else int(given))
        if all(0 < x <= 1 for x in values):
            return Budget(ratio=[float(x) for x in values] if listed else float(given))
    raise ConfigError(
        "budget",
        repr(given),
        "give a whole number of tokens, a share with 0 < ratio <= 1, or Budget(tokens=...) or Budget(ratio=...)",
    )


def schedule_of(given: Any) -> Schedule | None:
    """The schedule that is `given`: one, or its name (`step`, `every4`, `prompt`, `prompt-step`).

    Raises:
        ConfigError: if it is nothing of these.
    """
    if given is None or isinstance(given, Schedule):
        return given
    if isinstance(given, str):
        return Schedule.named(given)
    raise ConfigError("schedule", repr(given), "give a Schedule(...), or a name such as prompt or every4")
