"""The paper's preset to its table: tiny models under the published names, the seven tasks' datasets, all over loopback."""

from __future__ import annotations

import pandas as pd
import pytest

from a2sf.store.runs import load_sweep
from tests.end_to_end.test_evaluate import evaluate
from tests.hub.build import write_model
from tests.hub.paper import paper_documents

PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": ("llama", "safetensors"),
    "huggyllama/llama-7b": ("llama", "safetensors"),
    "facebook/opt-6.7b": ("opt", "bin"),  # as the hub has them
    "facebook/opt-2.7b": ("opt", "bin"),
}
TASKS = ["arc_challenge", "arc_easy", "copa", "mathqa", "openbookqa", "piqa", "winogrande"]


@pytest.fixture
def paper(hub, tmp_path):
    paper_documents(hub.store)
    for seed, (name, (kind, weights)) in enumerate(PUBLISHED.items()):
        folder = write_model(tmp_path / "models" / name, kind, weights=weights, seed=seed)
        hub.store.model(name).commit({f.name: f for f in folder.iterdir()})
    return hub


@pytest.mark.full
def test_the_papers_preset_runs_to_its_table(paper, tmp_path):
    environment = paper.environment(tmp_path / "hf") | {"COLUMNS": "200"}
    # one of seven budgets and two documents a cell; the rest is the preset's
    arguments = ["+sweep=paper", "budget.ratio=0.2", "limit=2", "model.device=cpu", "tracker=none"]
    done = evaluate(*arguments, runs=tmp_path / "runs", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    stored = load_sweep(tmp_path / "runs" / "paper")
    assert len(stored) == 4 * 4 * 7 * 2
    frame = pd.read_csv(tmp_path / "runs" / "paper" / "results.csv")
    assert sorted(frame["task"].unique()) == TASKS
    assert frame.groupby("model")["weights"].nunique().eq(1).all()
    refs = {name: paper.store.model(name).refs["main"] for name in PUBLISHED}
    assert dict(zip(frame["model_path"], frame["weights"], strict=True)) == refs
    assert set(frame["fewshot_split"].dropna()) == {"validation"}
    for shots in (0, 1):
        for model in frame["model"].unique():
            assert f"{model}, {shots}-shot" in done.stdout
    read = {s.cell["model_path"]: s.result["provenance"]["weights_format"] for s in stored}
    assert read == {name: weights for name, (_, weights) in PUBLISHED.items()}
    again = evaluate(*arguments, "plan_only=true", runs=tmp_path / "runs", **environment)
    assert "224 cells, 224 done, 0 to run" in again.stdout
