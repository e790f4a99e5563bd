"""The ranking over budgets, policies that are not causal, and several schedules in one table."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from a2sf.analysis.claims.reproduce import _grid
from a2sf.analysis.comparisons.fidelity import fidelity_frame
from a2sf.analysis.comparisons.pairs import compare_pair, matched
from a2sf.analysis.comparisons.ranking import Ranked, rank
from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.grid import Grid
from a2sf.analysis.results.labels import DASH
from a2sf.analysis.results.selection import Selection
from a2sf.analysis.statistics.paired import average_difference, holm
from a2sf.errors import UserError
from a2sf.report.output import TableOptions, show
from a2sf.report.plots.lines import lines_of
from a2sf.report.tables.cells import legend
from a2sf.report.tables.layout import build_tables
from a2sf.report.tables.screen import text_screen
from a2sf.report.tables.summaries import ranking_tables
from a2sf.report.tables.write import csv_frame, latex, markdown
from a2sf.store.runs import load_sweep, write_table
from tests.sweep_fixture import NOISE, Plan, write_sweep

pytestmark = pytest.mark.usefixtures("few_flips")

PAIR = ("a2sf", "h2o")
POLICIES = ("full", "window", "h2o", "a2sf", "future")
WITH_FUTURE = NOISE | {"future": 0.05}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "ranked"
    write_sweep(directory, Plan(policies=POLICIES, noise=WITH_FUTURE, factors=(0.2, 0.9)))
    return directory


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells of three schedules, and some from before there were any."""
    directory = tmp_path_factory.mktemp("runs") / "scheduled"
    for schedule in (None, "prompt", "every16", "every4"):
        policies = Plan.policies if schedule is None else Plan.policies[1:]  # the full cache has no schedule
        write_sweep(directory, Plan(policies=policies, schedule=schedule, seed=len(schedule or "")))
    write_table(directory, load_sweep(directory))
    return directory


def only(grid: Grid) -> list[Ranked]:
    (ranking,), notes = rank(grid, PAIR)
    assert notes == []
    return ranking


def test_the_ranking_recomputed_from_the_documents(sweep: Path) -> None:
    grid = gather([sweep])
    cells = load_sweep(sweep)
    rows = only(grid)
    values: dict[tuple[str, str], dict[tuple[float, str], np.ndarray]] = {}
    for c in cells:
        factor = DASH if c.cell["forgetting_factor"] is None else f"{c.cell['forgetting_factor']:g}"
        for budget in (0.2, 0.5) if c.cell["budget"] is None else (c.cell["budget"]["ratio"],):
            per_document = c.documents["metric/acc"].to_numpy(float)
            values.setdefault((c.cell["policy"], factor), {})[budget, c.cell["task"]] = per_document
    means = {key: float(np.mean([v.mean() for v in cells_.values()])) for key, cells_ in values.items()}
    for row in rows:
        assert row.mean == pytest.approx(means[row.policy, row.factor])
    fair = sorted((k for k in means if k[0] not in ("full", "future")), key=lambda k: -means[k])
    assert [(r.policy, r.factor) for r in rows] == [*fair, ("future", DASH), ("full", DASH)]
    assert [r.rank for r in rows] == [1, 2, 3, 4, None, None]

    def difference(a: tuple[str, str], b: tuple[str, str]) -> float:
        changes = [
            np.mean([values[a][budget, task] - values[b][budget, task] for budget in (0.2, 0.5)], axis=0)
            for task in ("arc_easy", "piqa")
        ]
        return average_difference(changes).p

    tests = [(k, other) for k in fair for other in (fair[0], ("h2o", DASH)) if k != other]
    expected = dict(zip(tests, holm([difference(*t) for t in tests]), strict=True))
    for row in rows[:4]:
        key = (row.policy, row.factor)
        assert (row.p_best and row.p_best.p) == expected.get((key, fair[0]))
        assert (row.p_control and row.p_control.p) == expected.get((key, ("h2o", DASH)))


def test_a_policy_that_is_not_causal_has_no_rank_no_bold_and_no_test(sweep: Path) -> None:
    grid = gather([sweep])
    future = next(r for r in only(grid) if r.policy == "future")
    assert (future.rank, future.to_best, future.to_control, future.causal) == (None, None, None, False)
    assert future.mean > max(r.mean for r in only(grid) if r.rank == 1)  # and it would have been the best
    (table,) = build_tables(grid)
    marks = [e for r in table.rows if not r.causal for e in r.entries.values()]
    assert marks
    assert not any(e.best or e.test for e in marks)
    for budget in ("0.2", "0.5"):
        assert any(e.best for r in table.rows if r.budget == budget for e in r.entries.values())
        assert [r.label for r in table.rows if r.budget == budget][-1] == "future"
    assert "never bold" in legend(table)
    for form in (markdown([table]), latex([table])):
        (line,) = [x for x in form.splitlines() if "future" in x and "0.2" in x]
        assert "**" not in line
        assert "textbf" not in line
    frame = csv_frame([table])
    assert set(frame.loc[frame["label"] == "future", "average:mark"]) == {""}


def test_every_output_has_the_ranking(sweep: Path, tmp_path: Path) -> None:
    shown = show([sweep], Selection(), TableOptions(out=tmp_path, plots=False))
    (table,) = shown.rankings
    console = Console(file=io.StringIO(), width=200)
    for renderable in text_screen([table]):
        console.print(renderable)
    screen = console.file.getvalue()  # type: ignore[attr-defined]
    texts = [(tmp_path / "tables" / f).read_text() for f in ("tables.md", "tables.tex")]
    for text in (*texts, (tmp_path / "report.html").read_text(), screen):
        assert table.title.partition(" (%)")[0] in text
        assert "oracle (upper bound)" in text
    rows = list(csv.DictReader(io.StringIO((tmp_path / "tables" / "ranking.csv").read_text())))
    assert [r["rank"] for r in rows] == ["1", "2", "3", "4", "", ""]
    assert list(table.frame["Rank"]) == ["1", "2", "3", "4", DASH, DASH]


