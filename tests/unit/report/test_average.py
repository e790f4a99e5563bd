"""Averages over tasks in which every document counts the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from a2sf.analysis.comparisons.against import compare_against
from a2sf.analysis.comparisons.fidelity import fidelity_frame
from a2sf.analysis.comparisons.pairs import Comparer, compare_pair
from a2sf.analysis.comparisons.pooled import compare_over_models
from a2sf.analysis.comparisons.ranking import rank
from a2sf.analysis.comparisons.runs import compare_runs
from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.grid import AVERAGE, BY_DOCUMENTS, Grid
from a2sf.analysis.results.selection import Selection
from a2sf.analysis.runs.read import read_runs
from a2sf.analysis.statistics.intervals import of_documents
from a2sf.analysis.statistics.paired import paired_difference
from a2sf.analysis.statistics.texts import TextClusters
from a2sf.commands import tables as tables_command
from a2sf.report.plots.lines import estimated
from a2sf.report.tables.cells import legend
from a2sf.report.tables.layout import build_tables
from tests.sweep_fixture import Plan, write_sweep

pytestmark = pytest.mark.usefixtures("few_flips")

SIZES = {"arc_easy": 40, "piqa": 260}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("average")
    for i, model in enumerate(("one", "two")):
        write_sweep(root / model, Plan(model=model, seed=i, documents=SIZES))
    return [root / "one", root / "two"]


@pytest.fixture
def grid(places: list[Path]) -> Grid:
    return gather(places[:1], Selection(by_documents=True))


def right(grid: Grid, policy: str, budget: str = "0.2") -> np.ndarray:
    """Right or wrong of all documents of a system, task after task."""
    system = next(s for s in grid.systems() if s.policy == policy and (s.is_full or s.budget == budget))
    return np.concatenate([grid.cells[system.keys[t]].documents["metric/acc"] for t in grid.tasks])


def test_the_average_of_a_table_is_over_all_documents(grid: Grid) -> None:
    (table,) = build_tables(grid)
    entry = next(r for r in table.rows if r.label == "H2O" and r.budget == "0.2").entries[AVERAGE]
    values = right(grid, "h2o")
    assert (entry.value, entry.n) == (pytest.approx(values.mean()), 300)
    alone = of_documents(values, TextClusters.independent(300))
    assert entry.stderr == pytest.approx(alone.stderr, rel=0.05)  # of stratified documents
    assert BY_DOCUMENTS in legend(table)
    assert BY_DOCUMENTS not in legend(build_tables(replace(grid, by_documents=False))[0])
    system = next(s for s in grid.systems() if s.policy == "h2o" and s.budget == "0.2")
    assert estimated(system, AVERAGE, grid).value == pytest.approx(values.mean())


def test_differences_are_over_all_documents(grid: Grid) -> None:
    known = paired_difference(right(grid, "a2sf"), right(grid, "h2o"))
    found, _ = compare_pair(grid)
    one = next(c.difference for c in found if c.task == AVERAGE and c.budget == "0.2")
    assert (one.value, one.gained, one.lost) == (pytest.approx(known.value), known.gained, known.lost)
    assert one.p == pytest.approx(known.p, abs=0.005)
    against, _ = compare_against(grid, ["h2o"])
    assert next(
        a.difference.value for a in against if a.first.policy == "a2sf" and a.first.budget == "0.2"
    ) == pytest.approx(known.value)


def test_rankings_closeness_and_margins_count_documents(grid: Grid) -> None:
    (ranking,), _ = rank(grid)
    h2o = next(r for r in ranking if r.policy == "h2o")
    assert h2o.mean == pytest.approx(np.mean([right(grid, "h2o", b).mean() for b in ("0.2", "0.5")]))
    frame, _ = fidelity_frame(grid)
    of = frame[(frame["policy"] == "h2o") & (frame["budget"] == "0.2")].set_index("task")["agreement"]
    assert of[AVERAGE] == pytest.approx(np.average([of[t] for t in SIZES], weights=list(SIZES.values())))
    systems = {s.policy: s for s in grid.systems() if s.is_full or s.budget == "0.5"}
    comparer = Comparer(grid)
    a, b = ([systems[p].keys] for p in ("a2sf", "full"))
    within = comparer.within(a, b, 0.1)
    equal = Comparer(replace(grid, by_documents=False)).within(a, b, 0.1)
    assert within is not None
    assert within.p_equivalent < equal.p_equivalent  # not as uncertain as the small task


def test_finished_runs_and_models_count_documents(places: list[Path], grid: Grid) -> None:
    runs = read_runs(places[0])
    made = compare_runs(runs, by_documents=True)
    assert BY_DOCUMENTS in made.notes
    row = next(r for r in made.rows if r.task == AVERAGE and r.run.startswith("H2O 0.2"))
    assert row.difference.value == pytest.approx((right(grid, "h2o") - right(grid, "full")).mean())
    assert (row.reference, row.value) == (
        pytest.approx(right(grid, "full").mean()),
        pytest.approx(right(grid, "h2o").mean()),
    )
    both = gather(places, Selection(by_documents=True))
    of_pair, _, _ = compare_over_models(both)
    one = next(o for o in of_pair if o.task == AVERAGE and o.budget == "0.2")
    assert one.pooled.value == pytest.approx(np.mean([d.value for d in one.by_model.values()]))
    assert one.by_model["one"].value == pytest.approx((right(grid, "a2sf") - right(grid, "h2o")).mean())


def test_the_option(places: list[Path], tmp_path: Path, capsys) -> None:
    tables_command.main([str(places[0]), "--average", "documents", "--out", str(tmp_path), "--no-plots", "--no-report"])
    assert BY_DOCUMENTS in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        tables_command.main([str(places[0]), "--average", "tokens"])
