"""A sweep whose tasks have different metrics: each task is shown by one that it has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from a2sf.analysis.results.gather import gather, gather_metrics
from a2sf.analysis.results.selection import Selection
from a2sf.commands.tables import main
from a2sf.report.output import pictures
from a2sf.report.tables.screen import screen_table
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
