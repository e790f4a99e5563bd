"""What a user gets without a clone: dependencies that are declared, files that are found, names that keep working."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import a2sf
from a2sf.errors import ConfigError
from a2sf.policies.find import make_policy
from a2sf.shipped import found, shipped

ROOT = Path(__file__).parents[2]
OURS = {"a2sf", "baselines", "hydra_plugins"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> dict[str, set[str]]:
    """Top-level package -> the files that import it, wherever in them."""
    found: dict[str, set[str]] = {}
    for file in (f for folder in OURS for f in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(str(file.relative_to(ROOT)))
    return {n: files for n, files in found.items() if n not in OURS | sys.stdlib_module_names}


def pinned() -> set[str]:
    """The packages in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {normal(line.partition("==")[0]) for line in lines}


def test_every_package_that_is_imported_is_declared():
    optional = [r for group, rs in PROJECT["optional-dependencies"].items() if group != "dev" for r in rs]
    declared = {normal(Requirement(r).name) for r in [*PROJECT["dependencies"], *optional]}
    distributions = packages_distributions()
    for package, files in imported().items():
        names = {normal(n) for n in distributions.get(package, [package])}
        assert names & declared, f"{package} is imported by {sorted(files)} and not declared"


def test_what_is_declared_is_pinned():
    every = [*PROJECT["dependencies"], *(r for rs in PROJECT["optional-dependencies"].values() for r in rs)]
    assert {normal(Requirement(r).name) for r in every} - {"torch", "triton"} <= pinned()


def test_what_torch_fixes_is_not_pinned():
    """torch for GPUs, which pip takes on any Linux machine, states one version of Triton and of each CUDA package."""
    assert not [n for n in pinned() if n == "triton" or n.startswith(("nvidia", "cuda"))]


@pytest.mark.parametrize("name", a2sf.__all__)
def test_public_names(name):
    assert getattr(a2sf, name) is not None
    assert name in dir(a2sf)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        a2sf.nothing  # noqa: B018


def test_names_of_before_rooms():
    """Stored configurations and lm-eval's registration name these."""
    assert importlib.import_module("a2sf.policy").A2SF is a2sf.A2SF
    assert importlib.import_module("a2sf.lm").PrunedLM.__name__ == "PrunedLM"


def test_a_published_file_comes_from_the_package_where_there_is_none_here(tmp_path, monkeypatch):
    name = "runs/reference/findings/heads/retrieval.json"
    assert found(name) == Path(name)  # a clone's own
    monkeypatch.chdir(tmp_path)
    assert found(name) == shipped(name)
    assert make_policy("heads", heads=name).heads == make_policy("heads", heads=str(shipped(name))).heads != ()
    mine = tmp_path / name
    mine.parent.mkdir(parents=True)
    mine.write_text("[[0, 1]]")
    assert make_policy("heads", heads=name).heads == ((0, 1),)
    for other in ("findings/heads/retrieval.json", "conf/config.yaml", "runs/reference/none.json", str(tmp_path / "x")):
        assert found(other) == Path(other)
    assert found("~/x.json") == Path.home() / "x.json"
    for policy, key in (("heads", "heads"), ("calibrated", "file")):
        with pytest.raises(ConfigError, match="No such file"):
            make_policy(policy, **{key: "~nobody-at-all/x.json"})


def test_shipped_files_are_found():
    assert (shipped("conf") / "config.yaml").is_file()
    assert (shipped("runs/reference") / "a2sf_headlines.csv").is_file()
    assert (shipped("runs/reference") / "smollm2-135m.a2sf.zip").is_file()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_needs_no_model_library(arguments):
    heavy = {"torch", "transformers", "lm_eval", "numba", "pandas", "datasets"}
    code = f"import sys; from a2sf.cli import main; main({arguments}); sys.exit(repr({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stderr.strip() == "set()"
    if arguments == ["--help"]:
        assert len(done.stdout.splitlines()) <= 24
        assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_folder_has_at_most_twelve_modules():
    counts = {
        folder.relative_to(ROOT).as_posix(): len([f for f in folder.glob("*.py") if f.name != "__init__.py"])
        for folder in (ROOT / "a2sf").rglob("*")
        if folder.is_dir()
    }
    assert {name: n for name, n in counts.items() if n > 12} == {}
