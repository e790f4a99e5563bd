"""The policies that there are, found by looking."""

from __future__ import annotations

import importlib
import pkgutil

from a2sf.policies.base import Policy


def find_policies() -> dict[str, type[Policy]]:
    """Every known policy by name: those of this package and of the `baselines` package, found by looking."""
    for package in ("a2sf.policies", "baselines"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)

    def below(cls: type[Policy]) -> list[type[Policy]]:
        return [c for sub in cls.__subclasses__() for c in (sub, *below(sub))]

    found = below(Policy)  # type: ignore[type-abstract]
    return {cls.name: cls for cls in found if "name" in vars(cls)}
