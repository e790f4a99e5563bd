"""Settings of one policy or schedule in a grid of several: each goes to where it is known."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import cache

from omegaconf import DictConfig, OmegaConf

from a2sf.errors import ConfigError, UserError
from a2sf.policies import find

LOOKED_AT = {"every": ("every",), "prompt": ("then", "at")}
"""The keys of `schedule` that each kind looks at beside `when`."""
SETTING = re.compile(r"\+{0,2}policy\.(?!_target_\b)(\w+)")
OPEN = re.compile(r"\+{0,2}(?:task_args|gen_kwargs)\.")
"""Keys under which anything may stand."""


def addable(override: str) -> str:
    """The override so that Hydra takes a setting that no file lists; whether there is such a one, we say."""
    return "++" + override.lstrip("+") if SETTING.match(override) or OPEN.match(override) else override


def route(points: Sequence[Sequence[str]], target: Callable[[tuple[str, ...]], str]) -> list[list[str]]:
    """The overrides of each point without the settings that its policy lacks and another policy of the grid has.

    Args:
        points: overrides, without sweeps.
        target: the class of the policy that some overrides choose, as a path; it is asked once for equal ones.
    """
    fields = []
    known: dict[tuple[str, ...], frozenset[str]] = {}
    for point in points:
        choice = tuple(o for o in point if o.lstrip("+").startswith("policy") and not SETTING.match(o))
        if choice not in known:
            known[choice] = _fields(target(choice))
        fields.append(known[choice])
    anywhere = frozenset().union(*fields)

    def stays(override: str, has: frozenset[str]) -> bool:
        setting = SETTING.match(override)
        return setting is None or setting[1] in has or setting[1] not in anywhere

    return [[addable(o) for o in p if stays(o, has)] for p, has in zip(points, fields, strict=True)]


@cache
def _fields(path: str) -> frozenset[str]:
    try:
        return frozenset(f.name for f in dataclasses.fields(find.load(path)))
    except UserError:
        return frozenset()  # told when its configuration is read


def check_schedules(points: Sequence[DictConfig]) -> None:
    """Refuse a key of `schedule` that no point of a grid looks at.

    Raises:
        ConfigError: naming it.
    """
    kinds = {OmegaConf.select(p, "schedule.when") for p in points}
    for kind, key in ((kind, key) for kind, keys in LOOKED_AT.items() for key in keys):
        values = [v for p in points if (v := OmegaConf.select(p, f"schedule.{key}")) is not None]
        if values and kind not in kinds:
            raise unused(key, values[0])


def unused(key: str, value: object) -> ConfigError:
    """What is told of a key that the schedule does not look at."""
    kind = next(kind for kind, keys in LOOKED_AT.items() if key in keys)
    return ConfigError(f"schedule.{key}", value, f"it is for schedule={kind}, so give that as well")
