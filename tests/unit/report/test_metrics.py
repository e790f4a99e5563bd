"""A sweep whose tasks have different metrics: each task is shown by one that it has."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from a2sf.analysis.comparisons.pairs import compare_pair
from a2sf.analysis.comparisons.runs import compare_runs
from a2sf.analysis.results.gather import gather, gather_metrics
from a2sf.analysis.results.grid import Grid
from a2sf.analysis.results.labels import MINUS
from a2sf.analysis.results.selection import Selection
from a2sf.analysis.runs.read import read_runs
from a2sf.commands.tables import main
from a2sf.errors import UserError
from a2sf.report.lengths import length_points
from a2sf.report.output import pictures
from a2sf.report.tables.layout import build_tables
from a2sf.report.tables.screen import screen_table
from a2sf.report.tables.write import markdown
from a2sf.store.runs import DOCUMENTS, load_sweep, write_cell
from tests.sweep_fixture import Plan, write_sweep
from tests.unit.report.test_tables import text_of

pytestmark = pytest.mark.usefixtures("few_flips")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """arc_easy with `acc` and `acc_norm`, sums with `exact_match` alone."""
    directory = tmp_path_factory.mktemp("runs") / "two"
    for stored in write_sweep(directory, Plan(documents={"arc_easy": 60, "sums": 50}, shots=(0, 2))):
        if stored.cell["task"] == "sums":
            metrics = {"exact_match": stored.metrics["acc"]}
            documents = pd.read_parquet(stored.path / DOCUMENTS).drop(columns="metric/acc_norm")
            documents = documents.rename(columns={"metric/acc": "metric/exact_match"})
            shutil.rmtree(stored.path)
            write_cell(stored.path, stored.result | {"metrics": metrics}, documents, "")
    return directory


def test_each_task_is_in_one_grid(sweep: Path) -> None:
    first, second = gather_metrics([sweep])
    assert (first.metric, first.tasks, second.metric, second.tasks) == ("acc", ["arc_easy"], "exact_match", ["sums"])
    assert first.notes == second.notes == ()
    assert len(first.frame) == len(second.frame) == len(load_sweep(sweep)) / 2


def test_filters_are_of_all_metrics(sweep: Path) -> None:
    (only,) = gather_metrics([sweep], Selection(tasks=("sums",), shots=(2,)))
    assert only.metric == "exact_match"


def test_a_metric_that_the_user_chose_is_the_only_one(sweep: Path) -> None:
    (only,) = gather_metrics([sweep], Selection(metric="acc"))
    assert only.notes == ("The task sums has no metric acc (it has exact_match), so it is left out.",)
    assert gather([sweep], Selection(metric="exact_match")).tasks == ["sums"]


def test_tables_of_both_metrics_are_written(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(sweep), "--out", str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "tiny, 0-shot, acc (%)" in printed
    assert "tiny, 2-shot, exact_match (%)" in printed
    assert "Shown by other metrics, in tables and a report of their own: sums (exact_match, report-exact" in printed
    for folder, task in (("", "arc_easy"), ("exact_match", "sums")):
        frame = pd.read_csv(tmp_path / "tables" / folder / "tables.csv")
        assert {"arc_easy", "sums"} & set(frame) == {task}
        assert (tmp_path / "plots" / folder / "budget-tiny-0shot.png").is_file()
    page, other = (tmp_path / name for name in ("report.html", "report-exact_match.html"))
    assert "report-exact_match.html" in page.read_text()
    assert "report-exact_match.html" not in other.read_text()


def test_the_screen_and_the_trackers_show_both(sweep: Path) -> None:
    text = text_of([screen_table(load_sweep(sweep))])
    assert "arc_easy" in text
    assert "sums" in text
    assert {"budget-tiny-0shot", "exact_match-budget-tiny-0shot"} <= set(pictures(sweep))


def changed(directory: Path, task: str, metrics: dict[str, dict[str, object]], score: object = None) -> None:
    """Cells of a task with `acc` under other names: entries of each metric; `score` makes its value of the documents'."""
    for stored in load_sweep(directory):
        if stored.cell["task"] == task:
            documents = pd.read_parquet(stored.path / DOCUMENTS)
            for name, more in metrics.items():
                documents[f"metric/{name}"] = documents["metric/acc"]
                more = {"value": score(documents["metric/acc"])} | more if callable(score) else more
                stored.metrics[name] = stored.metrics["acc"] | more
            shutil.rmtree(stored.path)
            write_cell(stored.path, stored.result, documents, "")


def best_of(grid: Grid) -> tuple[float, set[float]]:
    """The best pruned value of the first budget, and the values that have the mark."""
    (table,) = build_tables(grid, tested=False)
    entries = [r.entries[grid.tasks[0]] for r in table.rows if r.budget == "0.2"]
    return max(e.value for e in entries), {e.value for e in entries if e.best}


def test_a_metric_of_which_nothing_says_that_higher_is_better(tmp_path: Path) -> None:
    """As lm-eval stores those of a task's own code without `higher_is_better`."""
    write_sweep(tmp_path, Plan(documents={"sums": 50}))
    changed(tmp_path, "sums", {"points": {"higher_is_better": None}, "my_loss": {"higher_is_better": None}})
    grid = gather([tmp_path], Selection(metric="points"))
    most, marked = best_of(grid)
    assert marked == {most}
    assert grid.notes == (
        "sums: nothing says whether a higher or a lower points is better; higher is taken as better (higher_is_better in "
        "the metric_list of the task's file says it).",
    )
    other = gather([tmp_path], Selection(metric="my_loss"))
    assert not other.higher_is_better
    assert "lower is taken as better" in other.notes[0]
    assert gather([tmp_path], Selection(metric="acc")).notes == ()


