"""Families of tests, what captions say of them, and systems that are shown to be as good as the full cache."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import false_discovery_control

from a2sf.analysis.comparisons.against import compare_against
from a2sf.analysis.comparisons.pairs import Comparer, compare_pair, comparisons_frame
from a2sf.analysis.comparisons.ranking import rank
from a2sf.analysis.comparisons.stopped import stopped_comparisons
from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.grid import AVERAGE, Grid
from a2sf.analysis.results.selection import Selection
from a2sf.analysis.statistics.equivalence import average_within_margin
from a2sf.analysis.statistics.families import Correction, e_bh
from a2sf.analysis.statistics.paired import holm
from a2sf.commands import tables
from a2sf.errors import ConfigError
from a2sf.report.output import TableOptions, show
from a2sf.report.tables.cells import header, legend
from a2sf.report.tables.layout import build_tables
from a2sf.report.tables.summaries import ranking_tables
from a2sf.report.tables.write import csv_frame, latex, markdown
from a2sf.store.runs import write_cell
from tests.page import embedded
from tests.sweep_fixture import Plan, write_sweep

pytestmark = pytest.mark.usefixtures("few_flips")

MARGIN = 0.12
"""Wide, so that the synthetic sweep, of few documents, has systems within it."""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one of them with 0 and 5 shots: three tables."""
    directory = tmp_path_factory.mktemp("runs") / "s"
    write_sweep(directory, Plan(shots=(0, 5), budgets=(0.2, 0.9)))
    write_sweep(directory, Plan(model="other", seed=3, budgets=(0.2, 0.9)))
    return directory


@pytest.fixture(scope="module")
def grid(sweep: Path) -> Grid:
    return gather([sweep])


@pytest.mark.parametrize("method", ["holm", "fdr"])
@pytest.mark.parametrize(("family", "sizes"), [("table", [6, 6, 6]), ("model", [12, 12, 6]), ("sweep", [18, 18, 18])])
def test_each_family_is_corrected_together(grid: Grid, family: str, sizes: list[int], method: str) -> None:
    correct = {"holm": holm, "fdr": lambda p: false_discovery_control(p).tolist()}[method]
    found, _ = compare_pair(grid, correction=Correction(family, method))
    places = {"table": lambda c: (c.model, c.shots), "model": lambda c: c.model, "sweep": lambda c: 0}[family]
    for place in {places(c) for c in found}:
        mine = [c for c in found if places(c) == place]
        assert [c.adjusted.p for c in mine if c.adjusted] == pytest.approx(correct([c.difference.p for c in mine]))
        assert {c.adjusted.tests for c in mine if c.adjusted} == {len(mine)}
    by_table = {(c.model, c.shots): c.adjusted.tests for c in found if c.adjusted}
    assert sorted(by_table.values()) == sorted(sizes)
    frame = comparisons_frame(found)
    assert set(frame["family"]) == {family}
    assert ("p_holm" in frame, "p_fdr" in frame) == (method == "holm", method == "fdr")


def test_captions_say_which_family_how_many_tests_and_which_method(grid: Grid) -> None:
    """Counted again from the tables: what was tested against the best of its budget."""
    for family, where in (("table", "of this table"), ("model", "of this model"), ("sweep", "of all tables")):
        made = build_tables(grid, correction=Correction(family))
        counts = {id(t): sum(e.test is not None for r in t.rows for e in r.entries.values()) for t in made}
        for t in made:
            together = [x for x in made if family == "sweep" or x is t or (family == "model" and x.model == t.model)]
            # equal values are bold without a test, but are in the family if they are not the first
            assert f"over the {sum(counts[id(x)] for x in together):,} tests {where}" in legend(t)
    (first, *_) = build_tables(grid, correction=Correction("table", "fdr"))
    assert "false discovery rate (Benjamini and Hochberg)" in legend(first)
    assert "exploratory" in legend(first)


