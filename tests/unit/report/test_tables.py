"""Tables of synthetic sweeps: layout, marks, numbers in every form, and what is said about bad input."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from a2sf.analysis.comparisons.against import against_frame, compare_against
from a2sf.analysis.comparisons.fidelity import MEASURES, changes, fidelity_frame
from a2sf.analysis.comparisons.pairs import Comparer, compare_pair, comparisons_frame, paired_values
from a2sf.analysis.results.chance import chance_levels
from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.grid import AVERAGE, Grid
from a2sf.analysis.results.labels import DASH, MINUS
from a2sf.analysis.results.selection import Selection
from a2sf.analysis.statistics.paired import holm, mcnemar_p, paired_difference
from a2sf.commands.tables import main
from a2sf.errors import UserError
from a2sf.report.output import TableOptions, publish, replace_block, show
from a2sf.report.tables.layout import Table, build_tables
from a2sf.report.tables.screen import Blocks, screen, screen_table
from a2sf.report.tables.write import csv_frame, latex, markdown
from a2sf.store.runs import DOCUMENTS, StoredCell, load_sweep, write_cell
from tests.sweep_fixture import Plan, write_sweep

pytestmark = pytest.mark.usefixtures("few_flips")

SCRIPT = Path(__file__).parents[3] / "scripts" / "tables.py"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "demo"
    write_sweep(directory, Plan(factors=(0.1, 0.9)))
    return directory


def text_of(renderables: list, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def cell(
    cells: list[StoredCell], policy: str, budget: float | None, task: str, factor: float | None = None
) -> StoredCell:
    return next(
        c
        for c in cells
        if (c.cell["policy"], c.cell["task"], c.cell["forgetting_factor"]) == (policy, task, factor)
        and (c.cell["budget"] or {}).get("ratio") == budget
    )


def only(grid: Grid, **kwargs: object) -> Table:
    (table,) = build_tables(grid, **kwargs)  # type: ignore[arg-type]
    return table


def test_rows_and_columns(sweep: Path) -> None:
    table = only(gather([sweep]))
    assert table.columns == ["arc_easy", "piqa", AVERAGE]
    assert [(r.label, r.budget, r.factor) for r in table.rows] == [
        ("Full cache", DASH, DASH),
        *[
            (p, b, f)
            for b in ("0.2", "0.5")
            for p, f in (("Window", DASH), ("H2O", DASH), ("A2SF", "0.1"), ("A2SF", "0.9"))
        ],
    ]


def test_numbers_agree_with_the_results_in_every_form(sweep: Path) -> None:
    """Every cell's value, read from result.json, stands in Markdown, LaTeX, CSV and on the screen to the last digit."""
    tables = build_tables(gather([sweep]))
    forms = {"md": markdown(tables), "tex": latex(tables), "screen": text_of(screen(tables))}
    frame = csv_frame(tables)
    files = list(sweep.glob("*/result.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text())
        c, value = result["cell"], result["metrics"]["acc"]["value"]
        budget = f"{c['budget']['ratio']:g}" if c["budget"] else ""
        factor = "" if c["forgetting_factor"] is None else f"{c['forgetting_factor']:g}"
        row = frame[(frame["label"] == c["policy_label"]) & (frame["budget"] == budget) & (frame["factor"] == factor)]
        assert row[c["task"]].item() == value
        for name, text in forms.items():
            cells = [re.split(r"[|&]|  +", line) for line in text.splitlines()]
            cells = [
                [re.sub(r"\\textbf|\\rlap|\\textsuperscript|\$.*?\$|[{}*↓\\]", "", t).strip() for t in line]
                for line in cells
            ]
            cells = [[t for t in line if t] for line in cells]
            leading = [c["policy_label"], *([v or ("--" if name == "tex" else DASH) for v in (budget, factor)])]
            (found,) = [line for line in cells if line[:3] == leading]
            assert found[3 + tables[0].columns.index(c["task"])] == f"{100 * value:.1f}", name


def test_average_and_differences_by_hand(sweep: Path) -> None:
    cells = load_sweep(sweep)
    table = only(gather([sweep]))

    def mean(policy: str, budget: float | None, factor: float | None = None) -> float:
        return sum(cell(cells, policy, budget, t, factor).metrics["acc"]["value"] for t in ("arc_easy", "piqa")) / 2

    row = next(r for r in table.rows if (r.label, r.budget, r.factor) == ("A2SF", "0.2", "0.1"))
    assert row.entries[AVERAGE].value == pytest.approx(mean("a2sf", 0.2, 0.1))
    assert row.to_full == pytest.approx(mean("a2sf", 0.2, 0.1) - mean("full", None))
    assert row.to_control == pytest.approx(mean("a2sf", 0.2, 0.1) - mean("h2o", 0.2))
    assert table.to_control == f"A2SF {MINUS} H2O"


def test_best_is_best_of_its_budget_and_never_the_full_cache(sweep: Path) -> None:
    table = only(gather([sweep]))
    assert not any(e.best for r in table.rows if r.is_full for e in r.entries.values())
    for column in table.columns:
        for budget in ("0.2", "0.5"):
            peers = [r.entries[column] for r in table.rows if r.budget == budget]
            assert {e.value for e in peers if e.best} == {max(e.value for e in peers)}


def test_marks_are_the_corrected_tests(sweep: Path) -> None:
    """The marks, recomputed: every pruned value against the best of its budget, Holm over the table."""
    grid = gather([sweep])
    table, comparer = only(grid), Comparer(grid)
    systems = grid.systems()
    tested = []
    for column in table.columns:
        for budget in ("0.2", "0.5"):
            peers = [(s, r.entries[column]) for s, r in zip(systems, table.rows, strict=True) if r.budget == budget]
            best = next(s for s, e in peers if e.best)
            for system, entry in peers:
                if system is not best:
                    if column == AVERAGE:
                        p = comparer.average(system.keys, best.keys).p  # type: ignore[union-attr]
                    else:
                        p = comparer.task(system.keys[column], best.keys[column]).p  # type: ignore[union-attr]
                    tested.append((entry, p))
    corrected = holm([p for _, p in tested])
    marks = [
        (e.mark, "tied" if p > 0.05 else "worse") for (e, _), p in zip(tested, corrected, strict=True) if not e.best
    ]
    assert all(marked == expected for marked, expected in marks)
    assert {expected for _, expected in marks} == {"tied", "worse"}


def test_paired_test_recomputed_from_the_documents(sweep: Path) -> None:
    cells = load_sweep(sweep)
    a, b = cell(cells, "a2sf", 0.2, "piqa", 0.1), cell(cells, "h2o", 0.2, "piqa")
    right = [pd.read_parquet(c.path / DOCUMENTS).eval("prediction == gold") for c in (a, b)]
    gained, lost = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    d = paired_difference(*paired_values(a, b, "acc"))
    assert (d.gained, d.lost, d.value) == (gained, lost, pytest.approx((gained - lost) / 150))
    assert d.p == pytest.approx(mcnemar_p(gained, lost))
    comparisons, _ = compare_pair(gather([sweep]))
    frame = comparisons_frame(comparisons)
    mine = frame[(frame.task == "piqa") & (frame.budget == "0.2") & (frame.factor == "0.1")]
    assert mine["p"].item() == d.p
    assert frame["p_holm"].tolist() == holm(frame["p"].tolist())


def test_documents_are_joined_by_identity_not_by_order(sweep: Path) -> None:
    cells = load_sweep(sweep)
    a, b = cell(cells, "a2sf", 0.2, "piqa", 0.1), cell(cells, "h2o", 0.2, "piqa")
    shuffled = StoredCell(b.path, b.result)
    shuffled.__dict__["documents"] = b.documents.sample(frac=1, random_state=0).reset_index(drop=True)
    first, second = (paired_difference(*paired_values(a, other, "acc")) for other in (shuffled, b))
    assert first == second
    other = StoredCell(b.path, b.result)
    other.__dict__["documents"] = b.documents.assign(doc_hash=lambda d: "x" + d["doc_hash"])
    with pytest.raises(UserError, match="not run on the same documents"):
        paired_values(a, other, "acc")


def test_fidelity_by_hand(sweep: Path) -> None:
    cells = load_sweep(sweep)
    a, full = cell(cells, "h2o", 0.5, "piqa"), cell(cells, "full", None, "piqa")
    shift, agree, margin, moved, kl = [], [], [], [], []
    for r, f in zip(a.documents.itertuples(), full.documents.itertuples(), strict=True):
        agree.append(r.prediction == f.prediction)
        shift.append((r.loglikelihoods[r.gold] - f.loglikelihoods[f.gold]) / r.continuation_tokens[r.gold])
        leads = [x.loglikelihoods[x.gold] - x.loglikelihoods[1 - x.gold] for x in (r, f)]
        margin.append(leads[0] - leads[1])
        moved.append(sum(abs(x - y) for x, y in zip(r.loglikelihoods, f.loglikelihoods, strict=True)) / 2)
        p, q = ([math.exp(x) / sum(map(math.exp, d.loglikelihoods)) for x in d.loglikelihoods] for d in (f, r))
        kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    expected = [sum(v) / len(v) for v in (agree, shift, margin, moved, kl)]
    assert changes(a, full)[0].mean().tolist() == pytest.approx(expected)
    frame, notes = fidelity_frame(gather([sweep]))
    row = frame[(frame.policy == "h2o") & (frame.budget == "0.5") & (frame.task == "piqa")].iloc[0]
    assert [row[m] for m in MEASURES] == pytest.approx(expected)
    assert row["gold_shift_low"] < row["gold_shift"] < row["gold_shift_high"]
    assert not notes


def test_against_named_policies(sweep: Path) -> None:
    """By hand for one pair; the same budget only; Holm over all; the named are not compared with each other."""
    grid, cells = gather([sweep]), load_sweep(sweep)
    found, notes = compare_against(grid, ["a2sf", "h2o"])
    assert not notes
    assert {(a.first.policy, a.second.policy) for a in found} == {("window", "a2sf"), ("window", "h2o")}
    assert {a.first.budget == a.second.budget for a in found} == {True}
    assert len(found) == 2 * (2 + 1)  # budgets x (two factors of a2sf, h2o)
    assert [a.adjusted.p for a in found] == holm([a.difference.p for a in found])
    one = next(a for a in found if (a.second.policy, a.first.budget) == ("h2o", "0.5"))
    means = []
    for task in ("arc_easy", "piqa"):
        full = cell(cells, "full", None, task)
        means.append([changes(cell(cells, p, 0.5, task), full)[0]["change"].mean() for p in ("window", "h2o")])
    window, h2o = (sum(column) / 2 for column in zip(*means, strict=True))
    ratio = one.ratios["change"]
    assert ratio.value == pytest.approx(window / h2o)
    assert ratio.low < ratio.value < ratio.high
    frame = against_frame(found)
    assert frame["p_holm"].tolist() == [a.adjusted.p for a in found]
    assert frame.loc[frame["second"] == "H2O", "change_ratio"].iloc[-1] == ratio.value
    with pytest.raises(UserError, match=r"--against h2: there is no pruned result .* \(did you mean h2o\?\)"):
        compare_against(grid, ["h2"])
    shown = show([sweep], Selection(), TableOptions(against=("h2o",), plots=False, report=False))
    assert any("Against named policies" in t.title for t in shown.rankings)


@pytest.mark.parametrize("pivot", ["budget", "factor", "policy"])
def test_pivots_hold_the_same_numbers(sweep: Path, pivot: str) -> None:
    grid = gather([sweep])
    straight, turned = only(grid), build_tables(grid, pivot)
    assert len(turned) == len(straight.columns)
    for table, column in zip(turned, straight.columns, strict=True):
        values = {e.value for r in table.rows for e in r.entries.values()}
        assert values == {r.entries[column].value for r in straight.rows}


def test_filters(sweep: Path) -> None:
    table = only(
        gather([sweep], Selection(policies=("full", "a2sf"), factors=("0.9",), budgets=("0.2",), tasks=("piqa",)))
    )
    assert [(r.label, r.factor) for r in table.rows] == [("Full cache", DASH), ("A2SF", "0.9")]
    assert table.columns == ["piqa"]
    with pytest.raises(UserError, match=r"no result with policy h20.*did you mean h2o"):
        gather([sweep], Selection(policies=("h20",)))


def test_lower_is_better(sweep: Path) -> None:
    grid = gather([sweep])
    table = only(replace(grid, frame=grid.frame.assign(higher_is_better=False)))
    peers = [r.entries["piqa"] for r in table.rows if r.budget == "0.2"]
    assert {e.value for e in peers if e.best} == {min(e.value for e in peers)}


def test_screen_table_of_a_partial_grid(sweep: Path) -> None:
    cells = load_sweep(sweep)
    partial = [c for c in cells if (c.cell["policy"], c.cell["task"]) != ("h2o", "piqa")]
    text = text_of([screen_table(partial)])
    line = next(x for x in text.splitlines() if "H2O" in x and "0.2" in x)
    assert line.count(DASH) >= 3  # factor, piqa and average
    assert text_of([screen_table([])]).strip() == ""
    assert "A2SF" in text_of([screen_table(partial[:1] + partial[-1:])])


def test_refuses_to_mix_without_the_option(sweep: Path, tmp_path: Path) -> None:
    write_sweep(tmp_path / "short", Plan(documents={"arc_easy": 60, "piqa": 70}, extra={"limit": 70}))
    with pytest.raises(UserError, match=r"differ in limit: 70 in short/.*; all in demo/.*--allow-mixed"):
        gather([sweep, tmp_path / "short"])
    table = only(gather([sweep, tmp_path / "short"], Selection(mixed=True)))
    assert {r.label for r in table.rows if r.is_full} == {"Full cache [limit all]", "Full cache [limit 70]"}


@pytest.mark.parametrize("key", ["dtype", "seed"])
def test_refuses_mixed_cells(sweep: Path, tmp_path: Path, key: str) -> None:
    write_sweep(tmp_path / "other", Plan(extra={key: "other"}))
    with pytest.raises(UserError, match=f"differ in {key}"):
        gather([sweep, tmp_path / "other"])


def test_the_same_cell_in_two_sweeps_is_one(sweep: Path, tmp_path: Path) -> None:
    write_sweep(tmp_path / "again", Plan(factors=(0.1, 0.9)))
    assert only(gather([sweep, tmp_path / "again"])) == only(gather([sweep]))


def test_two_cells_for_one_place_are_refused(sweep: Path, tmp_path: Path) -> None:
    write_sweep(tmp_path / "again", Plan(seed=1))
    with pytest.raises(UserError, match="Two cells claim the same place"):
        gather([sweep, tmp_path / "again"])


def test_sweeps_of_different_tasks_leave_gaps(sweep: Path, tmp_path: Path) -> None:
    write_sweep(tmp_path / "more", Plan(documents={"copa": 50}, policies=("full", "h2o")))
    table = only(gather([sweep, tmp_path / "more"]))
    window = next(r for r in table.rows if r.label == "Window")
    assert "copa" not in window.entries
    assert AVERAGE not in window.entries
    assert "copa" in next(r for r in table.rows if r.is_full).entries


def test_a_missing_document_file_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = write_sweep(tmp_path / "s")
    grid = gather([tmp_path / "s"])
    (cell(cells, "h2o", 0.2, "piqa").path / DOCUMENTS).unlink()
    table = only(grid)
    assert any("cannot be read" in note for note in table.notes)
    assert len(table.rows) == 7
    comparisons, notes = compare_pair(grid)
    assert {(c.budget, c.task) for c in comparisons} >= {("0.2", "arc_easy"), ("0.5", "piqa"), ("0.5", AVERAGE)}
    assert any("cannot be read" in note for note in notes)


def test_only_a_results_file(sweep: Path, tmp_path: Path) -> None:
    directory = tmp_path / "csv"
    directory.mkdir()
    (directory / "results.csv").write_text((sweep / "results.csv").read_text())
    shown = show([directory], Selection(), TableOptions(report=True, plots=False))
    assert any("paired tests need the per-document files" in note for note in shown.notes)
    (with_files,) = build_tables(gather([sweep]), tested=False)
    assert [r.entries[AVERAGE].value for r in shown.tables[0].rows] == [
        r.entries[AVERAGE].value for r in with_files.rows
    ]
    assert not any(e.test for r in shown.tables[0].rows for e in r.entries.values())


def test_a_results_file_with_other_numbers_of_documents_shows_no_difference(sweep: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(sweep / "results.csv")
    fewer = (frame["policy"] == "h2o") & (frame["task"] == "piqa")
    frame.loc[fewer, "n"] -= 1
    frame.to_csv(tmp_path / "results.csv", index=False)
    table = only(gather([tmp_path]))
    differences = {(r.label, r.to_full is None, r.to_control is None) for r in table.rows}
    assert ("h2o", True, True) in differences
    assert ("a2sf", False, True) in differences
    assert any(note.startswith("piqa: some documents have no acc") for note in table.notes)


def test_no_policy_to_compare_with(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", Plan(policies=("full", "a2sf")))
    shown = show([tmp_path / "s"], Selection(), TableOptions(report=False, plots=False))
    assert any("no h2o at budget 0.2" in note for note in shown.notes)
    assert shown.tables[0].to_control is None


def test_one_cell(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", Plan(policies=("h2o",), budgets=(0.2,), documents={"piqa": 30}))
    shown = show([tmp_path / "s"], Selection(), TableOptions())
    assert any("one row only" in note for note in shown.notes)
    assert (tmp_path / "s" / "report.html").exists()


def test_metric_that_a_task_lacks(tmp_path: Path, sweep: Path) -> None:
    grid = gather([sweep])
    frame = grid.frame.copy()
    frame["metric"] = ["f1" if t == "piqa" else "acc" for t in frame["task"]]
    (tmp_path / "s").mkdir()
    names = "model policy budget_ratio forgetting_factor shots task metric value stderr n budget_base".split()
    frame[names].to_csv(tmp_path / "s" / "results.csv", index=False)
    found = gather([tmp_path / "s"], Selection(metric="acc"))
    assert found.tasks == ["arc_easy"]
    assert any("piqa has no metric acc (it has f1)" in note for note in found.notes)
    with pytest.raises(UserError, match="No task has the metric accc"):
        gather([sweep], Selection(metric="accc"))


def test_readme_block(sweep: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table:begin -->\nstale\n<!-- table:end -->\nafter\n")
    for _ in range(2):
        publish(gather([sweep]), TableOptions(), None, readme)
    text = readme.read_text()
    assert text.startswith("before\n<!-- table:begin -->\n###")
    assert text.endswith("<!-- table:end -->\nafter\n")
    assert "stale" not in text
    assert text.count("| Policy |") == 1
    readme.write_text("no marks")
    with pytest.raises(UserError, match="table:begin"):
        replace_block(readme, "x")


@pytest.mark.parametrize(("name", "said"), [("missing", "is not a directory"), ("empty", "holds no finished cell")])
def test_missing_or_empty_directory(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=said):
        show([tmp_path / name], Selection(), TableOptions())


def test_script_says_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "holds no finished cell" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_command_writes_the_tables(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(sweep), "--no-plots", "--no-report", "--out", str(tmp_path), "--task", "piqa"])
    assert "A2SF" in capsys.readouterr().out
    names = {f.name for f in (tmp_path / "tables").iterdir()}
    assert names == {"tables.md", "tables.tex", "tables.csv", "ranking.csv", "comparisons.csv", "fidelity.csv"}
    assert (tmp_path / "tables" / "tables.tex").read_text().count(r"\toprule") == 5


def test_a_screen_of_80_columns_has_blocks_with_n_and_chance(tmp_path: Path) -> None:
    documents = {f"{name}_long_name": n for name, n in (("first", 30), ("second", 40), ("third", 50))}
    write_sweep(tmp_path / "s", Plan(documents=documents))
    (table,) = build_tables(gather([tmp_path / "s"]))
    console = Console(file=io.StringIO(), width=80)
    (blocks,) = screen([table])
    console.print(blocks)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    shown = " ".join(lines)
    for name in (*documents, AVERAGE, "Δ full"):  # each in one piece, once
        assert shown.count(name) == 1
    assert shown.count("Full cache") == len(blocks.columns(80)) == 2
    rows = [line.split() for line in lines if line.startswith(("Documents (n)", "Chance level"))]
    assert rows == [
        ["Documents", "(n)", "30", "40"],
        ["Chance", "level", "50.0", "50.0"],
        ["Documents", "(n)", "50", "120"],
        ["Chance", "level", "50.0", "50.0"],
    ]
    (value,) = [r.entries[columns].value for r in table.rows if r.is_full for columns in table.columns[:1]]
    (full,) = [line for line in lines if line.startswith("Full cache")][:1]
    assert full.split()[-2] == f"{100 * value:.1f}"


def test_chance_is_the_mean_over_documents_and_needs_choices(tmp_path: Path) -> None:
    for stored in write_sweep(tmp_path / "a", Plan(documents={"piqa": 4}, budgets=(0.2,))):
        result = {k: v for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
        choices = [["a", "b"], ["a", "b"], ["a", "b", "c", "d"], ["a", "b", "c", "d"]]
        write_cell(tmp_path / "s" / stored.path.name, result, stored.documents.assign(choices=choices), "policy: x\n")
    grid = gather([tmp_path / "s"])
    assert chance_levels(grid) == {"piqa": 0.375}
    assert "| Chance level |  |  | 37.5 |" in markdown(build_tables(grid))
    assert r"Chance level &  &  & 37.5 " in latex(build_tables(grid))
    assert chance_levels(replace(grid, metric="exact_match")) == {}


def test_a_block_has_no_row_that_says_nothing_of_its_columns() -> None:
    rows = [["Documents (n)", "100", ""], ["Full cache", "48.0", "\N{EN DASH}"]]
    table = Blocks("t", ("Policy", "arc_easy", "A2SF minus H2O in points"), 1, rows, "", (0,))
    console = Console(width=28, file=io.StringIO())
    console.print(table)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert (said.count("Documents (n)"), said.count("Full cache")) == (1, 2)


def test_the_title_of_a_narrow_table_is_one_line() -> None:
    console = Console(width=60, file=io.StringIO())
    console.print(Blocks("smollm2-135m, 0-shot, acc (%)", ("Policy", "copa"), 1, [["H2O", "33.3"]], ""))
    assert console.file.getvalue().startswith("smollm2-135m, 0-shot, acc (%)\n")  # type: ignore[attr-defined]


def extended(directory: Path, policies: tuple[str, ...]) -> None:
    """A sweep with limit 80 of the documents, and `policies` once more with limit 40."""
    plan = Plan(policies=("full", "h2o"), budgets=(0.2,), documents={"piqa": 80}, extra={"limit": 80})
    for stored in write_sweep(directory, plan):
        if stored.cell["policy"] in policies:
            body = {k: v for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
            body |= {"cell": stored.cell | {"limit": 40}, "documents": stored.result["documents"] | {"n": 40}}
            body["metrics"] = {k: m | {"n": 40} for k, m in stored.metrics.items()}
            name = stored.path.name + "-n40"
            write_cell(directory / name, body, stored.documents.iloc[:40], "")


def test_of_a_raised_limit_the_largest_is_shown_and_another_can_be_chosen(tmp_path: Path) -> None:
    extended(tmp_path / "grow", ("full", "h2o"))
    grid = gather([tmp_path / "grow"])
    assert set(grid.frame["n"]) == {80}
    assert {r.label for r in only(grid).rows} == {"Full cache", "H2O"}
    assert [n for n in grid.notes if "limit=40" in n] == [
        "piqa: 2 cells with limit=40 are left out, because a larger limit has all their documents; --limit 40 shows them."
    ]
    chosen = gather([tmp_path / "grow"], Selection(limits=("40",)))
    assert set(chosen.frame["n"]) == {40}
    assert not chosen.notes
    with pytest.raises(UserError, match=r"no result with limit 30.*there are: 40, 80"):
        gather([tmp_path / "grow"], Selection(limits=("30",)))


def test_a_smaller_limit_stays_where_the_larger_one_lacks_a_system(tmp_path: Path) -> None:
    extended(tmp_path / "grow", ("h2o",))
    extended(tmp_path / "part", ("full", "h2o"))
    shutil.rmtree(next(p for p in (tmp_path / "part").glob("*full*") if not p.name.endswith("n40")))
    assert set(gather([tmp_path / "grow"]).frame["n"]) == {80}
    grid = gather([tmp_path / "part"])
    assert sorted(grid.frame["n"]) == [40, 40, 80]
    assert any("rows of their own" in n and n.endswith("; --limit chooses.") for n in grid.notes)


def test_a_missing_policy_of_the_pair_is_noted_only_where_the_pair_was_given(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", Plan(policies=("full", "h2o"), budgets=(0.2,), documents={"piqa": 20}))
    quiet = TableOptions(plots=False, report=False)
    missing = "There is no result of the policy a2sf"
    assert not any(missing in note for note in show([tmp_path / "s"], Selection(), quiet).notes)
    assert any(missing in note for note in show([tmp_path / "s"], Selection(), replace(quiet, pair_given=True)).notes)


def test_the_difference_of_the_pair_is_to_the_system_that_its_heading_names(tmp_path: Path) -> None:
    """As in comparisons.csv: of two settings of the second policy at one budget to the first."""
    one = {"documents": {"piqa": 50}, "budgets": (0.2,)}
    write_sweep(tmp_path, Plan(policies=("full", "a2sf"), **one))
    for i, recent in enumerate((0.25, 0.75)):
        settings = {"noise": {"h2o": 1.0 + 20 * i}, "extra": {"policy_settings": {"recent": recent}}, "seed": i}
        for stored in write_sweep(tmp_path / str(i), Plan(policies=("h2o",), **settings, **one)):
            stored.path.rename(tmp_path / f"{stored.path.name}-{i}")
    grid = gather([tmp_path])
    (table,) = build_tables(grid)
    (comparison,), _ = compare_pair(grid)
    assert comparison.second == "H2O (recent 0.25)"
    assert table.to_control == f"A2SF {MINUS} H2O (recent 0.25)"
    (row,) = [r for r in table.rows if r.label == "A2SF"]
    assert row.to_control == pytest.approx(comparison.difference.value)
    values = [r.entries["piqa"].value for r in table.rows if r.label.startswith("H2O")]
    assert len(set(values)) == 2


def test_a_heading_of_several_seeds_names_none_of_them(tmp_path: Path) -> None:
    for seed in (1, 2):
        plan = Plan(documents={"piqa": 20}, budgets=(0.2,), seed=seed, extra={"seed": seed})
        for stored in write_sweep(tmp_path / str(seed), plan):
            (tmp_path / "s").mkdir(exist_ok=True)
            stored.path.rename(tmp_path / "s" / f"{stored.path.name}-{seed}")
    (table,) = build_tables(gather([tmp_path / "s"]))
    assert table.to_control == f"A2SF {MINUS} H2O"
    assert "A2SF [seed 2]" in {r.label for r in table.rows}
