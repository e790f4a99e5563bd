"""Python functions that a task's YAML names: their files, and the arguments that they may read."""

from __future__ import annotations

import ast
import importlib.util
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

NOT_ARGUMENTS = {"version", "config_source", "_metadata"}
"""Keys that lm-eval itself adds to a task's metadata."""


def function_file(value: str) -> Path | None:
    """The Python file of a function in lm-eval's notation `/folder/module.function`; None for any other text."""
    module, _, name = value.rpartition(".")
    if not value.startswith("/") or not name.isidentifier() or "\n" in value or len(value) > 1000:
        return None
    folder, _, inner = module.rpartition("/")
    file = Path(folder) / f"{inner.replace('.', '/')}.py"
    if file.is_file():
        return file
    if not all(part.isidentifier() for part in inner.split(".")):
        return None
    with suppress(ImportError, ValueError, AttributeError):  # as lm-eval does: a module on Python's path
        spec = importlib.util.find_spec(inner)
        if spec is not None and spec.origin is not None and (origin := Path(spec.origin)).suffix == ".py":
            return origin
    return None


def live(cfg: dict[str, Any]) -> dict[str, Any]:
    """The configuration with functions imported, as lm-eval does, instead of their names."""
    from a2sf.compat.lm_eval import import_function

    def imported(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: imported(v) for k, v in value.items()}
        if isinstance(value, list):
            return [imported(v) for v in value]
        return import_function(value) if isinstance(value, str) and function_file(value) else value

    return {k: imported(v) for k, v in cfg.items()}


def known_arguments(config: dict[str, Any]) -> frozenset[str]:
    """Names that a task's code may read from its metadata, found in the code, because `**kwargs` accepts any name.

    These are the parameters of the function that makes the documents (`custom_dataset`), the one-word strings in the Python
    files of its folder, and the names in the metadata. For a task that is a class, it is the folder of the class.
    """
    maker = str(config.get("custom_dataset") or config.get("class") or "")
    file = function_file(maker)
    if file is None:
        return frozenset()
    stated = config.get("metadata")
    found = set(stated) if isinstance(stated, dict) else set()
    for module in sorted(file.parent.glob("*.py")):
        found |= _words(module, module.stat().st_mtime_ns)
    return frozenset(found | _parameters(file, maker.rpartition(".")[2])) - NOT_ARGUMENTS


@cache
def _words(file: Path, changed: int) -> frozenset[str]:
    strings = (n.value for n in ast.walk(_parsed(file)) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return frozenset(s for s in strings if s.isidentifier())


def _parameters(file: Path, function: str) -> set[str]:
    return {
        a.arg
        for n in ast.walk(_parsed(file))
        if isinstance(n, ast.FunctionDef) and n.name == function
        for a in (*n.args.args, *n.args.kwonlyargs)
    }


def _parsed(file: Path) -> ast.AST:
    try:
        return ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
    except SyntaxError:
        return ast.Module([], [])  # reported when it is imported
