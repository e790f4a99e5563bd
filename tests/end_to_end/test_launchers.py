"""The launchers, really run: worker processes, Slurm's local executor, a local Ray cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from a2sf.hf.loading import ModelSpec, local_checkpoint
from a2sf.store.runs import load_sweep
from tests.end_to_end.test_evaluate import evaluate
from tests.hub.build import SMOLLM2, write_model
from tests.outside import own_folder
from tests.own_tasks import own_tasks

pytestmark = pytest.mark.full

LAUNCHERS = {
    "processes": ["hydra.launcher.n_jobs=2"],
    "slurm_local": [],
    "ray_cluster": ["hydra.launcher.ray.init.num_cpus=2"],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small model whose tokenizer has SmolLM2's chat template."""
    folder = write_model(tmp_path_factory.mktemp("models") / "tiny", tokens=1000)
    template = "chat_template.jinja"
    (folder / template).write_text((Path(local_checkpoint(ModelSpec(SMOLLM2))) / template).read_text())
    return folder


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_under_a_launcher(launcher, tiny, tmp_path):
    own = own_folder(tmp_path / "own")  # whose policy every worker has to find
    tasks = own_tasks(tmp_path / "tasks")
    grid = ["policy=full,mine", "limit=2", "data=bundle", "sweep_name=launched", "chat_template=true"]
    grid += [f"--config-dir={own}", f"include_path={tasks}", "task_args.number=3"]
    if launcher == "processes":  # whose workers read the real model, and take several tasks each
        own_task, grid = "own_group", [*grid, "tasks=[copa,own_group,own_arguments]"]
    else:  # where each task is a process that imports everything
        own_task, grid = "own_one", [*grid, "tasks=[own_one,own_arguments]", f"model.path={tiny}"]
    done = evaluate("-m", *grid, f"hydra/launcher={launcher}", *LAUNCHERS[launcher], runs=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    stored = load_sweep(tmp_path / "launched")
    assert {s.cell["policy"] for s in stored} == {"full", "mine"}
    assert len(stored) == (10 if launcher == "processes" else 4)
    assert {s.cell["options"].get("task_args", {}).get("number") for s in stored} == {None, 3}
    assert all(s.documents["context"].str.contains("<|im_start|>", regex=False).all() for s in stored)
    assert own_task in done.stdout
    # workers side by side do not each take all cores
    assert {s.result["provenance"]["machine"]["threads"] for s in stored} == {1}
    assert (tmp_path / "launched" / "results.csv").exists()


def test_slurm_is_configured_without_slurm(tmp_path):
    """Naming the launcher composes; without Slurm, submitit says so and nothing is lost."""
    done = evaluate(
        "-m", "policy=full", "tasks=[copa]", "data=bundle", "hydra/launcher=slurm", "plan_only=true", runs=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "1 cell, 0 done, 1 to run" in done.stdout
