"""The tutorials do what they say: their files are written, their commands and their Python run, in their order."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from pathlib import Path

import pytest

from tests.started import started

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [DOCS / "quick-start.md", *sorted((DOCS / "tutorials").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def steps(page: Path) -> list[tuple[str, str, str]]:
    """Language, file name ("" for none) and text of each block of a page."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run(script: str | Path, *arguments: str, folder: Path) -> None:
    told = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "mine")])}
    done = started(script, *arguments, environment=told, folder=folder)
    assert done.returncode == 0, f"{script} {arguments}\n{done.stdout}\n{done.stderr}"


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_tutorial_runs_as_printed(page, tmp_path):
    code, ran = [], 0
    for language, file, text in steps(page):
        if file:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(text, encoding="utf-8")
        elif language == "python":
            code.append(text)
        elif language == "console":
            for line in text.splitlines():
                if line.startswith("$ a2sf "):
                    run(*shlex.split(line, comments=True)[1:], folder=tmp_path)
                    ran += 1
    if code:
        (tmp_path / "page.py").write_text("\n".join(code), encoding="utf-8")
        run(tmp_path / "page.py", folder=tmp_path)
    assert ran or code, "the page has nothing to run"


def test_the_page_of_keys_is_current():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "scripts" / "docs_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert hooks.KEYS.read_text(encoding="utf-8") == hooks.keys_page(), "run python scripts/docs_hooks.py"
