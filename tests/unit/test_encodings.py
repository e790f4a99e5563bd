"""Files are UTF-8 whatever the locale; a screen shows what it can of them, and nothing is lost because of it."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from a2sf import cli
from a2sf.commands import tables
from a2sf.store.runs import load_sweep
from tests.sweep_fixture import Plan, write_sweep

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    write_sweep(
        tmp_path / "s", Plan(model="café\N{MINUS SIGN}7", policies=("full", "h2o", "a2sf"), documents={"piqa": 30})
    )
    return tmp_path / "s"


def test_tables_where_the_locale_is_ascii(sweep: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "LC_ALL": "C",
    }
    command = [sys.executable, "-m", "a2sf.cli", "tables", str(sweep), "--no-plots"]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path, check=False)
    screen = done.stdout.decode("ascii")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr.decode("ascii")
    assert "cafe-7, 0-shot" in screen
    assert "d full" in screen
    assert "?" not in screen
    for name in ("tables/tables.md", "report.html"):
        assert "café\N{MINUS SIGN}7, 0-shot" in (sweep / name).read_text(encoding="utf-8")
    assert len(load_sweep(sweep)) == 5


def test_a_screen_of_another_encoding(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), "iso-8859-1") for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)
    cli.replace_unencodable()
    tables.main([str(sweep), "--no-plots"])
    for stream in streams:
        stream.flush()
    screen, errors = (stream.buffer.getvalue().decode("iso-8859-1") for stream in streams)  # type: ignore[attr-defined]
    assert "café-7, 0-shot" in screen
    assert "d full" in screen
    assert "?" not in screen + errors


def test_no_file_of_ours_is_opened_in_the_locales_encoding() -> None:
    """Every text file that is read or written says that it is UTF-8."""
    lacking = []
    for file in sorted((ROOT / "a2sf").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named = {k.arg for k in node.keywords}
                if node.func.attr in ("read_text", "write_text") and "encoding" not in named:
                    lacking.append(f"{file.name}:{node.lineno}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("open", "io.open"):
                modes = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
                if "encoding" not in {k.arg for k in node.keywords} and not any("b" in str(m) for m in modes):
                    lacking.append(f"{file.name}:{node.lineno}")
    assert lacking == []
