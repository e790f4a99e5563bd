"""What a number hides is said at the end of a run, under tables and in the report, whoever computed the cell."""

from __future__ import annotations

import pytest

from a2sf.store.runs import load_sweep
from tests.end_to_end.test_evaluate import evaluate, tables
from tests.hub.build import write_model
from tests.models import write_piqa

pytestmark = pytest.mark.full

NOTE = "piqa: in 4 of 4 documents (documents 0, 1, 2, …), the right answer is none of the choices"


@pytest.fixture(params=[[], ["hydra/launcher=processes", "hydra.launcher.n_jobs=1"]], ids=["here", "worker"])
def sweep(request, tmp_path):
    """A sweep of labels that are never among the choices, and what its end said."""
    model, runs = write_model(tmp_path / "model"), tmp_path / "runs"
    data = write_piqa(tmp_path / "data/piqa/validation.jsonl", rows=4, label=-1).parent
    grid = [
        "-m",
        "policy=full,h2o",
        f"model.path={model}",
        "tasks=[piqa]",
        f"data.dir={data}",
        "model.name=tiny",
        *request.param,
    ]
    done = evaluate(*grid, "sweep_name=odd", runs=runs)
    assert done.returncode == 0, done.stderr
    return runs / "odd", done.stdout


def test_labels_that_are_never_among_the_choices(sweep):
    directory, said = sweep
    assert said.count(NOTE) == 1
    assert "(In 2 cells, tiny__" in said
    assert [c.metrics["acc"]["value"] for c in load_sweep(directory)] == [0.0, 0.0]
    shown = tables(directory, "--no-plots")
    assert shown.returncode == 0, shown.stderr
    assert " ".join(shown.stdout.split()).count(NOTE) == 1
    assert NOTE in (directory / "report.html").read_text()
