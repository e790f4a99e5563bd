"""`a2sf run`: measure the accuracy that token pruning costs, in one configuration or a sweep."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from a2sf.app import grid
from a2sf.commands.policy.describe import attributes
from a2sf.compat.hydra import options
from a2sf.errors import UserError, nearest
from a2sf.shipped import shipped
from a2sf.sweep.config import folder as config_dir
from a2sf.sweep.config import schema
from a2sf.sweep.config.grid import addable
from a2sf.sweep.config.overrides import as_written, check_trackers

MULTIRUN = {"-m", "--multirun"}
SHOWS_ONLY = {"--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc"}
"""Options with which Hydra shows something and runs nothing."""
TAKES_VALUE = {"--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c", "--package", "-p", "--info", "-i"}
"""Hydra's options whose value is the next argument."""
USAGE = """\
usage: a2sf run [key=value ...] [-m key=a,b,c ...] [+sweep=PRESET] [--config-dir DIR]

It runs one configuration, with -m the grid of all values, with a preset its grid. The same command resumes a sweep.
--config-dir DIR adds your folder: DIR/model/, DIR/policy/, DIR/data/, DIR/sweep/ and Python files that they name.
--cfg job shows the configuration and runs nothing; --hydra-help shows Hydra's other options.

groups (each name is a file; * is the default; several trackers are a list, tracker=[wandb,tensorboard])
{groups}

presets
{presets}

keys [default]
{keys}

Example: a2sf run -m policy=full,h2o,a2sf budget.ratio=0.2,0.4 tasks=[piqa] data=bundle limit=100 sweep_name=mine"""


@hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name="config")
def hydra_main(composed: DictConfig) -> object:
    """Hydra's entry, which reads `sys.argv`: a single configuration, or a job for one group of a grid."""
    if HydraConfig.get().mode != RunMode.RUN:
        return grid.run_job(composed)
    grid.run_single(composed)
    return None


def main(arguments: Sequence[str]) -> None:
    """Run the configuration or the sweep of the overrides in `arguments`.

    Raises:
        UserError: for options that exclude each other, or one tracker twice.
    """
    folder, given = config_dir.taken_out(list(arguments))
    if {"--help", "-h"} & set(given):
        print(help_text([*([folder] if folder else []), shipped("conf")]))
        return
    config_dir.use(folder)
    if folder is not None:
        config_dir.check(folder)
    for argument in given:
        check_trackers(argument)
        _check_option(argument)
    given = [a if a.startswith("-") else as_written(a) for a in given]
    given = [f"+{a}" if a.startswith("sweep=") else addable(a) for a in given]
    other = SHOWS_ONLY & {a.partition("=")[0] for a in given}
    if other and MULTIRUN & set(given):
        raise UserError(f"{other.pop()} shows one configuration and runs nothing, so it cannot go with -m.")
    if any(a.startswith("+sweep=") for a in given) and not (other | (MULTIRUN & set(given))):
        given.append("--multirun")  # a preset is a grid
    sys.argv[1:] = _overrides_last(given)
    schema.register()
    hydra_main()


def _check_option(argument: str) -> None:
    """Refuse an option that Hydra does not have; as in Hydra, its beginning is enough.

    Raises:
        UserError: naming it.
    """
    name = argument.partition("=")[0]
    if name.startswith("--") and not any(o.startswith(name) for o in options()):
        raise UserError(f"a2sf run has no option {name}{nearest(name, options())}; see a2sf run --help.")


def _overrides_last(arguments: Sequence[str]) -> list[str]:
    """Options first: Hydra's parser needs all overrides in one sequence, but people write options between them."""
    last = [
        after not in TAKES_VALUE and not argument.startswith("-")
        for after, argument in zip(["", *arguments], arguments, strict=False)
    ]
    return [a for place in (False, True) for a, is_last in zip(arguments, last, strict=True) if is_last == place]


def complete(arguments: Sequence[str], commands: Sequence[str]) -> None:
    """The shell's completion, `a2sf -sc ...`: names of commands are completed here, arguments of `run` by Hydra.

    Raises:
        UserError: if Hydra knows no such shell.
    """
    action, _, shell = (arguments or [""])[0].partition("=")
    if action not in ("install", "uninstall", "query") or shell not in ("bash", "zsh", "fish"):
        raise UserError("give -sc install=bash, or uninstall=, and zsh or fish instead of bash.")
    if action == "query":
        program, _, line = os.environ.get("COMP_LINE", "").lstrip().partition(" ")
        command, space, rest = line.lstrip().partition(" ")
        if not space:
            print(" ".join(c for c in commands if c.startswith(command)))
            return
        if command != "run":
            return  # the shell then offers files
        os.environ["COMP_LINE"] = f"{program} {rest}"
    sys.argv[:] = ["a2sf", "-sc", f"{action}={shell}"]
    schema.register()
    hydra_main()


def help_text(folders: Sequence[Path]) -> str:
    """The help text: groups, presets and keys with one line each.

    Args:
        folders: of configurations, the user's first.
    """
    defaults = yaml.safe_load((shipped("conf") / "config.yaml").read_text(encoding="utf-8"))
    chosen = {k: v for entry in defaults["defaults"] if isinstance(entry, dict) for k, v in entry.items()}
    groups = {}
    for group in ("model", "policy", "schedule", "data", "tracker", "hydra/launcher"):
        names = dict.fromkeys(f.stem for folder in folders for f in sorted((folder / group).glob("*.yaml")))
        if group == "policy":
            from a2sf.policies.find import installed

            names |= dict.fromkeys(installed())
        groups[group] = ", ".join(f"{n}*" if n == chosen.get(group) else n for n in names)
    presets = {f"+sweep={f.stem}": _about(f) for d in folders for f in sorted((d / "sweep").glob("*.yaml"))}
    keys = {key: f"{about} [{default}]" if default else about for key, default, about in key_table()}
    return USAGE.format(groups=_lines(groups), presets=_lines(presets), keys=_lines(keys))


def key_table(*, full: bool = False) -> list[tuple[str, str, str]]:
    """Each key of the configuration, its default ("": none) and its meaning.

    Args:
        full: the complete description of a key; else its first sentence.
    """
    return list(_keys(schema.Config, full=full))


def _keys(cls: Any, prefix: str = "", *, full: bool = False) -> Iterator[tuple[str, str, str]]:
    about, inner = attributes(cls, full=full), schema.groups() if cls is schema.Config else {}
    for f in dataclasses.fields(cls):
        if f.name in inner:
            yield from _keys(inner[f.name], f"{f.name}.", full=full)
        elif f.name not in schema.RENAMED:
            default = "" if f.default is dataclasses.MISSING or f.default in ("", None) else str(f.default).lower()
            yield prefix + f.name, default, about[f.name]


def _about(preset: Path) -> str:
    """The first comment of a preset that is not Hydra's `@package`."""
    comments = (line.lstrip("# ") for line in preset.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((c for c in comments if not c.startswith("@package")), "")


def _lines(entries: dict[str, str]) -> str:
    width = max(len(name) for name in entries)
    return "\n".join(f"  {name:<{width}}  {about}".rstrip() for name, about in entries.items())
