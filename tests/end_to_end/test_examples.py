"""The examples, run as they are (few documents), the notebook's cells too."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from a2sf.engine.invariants import INVARIANTS, SCHEDULES
from tests.started import started

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "from_question_to_figure.ipynb"


def run(script: str | Path, *arguments: object, cwd: Path) -> str:
    environment = os.environ | {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
    done = started(script, *arguments, environment=environment, folder=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.full
def test_score(tmp_path):
    said = run(EXAMPLES / "score.py", 2, cwd=tmp_path)
    assert "on 2 documents" in said
    assert "% of a request's tokens are cached" in said


@pytest.mark.full
def test_generate(tmp_path):
    said = run(EXAMPLES / "generate.py", 40, cwd=tmp_path)
    assert "79 tokens read and written, 64 cached" in said


@pytest.mark.full
def test_own_policy_and_its_yaml(tmp_path):
    said = run(EXAMPLES / "own_policy.py", cwd=tmp_path)
    assert said.count("holds") == len(INVARIANTS) * len(SCHEDULES)
    plan = [
        "policy=first_and_last",
        "policy.first_share=0.5",
        "plan_only=true",
        "data=bundle",
        "tasks=[copa]",
        "limit=2",
    ]
    said = run("a2sf", "run", *plan, "--config-dir", EXAMPLES, cwd=tmp_path)
    assert "1 cell, 0 done, 1 to run" in said
    assert "first_and_last" in said


@pytest.mark.full
def test_read_sweep(tmp_path):
    said = run(EXAMPLES / "read_sweep.py", cwd=tmp_path)
    assert "48400 scored documents" in said
    assert "arc_challenge" in said


@pytest.mark.full
def test_early_stopping(tmp_path):
    said = run(EXAMPLES / "early_stopping.py", cwd=tmp_path)
    assert said.count("winogrande") == 14
    assert "share of the documents: {'±5': 0.8, '±10': 0.5, 'which is better': 0.78}" in said


def test_every_example_is_tested():
    """A new example gets a test here."""
    assert {f.name for f in EXAMPLES.glob("*.*") if f.is_file()} == {
        "score.py",
        "generate.py",
        "own_policy.py",
        "read_sweep.py",
        "early_stopping.py",
        NOTEBOOK.name,
    }


@pytest.mark.full
def test_the_notebook_runs_and_holds_outputs(tmp_path):
    assert NOTEBOOK.stat().st_size < 300_000
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert any("image/png" in o.get("data", {}) for c in cells for o in c["outputs"])
    assert not any(o["output_type"] == "error" for c in cells for o in c["outputs"])
    code = "\n".join(line for c in cells for line in "".join(c["source"]).splitlines() if line[:1] != "%")
    fewer = code.replace("DOCUMENTS = 100", "DOCUMENTS = 2").replace("tasks=[piqa,copa]", "tasks=[copa]")
    assert fewer.count("DOCUMENTS = 2") == 1
    (tmp_path / "cells.py").write_text(fewer + "\nassert figure.axes\nassert len(comparisons) == 2\n")
    assert "7 cells, 0 done, 7 to run" in run(tmp_path / "cells.py", cwd=tmp_path)
