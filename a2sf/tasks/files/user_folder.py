"""The user's folder of task definitions (`include_path`), which are found by name.

As in lm-eval, the user's definition takes precedence over lm-eval's of the same name. Other than in lm-eval, a file
that cannot be read is an error.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from a2sf.compat.lm_eval import Entry, Kind, add_entry, kind_of, unresolved, yaml_files
from a2sf.errors import ConfigError

KEY = "include_path"
_folders: list[Path] = []


def include(path: str) -> Path:
    """Read a folder and register it, so that its groups find their members by name.

    Raises:
        ConfigError: if there is no such folder, it defines nothing, or a definition cannot be read.
    """
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(KEY, path, "there is no such folder; give one with YAML files of tasks")
    if not entries(folder):
        raise ConfigError(KEY, path, "no YAML file in it defines a task or a group (`task:` or `group:`)")
    if folder not in _folders:
        _folders.append(folder)
    return folder


def folder_of(file: Path | None) -> Path | None:
    """The innermost registered folder that contains a file; None: there is none."""
    inside = [f for f in _folders if file is not None and file.is_relative_to(f)]
    return max(inside, key=lambda f: len(f.parts), default=None)


def entries(folder: Path) -> dict[str, Entry]:
    """The tasks, groups and tags that a folder defines, by name.

    Files without `task:` and `group:` are templates that other files include.

    Raises:
        ConfigError: if a file cannot be read, or two define the same name.
    """
    return _entries(tuple((file, file.stat().st_mtime_ns) for file in yaml_files(folder)))


@cache
def _entries(files: tuple[tuple[Path, int], ...]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for file, _ in files:
        config = _read(file)
        if not {"task", "group", "class"} & set(config):
            continue
        kind = kind_of(config)
        name = config.get("group" if kind is Kind.GROUP else "task")
        if not isinstance(name, str) or not name:
            raise ConfigError(KEY, file, "`task:` or `group:` in the file has to be one name")
        if name in found and found[name].kind is not Kind.TAG:
            raise ConfigError(KEY, file, f"it defines {name}, as {found[name].yaml_path} does; give one another name")
        add_entry(config, file, found)
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        return unresolved(file)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(KEY, file, f"it is not YAML ({error.problem or error.context}{line})") from error
    except Exception as error:  # a template's path, an encoding, or anything that lm-eval's reader raises
        raise ConfigError(KEY, file, f"it cannot be read ({' '.join(str(error).split())})") from error
