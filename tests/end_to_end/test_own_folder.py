"""The folder of one's own that docs/own.md shows: exactly that tree, and the commands that stand below it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from a2sf.store.runs import load_sweep
from a2sf.sweep.config import schema
from tests.end_to_end.test_evaluate import evaluate
from tests.models import write_piqa

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "own.md").read_text()
TREE = dict(re.findall(r"^(mine/\S+) +(.*)$", DOCS, re.MULTILINE))
COMMANDS = [shlex.split(line) for line in re.findall(r"^\$ a2sf run (.*)$", DOCS, re.MULTILINE)]
PRESET = """# @package _global_
# Two policies.
sweep_name: first
tasks: [piqa]
limit: 2
data: {dir: DOCUMENTS}
hydra:
  sweeper:
    params:
      policy: full,first_and_last
"""
CAPITALS = """
task: capitals
custom_dataset: !function utils.documents
output_type: generate_until
test_split: test
doc_to_text: "The capital of {{country}} is"
doc_to_target: "{{capital}}"
generation_kwargs: {until: ["."], max_gen_toks: 3}
metric_list: [{metric: exact_match}]
"""
UTILS = """
def documents(word="", **_):
    from datasets import Dataset

    return {"test": Dataset.from_list([{"country": "France", "capital": " Paris"}, {"country": "Peru", "capital": " Lima"}])}
"""


def write_tree(root: Path) -> Path:
    """The tree of the docs, with what they say is in each file."""
    for name, says in TREE.items():
        (file := root / name).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".yaml":
            file.write_text(says + "\n")
    for name in ("own_policy.py", "policy/first_and_last.yaml"):
        shutil.copy(ROOT / "examples" / name, root / "mine" / name)
    (root / "mine/data/ours.yaml").write_text(f"dir: {root}/mine/documents\n")
    (root / "mine/sweep/first.yaml").write_text(PRESET.replace("DOCUMENTS", f"{root}/mine/documents"))
    (root / "mine/tasks/capitals.yaml").write_text(CAPITALS)
    (root / "mine/tasks/utils.py").write_text(UTILS)
    write_piqa(root / "mine/documents/piqa/validation.jsonl")
    assert {str(f.relative_to(root)) for f in root.rglob("*") if f.is_file()} == set(TREE)
    return root / "mine"


def run(arguments: list[str], root: Path, *more: str):
    """A command of the docs, run as if in the folder that holds `mine`."""
    placed = [re.sub(r"(^|=)mine\b", rf"\1{root}/mine", a) for a in arguments]
    return evaluate(*placed, *more, runs=root / "runs")


@pytest.mark.full
@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda a: a[0])
def test_the_commands_that_the_docs_show(arguments, tmp_path):
    mine = write_tree(tmp_path)
    done = run(arguments, tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    (sweep,) = [f for f in (tmp_path / "runs").iterdir() if f.is_dir() and not f.name.startswith(".")]
    stored = load_sweep(sweep)
    assert "first_and_last" in {s.cell["policy"] for s in stored}
    assert all(f"--config-dir {mine}" in s.result["provenance"]["command"] for s in stored)


def test_the_docs_show_commands():
    assert len(COMMANDS) >= 3
    assert all("--config-dir" in c for c in COMMANDS)


@pytest.mark.full
def test_a_folder_may_have_the_name_of_any_key(tmp_path):
    """And a group of files may have folders in it with any name."""
    mine = write_tree(tmp_path)
    groups = {"model", "policy", "schedule", "data", "tracker"}
    keys = {f.name for f in schema.dataclasses.fields(schema.Config)} - groups
    for key in keys:
        (mine / key).mkdir(exist_ok=True)
        (mine / key / "x.yaml").write_text("a: 1\n")
    given = {"tasks": "[capitals]", "limit": "1", "seed": "7", "shots": "0", "sweep_name": "2024_11_05", "trace": "0"}
    given |= {"include_path": str(mine / "tasks"), "log_samples": "false", "backend": "auto", "batch_size": "4"}
    given |= {
        "budget.ratio": "0.3",
        "early_stopping.pair": "null",
        "gen_kwargs.max_gen_toks": "2",
        "task_args.word": '"a\\tb"',
    }
    given |= {"forgetting_factor": "0.5", "checkpoint": "9", "system_instruction": "1.10", "plan_only": "true"}
    overrides = [f"{k}={v}" for k, v in given.items()]
    for grid in ([], ["-m", "policy=first_and_last,a2sf"]):
        done = run([*grid, *overrides, "--config-dir=mine"], tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"2024_11_05: {'2 cells' if grid else '1 cell'}, " in done.stdout
    shown = run(["--cfg", "job", *overrides, "--config-dir=mine"], tmp_path).stdout
    made = yaml.safe_load(shown)
    assert {k: made[k] for k in ("sweep_name", "system_instruction", "task_args")} == {
        "sweep_name": "2024_11_05",
        "system_instruction": "1.10",
        "task_args": {"word": "a\tb"},
    }


@pytest.mark.full
@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("model/odd.yaml", "path: x/y\nrevision: 1.10\n", "model.revision=1.10 is not allowed: YAML reads it as 1.1"),
        ("sweep/odd.yaml", "# @package _global_\nsweep_name: 2024_11_05\n", "sweep_name=2024_11_05 is not allowed"),
        (
            "sweep/odd.yaml",
            "# @package _global_\nhydra: {sweeper: {params: {model.revision: 1.10}}}\n",
            "model.revision=1.10 is not allowed",
        ),
        ("schema.yaml", "a: 1\n", "schema.yaml has the name of a file that comes with a2sf"),
    ],
)
def test_a_file_that_would_be_read_otherwise_is_refused(tmp_path, file, text, message):
    mine = write_tree(tmp_path)
    (mine / file).write_text(text)
    done = run([*COMMANDS[0], "plan_only=true"], tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert str(mine / file) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["processes", "slurm_local"])
def test_text_reaches_workers_as_it_was_meant(launcher, tmp_path):
    mine = write_tree(tmp_path)
    arguments = ["-m", "policy=full", "tasks=[capitals]", f"include_path={mine}/tasks", f"--config-dir={mine}"]
    texts = ["Be\tbrief.\n", 'Say "é" \\n\\']
    arguments += [f"system_instruction={','.join(map(json.dumps, texts))}", r'gen_kwargs.until=["\n","C:\\"]']
    done = run([*arguments, "sweep_name=1.10", f"hydra/launcher={launcher}"], tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    stored = load_sweep(tmp_path / "runs" / "1.10")
    assert sorted(s.cell["options"]["system_instruction"] for s in stored) == texts
    assert all(s.cell["options"]["gen_kwargs"] == {"until": ["\n", "C:\\"]} for s in stored)