def test_a_policy_without_a_budget_is_named_and_not_ranked(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", Plan())
    write_sweep(tmp_path / "s", Plan(policies=("streaming",), budgets=(0.2,)))
    (ranking,), notes = rank(gather([tmp_path / "s"]), PAIR)
    assert {r.policy for r in ranking} == {"full", "window", "h2o", "a2sf"}
    assert notes == [
        "tiny, 0-shot: not ranked, because a task or one of the budgets 0.2, 0.5 is missing: StreamingLLM."
    ]


def test_two_policies_are_no_ranking(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", Plan(policies=("full", "h2o", "a2sf")))
    assert rank(gather([tmp_path / "s"]), PAIR) == ([], [])


def test_schedules_are_rows_of_their_own_and_compared_within(scheduled: Path) -> None:
    grid = gather([scheduled])
    (table,) = build_tables(grid)
    assert table.heads == ("label", "budget", "schedule", "factor")
    rows = [(r.label, r.budget, r.schedule) for r in table.rows]
    order = ("step", "every4", "every16", "prompt")
    assert rows == [
        ("Full cache", DASH, DASH),
        *((p, b, s) for b in ("0.2", "0.5") for s in order for p in ("Window", "H2O", "A2SF")),
    ]
    (part,) = [p for _, _, p in grid.by_model()]
    assert all(b is not None and (a.schedule, a.budget) == (b.schedule, b.budget) for a, b in matched(part, PAIR))
    scores = {(r.label, r.budget, r.schedule): r.entries["average"].value for r in table.rows}
    for r in table.rows:
        if r.label == "A2SF":
            assert r.to_control == pytest.approx(
                scores["A2SF", r.budget, r.schedule] - scores["H2O", r.budget, r.schedule]
            )
    comparisons, _ = compare_pair(grid, PAIR)
    assert len({(c.first, c.second, c.budget, c.task) for c in comparisons}) == len(comparisons) == 2 * 4 * 3
    frame, _ = fidelity_frame(grid)
    assert not frame.duplicated(["label", "budget", "factor", "task"]).any()
    lines = {line.label: line for line in lines_of(part)}
    assert len(lines) == 4 * 3
    assert all(len({s.schedule for s in line.systems}) == 1 for line in lines.values())
    rankings, _ = rank(grid, PAIR)
    assert [r[0].schedule for r in rankings] == list(order)
    titles = [t.title for t in ranking_tables(grid, rankings, PAIR)]
    assert titles[3] == "Ranking: tiny, 0-shot, acc (%), schedule prompt"


def test_published_figures_are_compared_with_step_alone(scheduled: Path) -> None:
    grid = _grid([scheduled], [])
    assert grid is not None
    assert set(grid.frame["schedule"]) == {"step", DASH}
    assert len(grid.frame) < len(gather([scheduled]).frame)


def test_one_schedule_is_no_column_and_is_named_unless_it_is_step(scheduled: Path) -> None:
    for schedule, title in (("step", "tiny, 0-shot, acc (%)"), ("prompt", "tiny, 0-shot, acc (%), schedule prompt")):
        (table,) = build_tables(gather([scheduled], Selection(schedules=(schedule,))))
        assert table.heads == ("label", "budget", "factor")
        assert table.title == title
        assert table.rows[0].label == "Full cache"
    with pytest.raises(UserError, match=r"no result with schedule promt \(did you mean prompt\?\)"):
        gather([scheduled], Selection(schedules=("promt",)))


def test_the_same_in_a_csv(scheduled: Path, tmp_path: Path) -> None:
    """`results.csv` alone: with the column, and, from before there were schedules, without."""
    frame = gather([scheduled]).frame
    columns = ["model", "policy", "budget_ratio", "budget_base", "shots", "task", "metric", "value", "n"]
    columns += ["forgetting_factor", "policy_settings"]
    plain = frame[(frame["schedule"] == "step") | frame["is_full"]][columns]
    (tmp_path / "old").mkdir()
    plain.to_csv(tmp_path / "old" / "results.csv", index=False)
    assert set(gather([tmp_path / "old"]).frame["schedule"]) == {"step", DASH}
    (tmp_path / "new").mkdir()
    written = frame[[*columns, "schedule"]].replace({"schedule": {"step": "", DASH: ""}})
    written.to_csv(tmp_path / "new" / "results.csv", index=False)
    assert set(gather([tmp_path / "new"]).frame["schedule"]) == {"step", "every4", "every16", "prompt", DASH}


def test_a_cell_says_that_its_policy_is_not_causal() -> None:
    from a2sf import Budget, make_policy
    from a2sf.hf.loading import ModelSpec
    from a2sf.sweep.cell import Cell
    from a2sf.tasks.spec import DataSpec
    from tests.conftest import SMOLLM2

    model = ModelSpec(path=SMOLLM2, dtype="float32", device="cpu")
    for name, said in (("future", {"policy_causal": False}), ("h2o", {})):
        cell = Cell("m", model, make_policy(name), Budget(ratio=0.2), "copa", 0, 2, 0, DataSpec(source="bundle"))
        assert {k: v for k, v in json.loads(json.dumps(cell.describe())).items() if k == "policy_causal"} == said
