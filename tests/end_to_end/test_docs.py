"""The tutorials do what they say: their files are written, their commands and their Python run, in their order."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from a2sf.app.folders import model_names
from a2sf.policies.find import built_in, defaults
from a2sf.sweep.config.schema import register
from a2sf.sweep.config.settings import read
from tests.started import started

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [DOCS / "quick-start.md", *sorted((DOCS / "tutorials").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def steps(page: Path) -> list[tuple[str, str, str]]:
    """Language, file name ("" for none) and text of each block of a page."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run(script: str | Path, *arguments: str, folder: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "mine")])}
    done = started(script, *arguments, environment=environment, folder=folder)
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


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "scripts" / "docs_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_keys_is_current(hooks):
    assert hooks.KEYS.read_text(encoding="utf-8") == hooks.keys_page(), "run python scripts/docs_hooks.py"


def test_every_policy_has_a_page_on_the_site(hooks):
    """With what `a2sf policies` knows of it, and the rows of results that docs/ has of it."""
    pages, commands = hooks.policy_pages, {}
    assert sorted(pages.names()) == sorted(built_in()) == sorted(f.stem for f in (ROOT / "conf/policy").glob("*.yaml"))
    for name, cls in built_in().items():
        page = pages.policy_page(name)
        assert page.startswith(f"# {cls.label}\n")
        assert f"`policy={name}`" in page
        assert "as for " not in page.partition("## Settings")[2].partition("## Run it")[0], name
        for setting, value in defaults(cls).items():
            shown = "required" if setting in pages.required(cls) else "" if value in ("", None) else f"`{value}`"
            assert f"| `policy.{setting}` | {shown} | " in page, (name, setting)
        for when in cls.schedules:
            assert f"`{when}`" in page.partition("| schedules |")[2].splitlines()[0], name
        assert ("| causal | yes |" in page) == cls.causal, name
        documented = "Deviations:" in (sys.modules[cls.__module__].__doc__ or "") + (cls.__doc__ or "")
        assert ("## Deviations from the paper\n\n" in page) == documented, name
        (line,) = re.findall(r"^\$ a2sf run (?:-m )?(.*)$", page, re.MULTILINE)
        assert pages.required(cls) == re.findall(r"policy\.(\w+)=[A-Z]+\b", line), name
        commands[name] = (
            line.replace("full,", "")
            .replace("FILE", "''")
            .replace("THRESHOLD", "-2.5")
            .replace("GATES", "random")
            .split()
        )
    del commands["calibrated"]  # needs a file
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for name, given in commands.items():
            assert read(compose("config", given), model_names()).cells[0].policy.name == name


def test_a_policys_page_has_its_own_results_alone(hooks):
    pages = hooks.policy_pages
    h2o = pages.policy_page("h2o")
    assert "| H2O | 0.2 | step | \N{EN DASH} | 36.5 | 17.0 | 60.5 | 38.0 |" in h2o  # docs/methods.md
    assert "| Documents (n) |  |  |  | 200 | 200 | 200 | 600 |" in h2o
    assert "| H2O | 0.8 | \N{EN DASH} |" in h2o  # docs/reference-results.md
    assert pages.NOTHING not in h2o
    assert not re.search(r"^\| (A2SF|Window|StreamingLLM)", h2o, re.MULTILINE)
    assert "| Calibrated (by head) | 0.1 |" in pages.policy_page("calibrated")
    assert "| A2SF 0.1 | step |" in pages.policy_page("a2sf")  # docs/long.md
    assert "| `keydiff_block` |" in pages.policy_page("keydiff")  # docs/parity.md
    rows = {row[t.columns.index("Policy")] for t in pages.tables() for row in t.rows}
    for name, cls in built_in().items():
        named = any(cell == cls.label or cell.startswith((f"{cls.label},", f"{cls.label} (")) for cell in rows)
        assert (pages.NOTHING in pages.policy_page(name)) == (not named), name
