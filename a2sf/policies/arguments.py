"""Policy, budget and schedule as arguments of a function: an object, or a name or number that stands for one."""

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
    """The policy of an argument.

    Args:
        given: a policy; or its name (`h2o`, or `module:Class`) or its class, with default settings.

    Raises:
        ConfigError: if `given` is none of these.
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
    """The budget of an argument; None for None.

    Args:
        given: a `Budget`, an integer number of tokens, a ratio of at most 1, or a list with one of these per layer.

    Raises:
        ConfigError: if `given` is none of these.
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
    """The schedule of an argument; None for None.

    Args:
        given: a `Schedule`, or its name (`step`, `every4`, `prompt`, `prompt-step`).

    Raises:
        ConfigError: if `given` is neither.
    """
    if given is None or isinstance(given, Schedule):
        return given
    if isinstance(given, str):
        return Schedule.named(given)
    raise ConfigError("schedule", repr(given), "give a Schedule(...), or a name such as prompt or every4")
