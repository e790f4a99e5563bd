"""Groups and lm-eval's options in tables: a column for a whole group, results of other prompts kept apart."""

from __future__ import annotations

import pandas as pd
import pytest

from a2sf.analysis.results.gather import gather, grid_of
from a2sf.analysis.results.selection import Selection
from a2sf.report.output import TableOptions, show
from a2sf.report.tables.cells import header
from a2sf.report.tables.layout import build_tables
from a2sf.report.tables.screen import screen, screen_table
from a2sf.store.aggregates import Average, Member, TaskGroup
from a2sf.store.archive import pack, unpack
from a2sf.store.runs import read_groups, write_groups, write_table
from tests.sweep_fixture import Plan, write_sweep

pytestmark = pytest.mark.usefixtures("few_flips")

BOTH = (Member("arc_easy", 0), Member("piqa", 0))
GROUPS = [
    TaskGroup("easy", (Average("acc", None, True),), BOTH),
    TaskGroup("even", (Average("acc", ("none",), False),), BOTH),
    TaskGroup("more", (Average("acc", None, True),), (*BOTH, Member("copa", 0))),
    TaskGroup("other", (Average("acc", None, True),), (Member("arc_easy", 0, "another definition"), Member("piqa", 0))),
]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "grouped"
    cells = write_sweep(directory, Plan())
    write_groups(directory, GROUPS)
    write_table(directory, cells)
    return directory, cells


def test_a_group_is_a_column_before_its_tasks(sweep):
    directory, cells = sweep
    grid = gather([directory])
    (table,) = build_tables(grid)
    assert table.columns == ["easy", "even", "arc_easy", "piqa", "average"]
    for row in table.rows:
        a, p = row.entries["arc_easy"], row.entries["piqa"]
        assert row.entries["easy"].value == pytest.approx((120 * a.value + 150 * p.value) / 270)
        assert row.entries["even"].value == pytest.approx((a.value + p.value) / 2)
        assert row.entries["easy"].n == 270
    marked = [r.entries["easy"] for r in table.rows if not r.is_full]
    assert sum(e.best for e in marked) >= 2  # one per budget
    assert all(e.best or e.test is not None for e in marked)  # tested over the documents of all tasks
    assert grid.notes == (
        "The group more has no score in rows that lack some of its 3 tasks; missing are copa.",
        "The group other has no score in rows that lack some of its 2 tasks; missing are arc_easy.",
    )
    assert screen_table(cells, GROUPS).renderables[-1].startswith("The group other")


def test_a_screen_shows_a_large_group_without_its_tasks(sweep, monkeypatch):
    (table,) = build_tables(gather([sweep[0]]), tested=False)
    (wide,) = screen([table])
    monkeypatch.setattr("a2sf.report.tables.screen.SCREEN_COLUMNS", 4)
    (narrow,) = screen([table])
    assert [len(t.heads) for t in (wide, narrow)] == [len(header(table)), len(header(table)) - 2]
    assert "2 tasks of these groups are only in the files." in narrow.legend


def test_they_are_in_every_file_and_in_an_archive(sweep, tmp_path):
    directory, _ = sweep
    kept = pd.read_csv(directory / "results.csv")
    assert set(kept.loc[kept["members"].notna(), "task"]) == {"easy", "even"}
    archive = pack(directory, tmp_path / "grouped.a2sf.zip")
    for source in (directory, archive):
        shown = show([source], Selection(), TableOptions(out=tmp_path / "out", plots=False))
        assert shown.tables[0].columns[0] == "easy"
        files = [f for f in shown.files if f.name in ("tables.md", "tables.tex", "tables.csv", "report.html")]
        assert len(files) == 4
        assert all("even" in f.read_text() for f in files)
    unpack(archive, tmp_path / "back")
    assert read_groups(tmp_path / "back") == GROUPS
    for csv_only in (tmp_path / "csv",):
        csv_only.mkdir()
        (csv_only / "results.csv").write_text((directory / "results.csv").read_text())
        assert build_tables(gather([csv_only]))[0].columns == ["arc_easy", "piqa", "average"]


def test_a_group_is_chosen_by_its_name(sweep):
    grid = gather([sweep[0]], Selection(tasks=("easy",)))
    assert grid.tasks == ["arc_easy", "piqa"]
    assert gather([sweep[0]], Selection(tasks=("piqa",))).scores.empty


def test_other_prompts_are_another_table(tmp_path):
    plain = write_sweep(tmp_path / "s", Plan(policies=("full", "h2o")))
    options = {"options": {"chat_template": True, "system_instruction": "Be brief. " * 9}}
    chat = write_sweep(tmp_path / "t", Plan(policies=("full", "h2o"), extra=options, seed=1))
    (alone,) = build_tables(grid_of(chat))
    assert alone.model == "tiny"  # nothing varies
    first, second = build_tables(gather([tmp_path / "s", tmp_path / "t"]))
    assert first.model == "tiny"
    assert second.model.startswith("tiny, chat_template, system_instruction Be brief. Be brief.")
    assert len(second.model) < 110
    for table, expected in ((first, build_tables(grid_of(plain))[0]), (second, alone)):
        assert [r.to_full for r in table.rows] == [r.to_full for r in expected.rows]


def test_two_definitions_of_one_name_are_not_mixed(tmp_path):
    theirs = write_sweep(tmp_path / "s", Plan(policies=("full",)))
    mine = write_sweep(tmp_path / "t", Plan(policies=("h2o",), extra={"identity": {"definition": "0123"}}))
    with pytest.raises(ValueError, match="differ in definition"):
        grid_of([*theirs, *mine])
