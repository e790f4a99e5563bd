"""The policies that there are: this package's and those in `baselines`, found by looking, and those of other packages.

Another package offers policies as entry points of the group `a2sf.policies`, `name = "module:Class"`. A policy in a file
of one's own is named by its class, `module:Class`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import pkgutil
import sys
import traceback
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from a2sf.errors import ConfigError, UserError, nearest
from a2sf.policies.base import Policy

PACKAGES = ("a2sf.policies", "baselines")
GROUP = "a2sf.policies"


@cache
def built_in() -> dict[str, type[Policy]]:
    """The policies of this package and of `baselines` by name."""
    found: dict[str, type[Policy]] = {}
    for package in PACKAGES:
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            module = importlib.import_module(info.name)
            for cls in vars(module).values():
                if inspect.isclass(cls) and issubclass(cls, Policy) and cls.__module__ == info.name and _named(cls):
                    found[cls.name] = cls
    return found


def installed() -> dict[str, EntryPoint]:
    """The policies that other packages offer, by name, not loaded.

    Raises:
        UserError: if two packages offer one name, or a package one that is taken.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in built_in():
            raise UserError(f"{_package(entry)} offers a policy named {entry.name}, a name that a2sf has taken.")
        if found.setdefault(entry.name, entry).value != entry.value:
            both = " and ".join(sorted((_package(entry), _package(found[entry.name]))))
            raise UserError(f"{both} both offer a policy named {entry.name}: uninstall one of them.")
    return found


def find_policies() -> dict[str, type[Policy]]:
    """Every known policy by name.

    Raises:
        UserError: if one of another package cannot be loaded, or its name is taken.
    """
    return built_in() | {name: find_policy(name) for name in installed()}


def find_policy(name: str, key: str = "policy") -> type[Policy]:
    """The policy of that name, or the class that `module:Class` names.

    Args:
        key: the config key that an error is about.

    Raises:
        ConfigError: if there is none, it cannot be loaded, or its name is taken.
    """
    if ":" in name:
        return load(name, key)
    if name in built_in():
        return built_in()[name]
    others = installed()
    if name not in others:
        known = [*built_in(), *others]
        allowed = f"give one of {', '.join(sorted(known))}, or module:Class{nearest(name, known)}"
        raise ConfigError(key, name, allowed)
    cls = load(others[name].value, key)
    if cls.name != name:
        told = f"{_package(others[name])} offers it as {name}, and it calls itself {cls.name}"
        raise ConfigError(key, name, told)
    return cls


def load(path: str, key: str = "policy") -> type[Policy]:
    """The policy class at `module:Class` or `module.Class`.

    Raises:
        ConfigError: if it cannot be imported, is no policy, or has a name that another policy has.
    """
    module_name, _, class_name = path.replace(":", ".").rpartition(".")
    if not module_name:
        raise ConfigError(key, path, "give the class as module:Class")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            where = "in the folder of --config-dir, in the current folder or among the installed packages"
            raise ConfigError(key, path, f"there is no module {error.name} {where}") from error
        raise ConfigError(key, path, f"{module_name} cannot be imported: {_told(error)}") from error
    except Exception as error:  # the user's own code
        raise ConfigError(key, path, f"{module_name} cannot be imported: {_told(error)}") from error
    cls = getattr(module, class_name, None)
    if cls is None:
        has = [n for n, x in vars(module).items() if inspect.isclass(x) and issubclass(x, Policy) and _named(x)]
        raise ConfigError(key, path, f"{module_name} has no {class_name}{nearest(class_name, has)}")
    check_class(cls, path, key)
    return cls


def check_class(cls: Any, path: str, key: str = "policy") -> None:
    """Raise `ConfigError` unless `cls` is a policy class whose name is its own."""
    if not (inspect.isclass(cls) and issubclass(cls, Policy)):
        raise ConfigError(key, path, "it is not a subclass of a2sf.Policy")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise ConfigError(key, path, f"it does not define {missing}")
    for attribute in ("name", "label"):
        if not isinstance(getattr(cls, attribute, None), str) or not getattr(cls, attribute):
            raise ConfigError(key, path, f"the class needs a {attribute}: {attribute}: ClassVar[str] = ...")
    settings = [a for a, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)]
    if settings and "__dataclass_fields__" not in vars(cls):
        raise ConfigError(key, path, "it has fields, so it needs @dataclass(kw_only=True) above the class")
    if hidden := [a for a in settings if callable(getattr(Policy, a, None))]:
        raise ConfigError(key, path, f"its setting {hidden[0]} hides the method of that name; give it another")
    if _ours(cls.__module__):
        return
    if (ours := built_in().get(cls.name)) is not None:
        raise ConfigError(key, path, f"its name {cls.name} is that of {_path(ours)}; give it another")
    entry = installed().get(cls.name)
    if entry is not None and entry.value.replace(":", ".") != _path(cls):
        raise ConfigError(key, path, f"its name {cls.name} is that of {entry.value} in {_package(entry)}")


def configurations() -> dict[str, dict[str, Any]]:
    """What a file under conf/policy/ would hold for each policy of another package: its class, its settings' defaults."""
    made: dict[str, dict[str, Any]] = {}
    for name, entry in installed().items():
        made[name] = {"_target_": entry.value.replace(":", ".")}
        try:
            made[name] |= defaults(load(entry.value))
        except UserError:
            continue  # told when it is asked for
    return made


def defaults(cls: type[Policy]) -> dict[str, Any]:
    """Setting -> its default, for those that have one."""
    found = {}
    for f in dataclasses.fields(cls):
        if f.default is not dataclasses.MISSING:
            found[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            found[f.name] = f.default_factory()
    return found


def source_digest(cls: type[Policy]) -> str | None:
    """Sixteen hex digits that identify the code of a policy from outside; None for ours, which have versions.

    A hash of the files that define the class and the policies it derives from; what these import is not looked at.
    """
    modules = {c.__module__ for c in cls.__mro__ if issubclass(c, Policy)}
    outside = sorted(m for m in modules if not _ours(m))
    files = [getattr(sys.modules[m], "__file__", None) for m in outside]
    texts = [Path(f).read_bytes() for f in files if f]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16] if texts else None


def _ours(module: str) -> bool:
    return f"{module}.".startswith(tuple(f"{p}." for p in PACKAGES))


def _named(cls: type[Policy]) -> bool:
    return "name" in vars(cls) and not inspect.isabstract(cls)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def _told(error: Exception) -> str:
    """What went wrong, and in which line of which file."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({error.filename}, line {error.lineno})"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
