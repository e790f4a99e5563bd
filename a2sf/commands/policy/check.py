"""`a2sf check mine:MyPolicy`: which invariants of docs/semantics.md a policy holds, under each schedule that it supports."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from a2sf.commands.arguments import Parser
from a2sf.errors import ConfigError, UserError
from a2sf.policies.base import Policy
from a2sf.policies.find import check_setting_names, find_policy

COLOURS = {"broken": "red", "except": "yellow", "holds": "green"}


def main(arguments: Sequence[str]) -> None:
    """Print under which schedules each invariant holds; exit with 1 if one is broken."""
    parser = Parser(prog="a2sf check", description="Test the invariants of a policy on random tensors.")
    parser.add_argument("policy", help="a policy's name, or your class as module:Class")
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="settings that differ from the defaults")
    parser.add_argument("--config-dir", type=Path, help="your folder; the current folder is searched, too")
    parser.add_argument("--trials", type=int, default=8, help="random trials of each invariant")
    args = parser.parse_args(arguments)
    if args.trials < 1:
        raise UserError(f"--trials {args.trials} is not allowed: give at least 1.")
    look_in(args.config_dir)
    policy = made(find_policy(args.policy), args.settings)

    from a2sf.engine.invariants import Finding, check, in_words

    console = Console(highlight=False)
    console.print(f"{policy.label} ({policy!r}), {args.trials} trials each", markup=False, soft_wrap=True)
    broken, printed = 0, set[str | None]()
    for name, of_one in groupby(check(policy, args.trials), lambda finding: finding.name):
        findings = list(of_one)
        by_outcome: dict[str, list[Finding]] = {"broken": [f for f in findings if f.broken]}
        by_outcome["except"] = [f for f in findings if f.excepted]
        by_outcome["holds"] = [f for f in findings if not f.broken and not f.excepted]
        broken += len(by_outcome["broken"])
        for word, some in by_outcome.items():
            if not some:
                continue
            # an error of the policy's own code occurs in many invariants, at other sizes, and is reported once
            whys = {_kind(f.raised) or f.broken or f.excepted: f.broken or f.excepted for f in some if word != "holds"}
            new = {key: why for key, why in whys.items() if key not in printed}
            printed |= {_kind(f.raised) for f in some if f.raised}
            same = ": the same error" * (len(new) < len(whys))
            under = "; ".join(in_words(f.schedule) for f in some)
            console.print(f"  [{COLOURS[word]}]{word:6}[/]  {name}  [dim]{under}[/]{same}", soft_wrap=True)
            for why in new.values():
                console.print(f"          {why}", markup=False, soft_wrap=True)
    if broken:
        console.print(f"{broken} broken")
        sys.exit(1)


def _kind(raised: str | None) -> str | None:
    """An error without its numbers, which differ between random cases."""
    return None if raised is None else re.sub(r"\d+", "0", raised)


def look_in(folder: Path | None) -> None:
    """Make the modules in `folder` importable, as those in the current folder are.

    Raises:
        UserError: if there is no such folder.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"--config-dir {folder} is not allowed: there is no such folder.")
    if folder is not None and (place := str(folder.absolute())) not in sys.path:
        sys.path.append(place)


def made(cls: type[Policy], settings: Sequence[str]) -> Policy:
    """A policy of class `cls` with `settings`, each `name=value`, and the defaults of the others.

    Raises:
        ConfigError: if there is no such setting, or its value is not allowed.
    """
    pairs = (setting.partition("=") for setting in settings)
    given: dict[str, Any] = {name: yaml.safe_load(value) for name, _, value in pairs}
    check_setting_names(cls, given)
    try:
        return cls(**given)
    except TypeError as error:
        raise ConfigError("policy", cls.name, f"it cannot be made with its defaults ({error})") from error
