"""`a2sf policies`: the available policies, described by their docstrings and fields."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console

from a2sf.commands.arguments import Parser
from a2sf.commands.policy.check import look_in
from a2sf.commands.policy.describe import attributes, paper, policy_summary
from a2sf.errors import UserError
from a2sf.policies.base import WHEN, Policy
from a2sf.policies.find import built_in, defaults, find_policy, installed, load


def main(arguments: Sequence[str]) -> None:
    """Print every policy, or everything about some of them; exit with 1 if one cannot be loaded."""
    parser = Parser(prog="a2sf policies", description="The available policies.")
    parser.add_argument("names", nargs="*", help="print everything about these: names, or module:Class")
    parser.add_argument("--config-dir", type=Path, help="your folder, with policy/*.yaml")
    args = parser.parse_args(arguments)
    look_in(args.config_dir)
    console = Console(highlight=False)
    if args.names:
        for cls in [find_policy(name) for name in args.names]:
            _print(console, cls.name, cls)
            text = inspect.getdoc(cls) if (vars(cls).get("__doc__") or "").count("\n") else None
            for part in filter(None, (inspect.getdoc(sys.modules[cls.__module__]), text)):
                console.print(f"\n{part}", markup=False, soft_wrap=True)
        return
    for name, cls in built_in().items():
        _print(console, name, cls)
    problems = 0
    for name, path in others(args.config_dir).items():
        try:
            _print(console, name, load(path))
        except UserError as error:
            problems += 1
            console.print(f"[bold]{name}[/bold]\n    {error}", soft_wrap=True)
    if problems:
        sys.exit(1)


def others(folder: Path | None) -> dict[str, str]:
    """Name -> class of the policies of other packages and of the files in `folder`/policy."""
    found = {name: entry.value for name, entry in installed().items()}
    for file in sorted((folder / "policy").glob("*.yaml")) if folder else ():
        node = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
            raise UserError(f"{file} names no class: give _target_: module.Class.")
        found[file.stem] = node["_target_"]
    return found


def _print(console: Console, name: str, cls: type[Policy]) -> None:
    console.print(f"[bold]{name}[/bold]  {cls.label}", soft_wrap=True)
    about = attributes(cls)
    settings = {f"{n} = {value}": about.get(n, "") for n, value in defaults(cls).items()}
    lines = [policy_summary(cls), *([f"Paper: {source}"] if (source := paper(cls)) else []), _when(cls)]
    lines += [f"{setting}  {meaning}".rstrip() for setting, meaning in settings.items()]
    for line in lines:
        console.print(f"    {line}", markup=False, soft_wrap=True)


def _when(cls: type[Policy]) -> str:
    """The schedules that it supports, and whether it uses later tokens."""
    known = ", ".join(cls.schedules) if set(WHEN) - set(cls.schedules) else f"all ({', '.join(WHEN)})"
    return f"Schedules: {known}" + (
        "" if cls.causal else "; not causal: an oracle (upper bound), never ranked with the others"
    )
