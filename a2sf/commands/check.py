"""`a2sf check mine:MyPolicy`: which invariants of docs/semantics.md a policy holds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from a2sf.errors import ConfigError, UserError, nearest
from a2sf.policies.base import Policy
from a2sf.policies.find import defaults, find_policy


def main(arguments: Sequence[str]) -> None:
    """Print a line for each invariant; exit with 1 if one does not hold."""
    parser = argparse.ArgumentParser(prog="a2sf check", description="Try the invariants of a policy on random tensors.")
    parser.add_argument("policy", help="a policy's name, or the class of one of your own, module:Class")
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="its settings; its defaults otherwise")
    parser.add_argument("--config-dir", type=Path, help="your folder; the current one is looked in besides")
    parser.add_argument("--trials", type=int, default=8, help="random trials of each invariant")
    args = parser.parse_args(arguments)
    if args.trials < 1:
        raise UserError(f"--trials {args.trials} is not allowed: give at least 1.")
    look_in(args.config_dir)
    policy = made(find_policy(args.policy), args.settings)

    from a2sf.engine.invariants import check

    console = Console(highlight=False)
    console.print(f"{policy.label} ({policy!r}), {args.trials} trials each")
    broken = 0
    for finding in check(policy, args.trials):
        mark = "[red]broken[/red]" if finding.broken else "[green]holds[/green] "
        console.print(f"  {mark}  {finding.name}")
        if finding.broken:
            broken += 1
            console.print(f"          {finding.broken}", markup=False, soft_wrap=True)
    if broken:
        console.print(f"{broken} not held")
        sys.exit(1)


def look_in(folder: Path | None) -> None:
    """Make the user's modules importable: those in `folder`, and those in the current one.

    Raises:
        UserError: if there is no such folder.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"--config-dir {folder} is not allowed: there is no such folder.")
    sys.path += [str(f.absolute()) for f in (folder, Path.cwd()) if f is not None and str(f.absolute()) not in sys.path]


def made(cls: type[Policy], settings: Sequence[str]) -> Policy:
    """A policy of that class with its defaults and `settings`, each `name=value`.

    Raises:
        ConfigError: if there is no such setting, or its value is not allowed.
    """
    known = defaults(cls)
    given: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in known:
            has = f"{cls.name} has {', '.join(known)}" if known else f"{cls.name} has no settings"
            raise ConfigError(f"policy.{name}", value, has + nearest(name, known))
        given[name] = yaml.safe_load(value)
    try:
        return cls(**given)
    except TypeError as error:
        raise ConfigError("policy", cls.name, f"it cannot be made with its defaults ({error})") from error
