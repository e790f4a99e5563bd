"""The user's folder of configurations (`--config-dir`).

For Hydra each subfolder is a group of configurations. Here a subfolder with the name of a key, such as the `tasks/` of
`include_path`, is not a group, or Hydra would read `tasks=[piqa]` as the choice of a file in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from omegaconf._utils import get_yaml_loader

from a2sf.errors import ConfigError, UserError
from a2sf.shipped import shipped
from a2sf.sweep.config import schema

OPTIONS = ("--config-dir", "-cd")
SCHEME = "own"
"""The folder's scheme in Hydra's search path (`hydra_plugins.own_folder`)."""
GLOBAL = re.compile(r"^#\s*@package\s+_global_", re.MULTILINE)
SWEPT = "hydra.sweeper.params."
_folder: list[Path] = []


def use(folder: Path | None) -> None:
    """Set the folder of this process, before Hydra starts; None: there is none.

    Raises:
        UserError: if there is no such folder.
    """
    if folder is not None and not folder.expanduser().is_dir():
        raise UserError(f"--config-dir {folder} is not allowed: there is no such folder.")
    _folder[:] = [] if folder is None else [folder]


def used() -> Path | None:
    """The folder that `use` has set."""
    return next(iter(_folder), None)


def option() -> list[str]:
    """The folder as arguments of the command line."""
    return ["--config-dir", str(used())] if used() is not None else []


def taken_out(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The folder of a command line (the last one, if there are several), and the other arguments."""
    folder, left, given = None, [], iter(arguments)
    for argument in given:
        option, equals, value = argument.partition("=")
        if option in OPTIONS:
            folder = Path(value if equals else next(given, ""))
        else:
            left.append(argument)
    return folder, left


def is_key(path: str) -> bool:
    """Whether a path inside the folder begins with a key that is not a group of files."""
    first = path.partition("/")[0]
    return schema.is_key(first) and not (shipped("conf") / first).is_dir()


def check(folder: Path) -> None:
    """Refuse files that hide those of the package, and text that YAML reads as a number: `revision: 1.10` would be 1.1.

    Raises:
        UserError: naming the file.
    """
    shipped_files = [f.relative_to(shipped("conf")) for f in shipped("conf").rglob("*.yaml")]
    for name in (*shipped_files, Path("schema.yaml")):
        if (hidden := folder / name).exists():
            raise UserError(
                f"{hidden} has the name of a file that comes with a2sf, and would hide it: give it another name."
            )
    for group in dict.fromkeys(str(name.parent) for name in shipped_files):
        for file in sorted((folder / group).glob("*.yaml")):
            _check_texts(file, "" if group == "." else f"{group.replace('/', '.')}.")


def _check_texts(file: Path, prefix: str) -> None:
    text = file.read_text(encoding="utf-8")
    try:
        written = list(_scalars(yaml.compose(text), "" if GLOBAL.search(text) else prefix))
    except yaml.YAMLError:
        return  # Hydra reports the line
    for key, value in written:
        read = yaml.load(value, Loader=get_yaml_loader())
        if schema.holds_text(key) and read is not None and str(read) != value:
            raise ConfigError(key, value, f"YAML reads it as {read!r}, and it is text; put it in quotes in {file}")


def _scalars(node: yaml.Node | None, path: str) -> Iterator[tuple[str, str]]:
    """Key and text of each value that is written without quotes."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _scalars(value, f"{path}{key.value}.")
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        yield path.removesuffix(".").removeprefix(SWEPT), node.value
