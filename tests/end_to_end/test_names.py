"""Models whose paths have the same last part, and names with any character, through the real command."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from a2sf.store.runs import load_sweep
from tests.end_to_end.test_evaluate import evaluate, tables
from tests.hub.build import write_model
from tests.models import write_piqa

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    for seed, run in enumerate(["run-a", "run-b"]):
        write_model(root / run / "final", seed=seed)
    write_piqa(root / "data" / "piqa.jsonl")
    return root


def test_two_checkpoints_with_the_same_last_part_are_two_models(place, tmp_path):
    paths = f"{place}/run-a/final,{place}/run-b/final"
    arguments = [
        "-m",
        f"model.path={paths}",
        "policy=full,h2o",
        "tasks=[piqa]",
        f"data.dir={place}/data",
        "sweep_name=two",
    ]
    done = evaluate(*arguments, runs=tmp_path)
    assert done.returncode == 0, done.stderr
    for model in ("run-a/final", "run-b/final"):
        assert f"{model}, 0-shot" in done.stdout
    frame = pd.read_csv(tmp_path / "two" / "results.csv")
    assert sorted(frame["model"].unique()) == ["run-a/final", "run-b/final"]
    assert frame.groupby("model")["model_path"].nunique().eq(1).all()
    assert frame["weights"].nunique() == 2
    shown = tables(tmp_path / "two", "--no-report")
    assert shown.returncode == 0, shown.stderr
    # each model's H2O is set against its own full cache
    for model, part in frame.groupby("model"):
        full, h2o = (float(part.loc[part["policy"] == p, "value"].iloc[0]) for p in ("full", "h2o"))
        row = re.search(rf"{model}, 0-shot.*?H2O(.*?)\n", shown.stdout, re.DOTALL)
        assert row is not None
        assert float(row[1].split()[-1].replace("\N{MINUS SIGN}", "-")) == pytest.approx(100 * (h2o - full), abs=0.06)
    again = evaluate(*arguments, runs=tmp_path)
    assert "4 cells, 4 done, 0 to run" in again.stdout
    # alone, the first model has its short name, and its cells are known all the same
    alone = evaluate(
        *["-m", f"model.path={place}/run-a/final", "policy=full,h2o", "tasks=[piqa]"],
        *[f"data.dir={place}/data", "sweep_name=two"],
        runs=tmp_path,
    )
    assert "2 cells, 2 done, 0 to run" in alone.stdout


def test_any_name_gives_one_safe_folder_and_a_table(place, tmp_path):
    name = "my-org/step-100: [a] é $x$ " + "long " * 60
    arguments = [
        *[f"model.path={place}/run-a/final", f"model.name={name!r}", "policy=full,h2o", "tasks=[piqa]"],
        *[f"data.dir={place}/data", "sweep_name='a [sweep]: é'", "budget.ratio=0.3,[0.2,0.3,0.4]", "tracker=wandb"],
    ]
    done = evaluate("-m", *arguments, runs=tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert "W&B failed" not in done.stdout
    assert "Traceback" not in done.stderr
    directory = tmp_path / "a [sweep]: é"
    stored = load_sweep(directory)
    assert len(stored) == 3
    assert all(s.path.parent == directory for s in stored)
    assert {s.cell["model"] for s in stored} == {name}
    assert "3 cells, 3 done, 0 to run" in evaluate("-m", *arguments, runs=tmp_path).stdout
    shown = tables(directory)
    assert shown.returncode == 0, shown.stderr
    assert list((directory / "plots").glob("*.png"))
