"""Python functions that a task's YAML names: where they are written, and which arguments they may look for."""

from __future__ import annotations

import ast
import importlib.util
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

NOT_ARGUMENTS = {"version", "config_source", "_metadata"}
"""What lm-eval itself notes in a task's metadata."""


def function_file(value: str) -> Path | None:
    """The Python file of a function as lm-eval writes it where it does not import: `/folder/module.function`."""
    module, _, name = value.rpartition(".")
    if not value.startswith("/") or not name.isidentifier() or "\n" in value or len(value) > 1000:
        return None
    folder, _, inner = module.rpartition("/")
    file = Path(folder) / f"{inner.replace('.', '/')}.py"
    if file.is_file():
        return file
    if not all(part.isidentifier() for part in inner.split(".")):
        return None
    with suppress(ImportError, ValueError, AttributeError):  # a module that Python finds, as lm-eval does next
        spec = importlib.util.find_spec(inner)
        if spec is not None and spec.origin is not None and (origin := Path(spec.origin)).suffix == ".py":
            return origin
    return None


def live(cfg: dict[str, Any]) -> dict[str, Any]:
    """`cfg` with the functions that are written as strings imported, as lm-eval does."""
    from lm_eval.tasks._yaml_loader import _import_fun_from_str

    def imported(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: imported(v) for k, v in value.items()}
        if isinstance(value, list):
            return [imported(v) for v in value]
        return _import_fun_from_str(value) if isinstance(value, str) and function_file(value) else value

    return {k: imported(v) for k, v in cfg.items()}


def known_arguments(config: dict[str, Any]) -> frozenset[str]:
    """Names that a task's code may look for in its metadata, read off the code, which may take any (`**kwargs`).

    Those are the parameters of the function that makes its documents (`custom_dataset`), the words among the strings in that
    function's folder, and what the metadata holds already; for a task that is a class, the same of the class's folder.
    """
    maker = str(config.get("custom_dataset") or config.get("class") or "")
    file = function_file(maker)
    if file is None:
        return frozenset()
    stated = config.get("metadata")
    found = set(stated) if isinstance(stated, dict) else set()
    for beside in sorted(file.parent.glob("*.py")):
        found |= _words(beside, beside.stat().st_mtime_ns)
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
        return ast.Module([], [])  # told where it is imported
