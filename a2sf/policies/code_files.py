"""The files of a user's own code: those that a Python file imports, as far as they are the user's and no library's.

Nothing is imported for that. What a file reads by itself (a table of words) is not found.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path

OURS = ("a2sf", "baselines")
"""Packages that have versions of their own."""
INSTALLED = ("site-packages", "dist-packages")
"""Names of folders that hold libraries."""


def imported_files(file: Path, package: str = "") -> list[Path]:
    """The user's files that a Python file imports, and those that these import, without itself, by their paths.

    A module is the user's if it is found beside or below the file, or in a folder of Python's path above it; in a folder of
    installed libraries only if it is of the same package.

    Args:
        package: the package or module that the file belongs to, by its first name; "": none.
    """
    file = file.resolve()
    found: dict[Path, None] = {file: None}
    waiting = [file]
    while waiting:
        one = waiting.pop()
        for name in _names(one, one.stat().st_mtime_ns):
            for other in _files_of(name, one, file.parent, package):
                if other not in found:
                    found[other] = None
                    waiting.append(other)
    return sorted(set(found) - {file})


@lru_cache(maxsize=1024)
def _names(file: Path, changed: int) -> tuple[str, ...]:
    """The modules that a file may import, relative ones with dots in front; `changed` is when it last was."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError):
        return ()  # reported when it is imported
    names: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= dict.fromkeys(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            dot = "" if base.endswith(".") else "."
            names |= dict.fromkeys([base, *(f"{base}{dot}{alias.name}" for alias in node.names)])
    return tuple(names)


def _files_of(name: str, importer: Path, root: Path, package: str) -> Iterator[Path]:
    """The files of a module and of the packages that it is in, if it is the user's."""
    plain = name.lstrip(".")
    if level := len(name) - len(plain):
        where = [str([importer, *importer.parents][level])]
    elif plain.partition(".")[0] in (*OURS, *sys.stdlib_module_names):
        return
    else:
        where = [entry for entry in map(str, sys.path) if _is_users(Path(entry or "."), root, plain, package)]
    parts = plain.split(".")
    for i in range(len(parts)):
        spec = PathFinder.find_spec(parts[i], where)  # by its last name: nothing is looked up among imported modules
        if spec is None:
            return
        if spec.origin is not None and spec.origin.endswith(".py"):
            yield Path(spec.origin).resolve()
        if spec.submodule_search_locations is None:
            return
        where = list(spec.submodule_search_locations)


def _is_users(entry: Path, root: Path, name: str, package: str) -> bool:
    """Whether modules in a folder of Python's path may be the user's, whose file is in the folder `root`."""
    entry = entry.resolve()
    libraries = {Path(sysconfig.get_path(of)).resolve() for of in ("stdlib", "platstdlib", "purelib", "platlib")}
    if entry in libraries or set(INSTALLED) & set(entry.parts):
        return bool(package) and name.partition(".")[0] == package
    return root.is_relative_to(entry) or entry.is_relative_to(root)
