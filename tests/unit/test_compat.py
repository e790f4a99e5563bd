"""What is used of other libraries beyond their documented interfaces is in `a2sf.compat`, with versions that are bounded."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from a2sf.compat.transformers import refused
from a2sf.errors import ConfigError

ROOT = Path(__file__).parents[2]
MODULES = [p for p in sorted((ROOT / "a2sf" / "compat").glob("*.py")) if p.name != "__init__.py"]
TRIED = re.compile(r"(?:Tried with|and) ([\w-]+) (\d[\d.]*\d)")


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_a_module_names_the_versions_it_was_tried_with(module):
    tried = TRIED.findall(ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "")
    assert tried, "its docstring says `Tried with <library> <version>`"
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for library, version in tried:
        pin = rf"(?m)^{library.replace('-', '[-_]')}=={re.escape(version)}$"
        assert re.search(pin, pinned), "and they are those that constraints.txt pins"
        needs = [d for d in project["dependencies"] if re.match(rf"{library}\b", d)]
        assert needs, f"{library} is a dependency"
        assert "<" in needs[0], f"{needs[0]} has an upper bound"


def test_any_error_is_one_sentence():
    with (
        pytest.raises(ConfigError, match=r"k=v is not allowed: it fails \(KeyError: 'x'\)"),
        refused("k", "v", "it fails"),
    ):
        raise KeyError("x")
    with pytest.raises(ConfigError, match="its own words"), refused("k", "v", "it fails"):
        raise ConfigError("a", "b", "its own words")