def test_a_larger_family_marks_no_more_and_the_false_discovery_rate_no_less(grid: Grid) -> None:
    def tests(correction: Correction) -> tuple[int, float]:
        entries = [e for t in build_tables(grid, correction=correction) for r in t.rows for e in r.entries.values()]
        return sum(e.worse for e in entries), sum(e.test.p for e in entries if e.test)

    marked, p = zip(*(tests(Correction(f)) for f in ("sweep", "model", "table")), strict=True)
    assert list(marked) == sorted(marked)
    assert p[0] > p[1] > p[2]
    more, less = tests(Correction("table", "fdr"))
    assert more >= marked[2]
    assert less < p[2]


def test_a_mark_is_below_the_best_or_above_it_where_lower_is_better(grid: Grid) -> None:
    (first, *_) = build_tables(grid)
    assert any(e.worse for r in first.rows for e in r.entries.values())
    assert "↓" in markdown([first])
    assert r"\rlap{$\downarrow$}" in latex([first])
    (first, *_) = build_tables(replace(grid, frame=grid.frame.assign(higher_is_better=False)))
    assert "↑: significantly above the best" in legend(first)
    worse = [(e.value, r.budget, c) for r in first.rows for c, e in r.entries.items() if e.worse]
    best = {(r.budget, c): e.value for r in first.rows for c, e in r.entries.items() if e.best}
    assert worse
    assert all(value > best[budget, c] for value, budget, c in worse)


def test_every_caption_has_n_and_chance(sweep: Path, tmp_path: Path) -> None:
    shown = show([sweep], Selection(), TableOptions(out=tmp_path, plots=False, report=False, against=("h2o",)))
    for text in [*(legend(t) for t in shown.tables), *(t.legend for t in shown.rankings if "Ranking" in t.title)]:
        assert "270" in text
        assert "chance level 50.0 %" in text


# ---- not worse


def test_within_the_margin_of_the_full_cache(grid: Grid) -> None:
    """The verdict, recomputed: two one-sided tests of the average, Holm over the table, the interval of the difference."""
    (table, *_) = build_tables(grid, margin=MARGIN)
    model, shots, part = grid.by_model()[0]
    assert (model, shots) == (table.model, table.shots)
    systems, comparer = part.systems(), Comparer(part)
    full = systems[0]
    p, expected = [], []
    for system in systems[1:]:
        found = [comparer._values(system.keys[t], full.keys[t]) for t in part.tasks]
        within = average_within_margin([a - b for a, b, _ in found], [t for *_, t in found], MARGIN)
        p.append(within.p_equivalent)
        d = comparer.average(system.keys, full.keys)
        assert d is not None
        expected.append("no" if d.high < -MARGIN or d.low > MARGIN else "not shown")
    expected = ["yes" if q < 0.05 else otherwise for q, otherwise in zip(holm(p), expected, strict=True)]
    assert [r.equivalence.verdict for r in table.rows if r.equivalence] == expected
    assert set(expected) == {"yes", "no", "not shown"}
    assert table.rows[0].equivalence is None  # the full cache itself


