"""All policies: those in this package and in `baselines`, those of other packages, and those in a user's file.

Another package offers policies as entry points of the group `a2sf.policies`, `name = "module:Class"`. A policy in a
user's own file is named by its class, `module:Class`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from a2sf.errors import ConfigError, UserError, nearest
from a2sf.policies.base import Policy, check_name
from a2sf.policies.code_files import imported_files

PACKAGES = ("a2sf.policies", "baselines")
GROUP = "a2sf.policies"
DECORATOR = "@dataclass(frozen=True, kw_only=True)"


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
    """The policies of other packages by name. They are not loaded.

    Raises:
        UserError: if two packages offer the same name, or a package offers the name of a policy of this package.
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
        UserError: if a policy of another package cannot be loaded, or its name is taken.
    """
    return built_in() | {name: find_policy(name) for name in installed()}


def make_policy(name: str, **settings: Any) -> Policy:
    """The policy `name`, or of the class `module:Class`, with `settings`; other settings have their defaults.

    Raises:
        ConfigError: if there is no such policy or setting, or a value is not allowed.
    """
    cls = find_policy(name)
    check_name(cls)
    check_setting_names(cls, settings)
    return cls(**settings)


def find_policy(name: str, key: str = "policy") -> type[Policy]:
    """The policy class of a name.

    Args:
        name: the policy's name, or `module:Class`.
        key: the configuration key that an error message names.

    Raises:
        ConfigError: if there is no such policy, it cannot be loaded, or its name is taken.
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
        raise ConfigError(key, name, f"{_package(others[name])} offers it as {name}, but its name is {cls.name}")
    return cls


def load(path: str, key: str = "policy") -> type[Policy]:
    """The policy class at `module:Class` or `module.Class`.

    Raises:
        ConfigError: if it cannot be imported, is not a policy, or has the name of another policy.
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
        raise ConfigError(key, path, f"{module_name} cannot be imported: {_explain(error)}") from error
    except Exception as error:  # the user's own code
        raise ConfigError(key, path, f"{module_name} cannot be imported: {_explain(error)}") from error
    cls = getattr(module, class_name, None)
    if cls is None:
        has = [n for n, x in vars(module).items() if inspect.isclass(x) and issubclass(x, Policy) and _named(x)]
        raise ConfigError(key, path, f"{module_name} has no {class_name}{nearest(class_name, has)}")
    check_class(cls, path, key)
    return cls


def check_class(cls: Any, path: str, key: str = "policy") -> None:
    """Raise `ConfigError` unless `cls` is a complete policy class with a name that no other policy has."""
    if not (inspect.isclass(cls) and issubclass(cls, Policy)):
        raise ConfigError(key, path, "it is not a subclass of a2sf.Policy")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise ConfigError(key, path, f"it does not define {missing}")
    for attribute in ("name", "label"):
        if not isinstance(getattr(cls, attribute, None), str) or not getattr(cls, attribute):
            raise ConfigError(key, path, f"the class needs a {attribute}: {attribute}: ClassVar[str] = ...")
    settings = [a for a, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)]
    if not dataclasses.is_dataclass(cls) or (settings and "__dataclass_fields__" not in vars(cls)):
        raise ConfigError(key, path, f"it needs {DECORATOR} above the class")
    if hidden := [a for a in settings if callable(getattr(Policy, a, None))]:
        raise ConfigError(key, path, f"its setting {hidden[0]} has the name of a method of a policy; rename it")
    if _ours(cls.__module__):
        return
    if (ours := built_in().get(cls.name)) is not None:
        raise ConfigError(key, path, f"its name {cls.name} is that of {_path(ours)}; rename it")
    entry = installed().get(cls.name)
    if entry is not None and entry.value.replace(":", ".") != _path(cls):
        raise ConfigError(key, path, f"its name {cls.name} is that of {entry.value} in {_package(entry)}")


def configurations() -> dict[str, dict[str, Any]]:
    """For each policy of another package: its class and the defaults of its settings, as a file under conf/policy/."""
    made: dict[str, dict[str, Any]] = {}
    for name, entry in installed().items():
        made[name] = {"_target_": entry.value.replace(":", ".")}
        try:
            made[name] |= defaults(load(entry.value))
        except UserError:
            continue  # the error is raised when this policy is requested
    return made


def defaults(cls: type[Policy]) -> dict[str, Any]:
    """The settings that have a default, each with its default."""
    found = {}
    for f in dataclasses.fields(cls):
        if f.default is not dataclasses.MISSING:
            found[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            found[f.name] = f.default_factory()
    return found


def check_setting_names(cls: type[Policy], given: Mapping[Any, Any], key: str = "policy") -> None:
    """Raise `ConfigError` if `given` names a setting that `cls` does not have; `_target_` is allowed.

    Args:
        key: the configuration key of the policy, which an error message names.
    """
    known = [f.name for f in dataclasses.fields(cls)]
    for name in map(str, given):
        if name not in (*known, "_target_"):
            has = f"{cls.name} has {', '.join(known)}" if known else f"{cls.name} has no settings"
            raise ConfigError(f"{key}.{name}", given[name], has + nearest(name, known))


def source_digest(cls: type[Policy]) -> str | None:
    """Sixteen hexadecimal digits that identify the code of a policy from outside; None for a policy of this package, which
    has a version instead.

    A hash of the files that define the class and the policies it inherits from, and of the user's files that these import.
    """
    modules = {c.__module__ for c in cls.__mro__ if issubclass(c, Policy)}
    outside = sorted(m for m in modules if not _ours(m))
    files = {m: Path(f) for m in outside if (f := getattr(sys.modules[m], "__file__", None))}
    imported = {i for m, f in files.items() for i in imported_files(f, m.partition(".")[0])}
    imported -= {f.resolve() for f in files.values()}
    texts = [f.read_bytes() for f in [*files.values(), *sorted(imported)]]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16] if texts else None


def _ours(module: str) -> bool:
    return f"{module}.".startswith(tuple(f"{p}." for p in PACKAGES))


def _named(cls: type[Policy]) -> bool:
    return "name" in vars(cls) and not inspect.isabstract(cls)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def _explain(error: Exception) -> str:
    """The error's message, with its file and line."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({error.filename}, line {error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != dataclasses.__file__]
    advice = f"; write {DECORATOR} above the class" if "inherit non-frozen dataclass" in str(error) else ""
    return f"{type(error).__name__}: {error} ({frames[-1].filename}, line {frames[-1].lineno}){advice}"
