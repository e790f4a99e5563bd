"""A policy from its name and settings."""

from __future__ import annotations

from typing import Any

from a2sf.errors import ConfigError, nearest
from a2sf.policies.base import Policy, check_name
from a2sf.policies.find import check_setting_names, find_policies


def make_policy(name: str, **settings: Any) -> Policy:
    """The policy `name` with `settings`; other settings have their defaults.

    Raises:
        ConfigError: if there is no such policy or setting, or a value is not allowed.
    """
    policies = find_policies()
    if name not in policies:
        known = ", ".join(sorted(policies))
        raise ConfigError("policy", name, f"give one of {known}{nearest(str(name), policies)}")
    check_name(policies[name])
    check_setting_names(policies[name], settings)
    return policies[name](**settings)