def test_the_column_is_the_same_in_every_form(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--margin", "12", "--no-plots", "--out", str(tmp_path), "--interval"]
    tables.main([str(sweep), *arguments])
    head = "Within 12 points"
    written = {name: (tmp_path / "tables" / name).read_text() for name in ("tables.md", "tables.tex")}
    assert all(head in text for text in written.values())
    assert head in (tmp_path / "report.html").read_text()
    assert "Within" in capsys.readouterr().out
    made = build_tables(gather([sweep]), margin=MARGIN)
    for table in made:
        column = header(table).index(head)
        for row in table.rows[1:]:
            assert row.equivalence is not None
            line = next(
                x
                for x in written["tables.md"].split(f"### {table.title}\n")[1].splitlines()
                if x.startswith(f"| {row.label} | {row.budget} |")
            )
            assert line.split(" | ")[column].strip() == row.equivalence.verdict
    frame = pd.read_csv(tmp_path / "tables" / "tables.csv")
    verdicts = [r.equivalence.verdict for t in made for r in t.rows if r.equivalence]
    assert frame["within"].dropna().tolist() == verdicts
    assert (frame["average:low"] < frame["average"]).all()
    assert (frame["average"] < frame["average:high"]).all()
    assert set(frame["average:mark"].dropna()) <= {"best", "worse", "tied"}
    ranking = list(csv.DictReader(io.StringIO((tmp_path / "tables" / "ranking.csv").read_text())))
    assert {r["within"] for r in ranking} <= {"yes", "no", "not shown", ""}
    assert embedded(tmp_path / "report.html", "charts")["corrected"] == "Holm"


def test_a_ranking_names_those_within(grid: Grid) -> None:
    rankings, _ = rank(grid, margin=MARGIN)
    named = ranking_tables(grid, rankings, ("a2sf", "h2o"))
    for ranking, table in zip(rankings, named, strict=True):
        shown = [
            f"{r.label} (factor {r.factor})" if r.factor == "0.1" else r.label for r in ranking if r.verdict == "yes"
        ]
        assert f"Shown to be within 12 points of the full cache: {', '.join(shown) or 'none'}." in table.legend
    assert any(r.verdict == "yes" for ranking in rankings for r in ranking)


def test_a_margin_that_is_none(sweep: Path) -> None:
    with pytest.raises(ConfigError, match=r"--margin=-1\.0 is not allowed: give a number of points above 0"):
        tables.main([str(sweep), "--margin", "-1"])
    assert "Within" not in markdown(build_tables(gather([sweep])))
    no_full = gather([sweep], Selection(policies=("h2o", "a2sf")))
    assert "Within" not in markdown(build_tables(no_full, margin=MARGIN))


def test_comparisons_with_named_policies_are_of_the_model_unless_stated(grid: Grid) -> None:
    found, _ = compare_against(grid, ["h2o"])
    assert {a.adjusted.family for a in found if a.adjusted} == {"model"}
    found, _ = compare_against(grid, ["h2o"], Correction("sweep"))
    assert {a.adjusted.tests for a in found if a.adjusted} == {len(found)}


# ---- early stopping


def test_comparisons_of_stopped_groups_are_shown_together(tmp_path: Path) -> None:
    """Two tasks, one comparison each, as results store them; an e-value of 30 alone is not enough, of two it is."""
    cells = write_sweep(tmp_path / "a", Plan(policies=("full", "h2o"), budgets=(0.5,)))
    for e, expected in ((30.0, [True, True]), (10.0, [False, True])):
        directory = tmp_path / f"s{e:g}"
        for stored in cells:
            task = stored.cell["task"]
            names = [c.path.name for c in cells if c.cell["task"] == task]
            comparison = {"cells": names, "low": 0.01, "high": 0.2, "e": e if task == "piqa" else 50.0}
            result = {k: v for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
            until = {"seen": 120, "of": 120, "comparisons": [comparison]}
            write_cell(directory / stored.path.name, result | {"until": until}, stored.documents, "policy: x\n")
        found, notes = stopped_comparisons(gather([directory]))
        assert not notes
        assert [c.differs for c in sorted(found, key=lambda c: c.task, reverse=True)] == expected
        assert [c.differs for c in found] == e_bh([c.e for c in found])
        assert {(c.first, c.second, c.budget, c.seen) for c in found} == {("Full cache", "H2O", "0.5", 120)}
        shown = show([directory], Selection(), TableOptions(out=tmp_path / f"o{e:g}", plots=False, report=False))
        assert any(f.name == "stopped.csv" for f in shown.files)
        text = (tmp_path / f"o{e:g}" / "tables" / "tables.md").read_text()
        assert "### Early stopping: tiny, 0-shot (points)" in text
        assert "shown among 2 comparisons" in text


def test_average_is_the_column_that_captions_tell(grid: Grid) -> None:
    frame = csv_frame(build_tables(grid, margin=MARGIN))
    assert {f"{AVERAGE}:low", f"{AVERAGE}:p_holm", "to_full:low", "p_not_worse", "within:p_holm"} <= set(frame)