def test_tasks_in_which_a_lower_value_is_better_have_tables_of_their_own(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", Plan(documents={"errors": 50, "sums": 40, "words": 30}))
    for task, higher in (("errors", False), ("sums", True), ("words", True)):
        changed(tmp_path / "s", task, {"points": {"higher_is_better": higher}})
    grids = list(gather_metrics([tmp_path / "s"], Selection(metric="points")))
    assert [(g.tasks, g.higher_is_better) for g in grids] == [(["errors"], False), (["sums", "words"], True)]
    assert grids[0].notes == (
        "sums, words: a higher points is better, other than in errors, so it has tables of its own.",
    )
    main([str(tmp_path / "s"), "--metric", "points", "--out", str(tmp_path / "o")])
    frames = [pd.read_csv(tmp_path / "o/tables" / folder / "tables.csv") for folder in ("", "points")]
    assert ["errors" in f for f in frames] == [True, False]
    assert ["sums" in f for f in frames] == [False, True]


def test_shares_and_other_numbers_have_tables_of_their_own(tmp_path: Path) -> None:
    """As `f1` of lm-eval's tasks, which is from 0 to 1 in some and from 0 to 100 in others."""
    write_sweep(tmp_path, Plan(documents={"boolq": 50, "squad": 40, "words": 30}))
    for task, scale in (("boolq", 1), ("squad", 100), ("words", 1)):
        changed(tmp_path, task, {"f1": {"higher_is_better": True}}, lambda x, scale=scale: scale * float(x.mean()))
    first, second = gather_metrics([tmp_path], Selection(metric="f1"))
    assert [(g.tasks, g.percent) for g in (first, second)] == [(["boolq", "words"], True), (["squad"], False)]
    assert first.notes == (
        "squad: f1 is more than 1 in some documents or results, other than in boolq, words, so it has tables of its own.",
    )
    screen = text_of([screen_table(load_sweep(tmp_path))])
    assert "acc (%)" in screen
    assert len(list(gather_metrics([tmp_path]))) == 1  # of acc, which all have


def test_a_mean_below_1_of_numbers_up_to_100_is_no_share(tmp_path: Path) -> None:
    write_sweep(tmp_path, Plan(documents={"boolq": 50, "squad": 40}))
    for stored in load_sweep(tmp_path):
        documents = pd.read_parquet(stored.path / DOCUMENTS)
        documents["metric/f1"] = documents["metric/acc"]
        if stored.cell["task"] == "squad":
            documents["metric/f1"] = np.where(documents.index == 0, 30.0, 0.0)
        values = documents["metric/f1"]
        entry = {"value": float(values.mean()), "stderr": float(values.sem())}
        result = stored.result | {"metrics": {"f1": stored.metrics["acc"] | entry}}
        shutil.rmtree(stored.path)
        write_cell(stored.path, result, documents, "")
    first, second = gather_metrics([tmp_path], Selection(metric="f1"))
    assert [(g.tasks, g.percent) for g in (first, second)] == [(["boolq"], True), (["squad"], False)]
    (table,) = build_tables(second)
    assert {r.entries["squad"].value for r in table.rows} == {0.75}
    assert "| 0.75 |" in markdown([table])


def test_no_difference_where_a_metric_is_of_other_documents_in_each_system(tmp_path: Path) -> None:
    """As a task's own code gives it that leaves out documents by the model's answer."""
    write_sweep(tmp_path, Plan(documents={"sums": 40}, budgets=(0.2,)))
    for stored in load_sweep(tmp_path):
        documents = pd.read_parquet(stored.path / DOCUMENTS)
        for name, without in (("same", [0, 1]), ("other", {"full": [0, 1], "h2o": [0, 2], "a2sf": [3, 4]})):
            of = without if isinstance(without, list) else without.get(stored.cell["policy"], [5])
            documents[f"metric/{name}"] = documents["metric/acc"].mask(documents.index.isin(of))
            values = documents[f"metric/{name}"].dropna()
            entry = {"value": float(values.mean()), "stderr": float(values.sem()), "n": len(values)}
            stored.metrics[name] = stored.metrics["acc"] | entry
        shutil.rmtree(stored.path)
        write_cell(stored.path, stored.result, documents, "")
    for tested in (True, False):
        (table,) = build_tables(gather([tmp_path], Selection(metric="other")), tested=tested)
        assert (table.to_full, table.to_control) == (None, None)
        said = "sums: some documents have no other, and not the same ones under each system, so no difference is shown."
        assert said in table.notes
        (table,) = build_tables(gather([tmp_path], Selection(metric="same")), tested=tested)
        assert (table.to_full, table.to_control) == ("Δ full", f"A2SF {MINUS} H2O")


def test_documents_of_a_score_that_is_not_their_mean_are_not_paired(tmp_path: Path) -> None:
    """A perplexity's documents have log-likelihoods: their differences are not its own."""
    write_sweep(tmp_path / "s", Plan(documents={"sums": 50}))
    changed(tmp_path / "s", "sums", {"perplexity": {"higher_is_better": False}}, lambda x: math.exp(-x.mean()))
    grid = gather([tmp_path / "s"], Selection(metric="perplexity"))
    (table,) = build_tables(grid, margin=0.01)
    assert all(r.equivalence is None for r in table.rows)
    comparisons, notes = compare_pair(grid)
    assert comparisons == []
    assert notes == ["perplexity of sums is not the mean of a number for each document, so it cannot be paired."]
    assert [*map(len, length_points(grid, grid.systems()))] == [0] * len(grid.systems())
    with pytest.raises(UserError, match="sums has no metric perplexity for each document; it has acc, acc_norm"):
        compare_runs(read_runs(tmp_path / "s"), metric="perplexity")
