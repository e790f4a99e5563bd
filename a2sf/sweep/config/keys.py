"""Keys of a configuration that do not exist, and the messages about them.

It imports no model library, so that a mistyped key is reported at once.
"""

from __future__ import annotations

import dataclasses

from omegaconf import DictConfig, OmegaConf

from a2sf.errors import UserError, first_line, nearest
from a2sf.policies import find
from a2sf.sweep.config.schema import RENAMED, Config


def check(composed: DictConfig) -> None:
    """Refuse keys and settings of the policy that do not exist.

    Raises:
        UserError: naming the first one.
    """
    check_keys(composed)
    node = composed.get("policy")
    if isinstance(node, DictConfig) and "_target_" in node:
        find.check_setting_names(find.load(str(node["_target_"]), "policy._target_"), node)


def check_keys(node: DictConfig, prefix: str = "") -> None:
    """Refuse keys that do not exist: Hydra lets `+key=value` through.

    Raises:
        UserError: naming the first one.
    """
    known = {f.name for f in dataclasses.fields(OmegaConf.get_type(node) or Config)}
    for key in map(str, node):
        if key not in known:
            raise UserError(_unknown(f"{prefix}{key}"))
        inner = node._get_node(key)
        if isinstance(inner, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(inner)):
            check_keys(inner, f"{prefix}{key}.")


def explain(error: Exception, prefix: str = "") -> str:
    """One sentence for an error of OmegaConf or Hydra about a key or a value."""
    key = getattr(error, "full_key", None)
    first = first_line(error)
    if key is None:
        return first
    if "not in" in first:
        return _unknown(f"{prefix}{key}")
    if inner := [k for k in _keys(Config) if k.startswith(f"{prefix}{key}.")]:
        return f"{prefix}{key} is a group of keys; give {', '.join(inner)}."
    return f"{prefix}{key} has a value that is not allowed: {first}."


def _unknown(key: str) -> str:
    return f"{key} is not a key of the configuration{nearest(key, _keys(Config))}; a2sf run --help lists them."


def _keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for f in dataclasses.fields(cls):
        if f.name in RENAMED:
            continue
        keys.append(prefix + f.name)
        made = f.default_factory() if f.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(made):
            keys += _keys(type(made), f"{prefix}{f.name}.")
    return keys
