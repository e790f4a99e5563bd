"""A grid of several policies or schedules: a setting applies only to the policies and schedules that have it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import cache

from omegaconf import DictConfig, OmegaConf

from a2sf.errors import ConfigError, UserError
from a2sf.policies import find

USED_KEYS = {"every": ("every",), "prompt": ("then", "at")}
"""Kind of schedule -> the keys of `schedule` that it uses, besides `when`; `prompt` with `then=every` uses `every`, too."""
SETTING = re.compile(r"\+{0,2}policy\.(?!_target_\b)(\w+)")
OPEN = re.compile(r"\+{0,2}(?:task_args|gen_kwargs)\.")
"""Keys with any keys inside them."""


def addable(override: str) -> str:
    """The override with `++`, so that Hydra accepts a setting that no file lists; `find.check_setting_names` checks it."""
    return "++" + override.lstrip("+") if SETTING.match(override) or OPEN.match(override) else override


def route(points: Sequence[Sequence[str]], target: Callable[[tuple[str, ...]], str]) -> list[list[str]]:
    """The overrides of each point, without settings that only other policies of the grid have.

    Args:
        points: overrides, without sweeps.
        target: gives the class (as `module.Class`) of the policy that some overrides choose.
    """
    fields = []
    known: dict[tuple[str, ...], frozenset[str]] = {}
    for point in points:
        choice = tuple(o for o in point if o.lstrip("+").startswith("policy") and not SETTING.match(o))
        if choice not in known:
            known[choice] = _fields(target(choice))
        fields.append(known[choice])
    anywhere = frozenset().union(*fields)

    def applies(override: str, has: frozenset[str]) -> bool:
        setting = SETTING.match(override)
        return setting is None or setting[1] in has or setting[1] not in anywhere

    return [[addable(o) for o in p if applies(o, has)] for p, has in zip(points, fields, strict=True)]


@cache
def _fields(path: str) -> frozenset[str]:
    try:
        return frozenset(f.name for f in dataclasses.fields(find.load(path)))
    except UserError:
        return frozenset()  # reported when the configuration is read


def check_schedules(points: Sequence[DictConfig]) -> None:
    """Refuse a key of `schedule` that no point of a grid uses.

    Raises:
        ConfigError: naming it.
    """
    kinds = {OmegaConf.select(p, f"schedule.{key}") for p in points for key in ("when", "then")}
    for kind, key in ((kind, key) for kind, keys in USED_KEYS.items() for key in keys):
        values = [v for p in points if (v := OmegaConf.select(p, f"schedule.{key}")) is not None]
        if values and kind not in kinds:
            raise unused(key, values[0])


def unused(key: str, value: object) -> ConfigError:
    """The error for a key that the schedule does not use."""
    kind = next(kind for kind, keys in USED_KEYS.items() if key in keys)
    return ConfigError(f"schedule.{key}", value, f"it is for schedule={kind}, so give that as well")
