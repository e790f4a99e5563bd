"""Long-context tasks through the real command: ours, and lm-eval's from a hub on loopback."""

from __future__ import annotations

import pytest

from a2sf.store.runs import load_sweep
from tests.end_to_end.test_evaluate import evaluate
from tests.hub.build import write_model
from tests.hub.paper import commit_dataset

pytestmark = pytest.mark.full

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def test_ours_before_and_after_the_question(tiny, tmp_path):
    """One text, two questions: a cut before the question keeps the same of both, and is another result."""
    ask = ["task_args.lengths=[512,700]", "task_args.contexts=1", "limit=4", "budget.base=context"]
    ours = [f"model.path={tiny}", "tasks=[long_single,long_single_generate]", *ask]
    cut = ["policy=full,snapkv", "policy.window=8", "schedule=prompt", "schedule.at=prompt,context"]
    done = evaluate("-m", *ours, *cut, "sweep_name=q", runs=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    cells = {(s.cell["policy"], s.cell["schedule"], s.cell["task"]): s for s in load_sweep(tmp_path / "q")}
    assert len(cells) == 6
    for task in ("long_single", "long_single_generate"):
        aware, agnostic = (cells["snapkv", at, task] for at in ("prompt", "context"))
        assert agnostic.cell["identity"]["schedule"]["at"] == "context"
        assert "schedule" not in aware.cell["identity"]  # snapkv knows no other
        assert agnostic.result["scored"]["pruned"] == agnostic.result["scored"]["tokens"]
        assert aware.result["scored"]["pruned"] < aware.result["scored"]["tokens"]
        prompt, budget = (agnostic.result["lengths"][k] for k in ("prompt", "budget"))
        assert 470 < prompt["min"] < prompt["max"] < 700
        assert budget["max"] < 0.2 * prompt["max"] - 3  # a share of the context without its question
    assert cells["full", "step", "long_single"].result["lengths"]["budget"] is None


def test_lm_evals_from_a_hub(hub, tiny, tmp_path):
    rows = [
        {
            "id": i,
            "context": FILLER * 9 + f"The pass key is {7000 + i}.",
            "input": "What is it?",
            "answer": [f"{7000 + i}"],
        }
        for i in range(3)
    ]
    commit_dataset(
        hub.store, "xinrongzhang2022/InfiniteBench", {None: {"passkey": [r | {"options": []} for r in rows]}}
    )
    facts = [{"input": FILLER * 9 + "Ann went to the hall.", "question": "Where is Ann? ", "target": "hall"}] * 3
    commit_dataset(hub.store, "RMT-team/babilong-1k-samples", {"1k": {"qa1": facts}})
    done = evaluate(
        *(f"model.path={tiny}", "policy=h2o", "tasks=[infinitebench_passkey,babilong_qa1]", "limit=2"),
        *("task_args.max_seq_lengths=1k", "sweep_name=l"),
        runs=tmp_path,
        **hub.environment(tmp_path / "home"),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    cells = {s.cell["task"]: s.result for s in load_sweep(tmp_path / "l")}
    assert {t: r["documents"]["n"] for t, r in cells.items()} == {"infinitebench_passkey": 2, "babilong_qa1": 2}
    assert all(r["lengths"]["prompt"]["min"] > 200 for r in cells.values())
