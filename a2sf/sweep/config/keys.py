"""Keys of a configuration that do not exist, and the messages about them.

It imports no model library, so that a mistyped key is reported at once.
"""

from __future__ import annotations

import dataclasses
import re

from omegaconf import DictConfig, OmegaConf

from a2sf.errors import ConfigError, UserError, first_line, nearest
from a2sf.policies import find
from a2sf.sweep.config import schema
from a2sf.sweep.config.schema import RENAMED, Config

WANTED = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
"""OmegaConf's names of types -> what a user has to give."""


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
    """Refuse keys that do not exist (Hydra lets `+key=value` through), and values of switches that are not true or false.

    Raises:
        UserError: naming the first one.
    """
    cls = OmegaConf.get_type(node) or Config
    known, switches = {f.name for f in dataclasses.fields(cls)}, schema.switches(cls)
    for key in map(str, node):
        if key not in known:
            raise UserError(_unknown(f"{prefix}{key}"))
        inner = node._get_node(key)
        if key in switches and not OmegaConf.is_interpolation(node, key):
            value = node[key]
            if not isinstance(value, bool) and not (value is None and switches[key]):
                raise ConfigError(f"{prefix}{key}", value, f"give true or false{', or null' * switches[key]}")
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
    if typed := re.match(r"Value '(.*)' of type '.*' could not be converted to (\w+)", first):
        null = ", or null" if schema.may_be_null(f"{prefix}{key}") else ""
        return f"{prefix}{key}={typed[1]} is not allowed: give {WANTED.get(typed[2], typed[2])}{null}."
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
