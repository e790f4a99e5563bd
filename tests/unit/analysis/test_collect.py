"""Cells of different documents are never paired or mixed in silence."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from a2sf.analysis.claims.verdicts import check_shape
from a2sf.analysis.comparisons.fidelity import fidelity_frame
from a2sf.analysis.comparisons.pairs import compare_pair
from a2sf.analysis.comparisons.ranking import rank
from a2sf.analysis.results.gather import gather, grid_of
from a2sf.analysis.results.grid import Grid
from a2sf.analysis.results.selection import Selection
from a2sf.errors import UserError
from a2sf.report.output import TableOptions, show
from a2sf.report.tables.cells import legend
from a2sf.report.tables.layout import build_tables
from a2sf.store.runs import StoredCell, load_sweep, results_frame, write_cell
from tests.sweep_fixture import Plan, write_sweep

pytestmark = pytest.mark.usefixtures("few_flips")

SMALL = Plan(policies=("full", "h2o", "a2sf"), budgets=(0.2,), documents={"piqa": 30, "arc_easy": 20})


def rewrite(stored: StoredCell, directory: Path, finished: str, **documents: str) -> None:
    """The same cell once more, of other documents."""
    result = {k: copy.deepcopy(v) for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
    result["documents"] |= documents
    result["timing"]["finished"] = finished
    tag = "-".join(documents.values())
    result["cell"]["id"] += tag
    write_cell(directory / f"{stored.path.name}__{tag}", result, stored.documents, "policy: x\n")


@pytest.fixture
def old(tmp_path):
    return write_sweep(tmp_path / "s", SMALL)


def test_a_sweeps_newest_documents_are_shown(old, tmp_path):
    new = [c for c in old if c.cell["task"] == "piqa" and c.cell["policy"] != "full"]
    for cell in new:
        rewrite(cell, tmp_path / "s", "2026-02-01T00:00:00+00:00", content="new")
    grid = gather([tmp_path / "s"])
    piqa = grid.frame[grid.frame["task"] == "piqa"]
    assert set(piqa["policy"]) == {"h2o", "a2sf"}
    assert set(piqa["data"]) == {"new"}
    assert set(grid.frame.loc[grid.frame["task"] == "arc_easy", "policy"]) == {"full", "h2o", "a2sf"}
    (note,) = [n for n in grid.notes if "changed" in n]
    assert note.startswith("piqa: 3 cells of documents that have changed since are left out")


def test_documents_of_two_sweeps_are_not_mixed(old, tmp_path):
    for cell in old:
        if cell.cell["policy"] == "h2o":
            rewrite(cell, tmp_path / "other", "2026-02-01T00:00:00+00:00", content="new")
    with pytest.raises(UserError, match=r"differ in data: .*--allow-mixed"):
        gather([tmp_path / "s", tmp_path / "other"], Selection(policies=("full", "a2sf", "h2o")))


def test_examples_of_two_splits_are_not_mixed(old, tmp_path):
    cells = [c for c in old if c.cell["policy"] != "a2sf"]
    for cell in (c for c in old if c.cell["policy"] == "a2sf"):
        rewrite(cell, tmp_path / "other", "2026-02-01T00:00:00+00:00", fewshot_split="dev")
    with pytest.raises(UserError, match="differ in fewshot_split"):
        grid_of([*cells, *load_sweep(tmp_path / "other")])


def swept(cells: list[StoredCell], directory: Path, name: str, settings: dict, documents: dict, **cell: object) -> None:
    """The same answers as those of other documents, or under another setting of a sweep."""
    for stored in cells:
        result = {k: copy.deepcopy(v) for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
        result["documents"] |= documents
        result["cell"] |= {"data": settings} if settings else {}
        result["cell"] |= cell
        if "identity" in cell:
            own = {k: result["cell"][k] for k in ("policy", "budget", "task")}
            result["cell"]["identity"] = own | result["cell"]["identity"]
        result["cell"]["id"] += name
        rows = stored.documents.assign(doc_hash=stored.documents["doc_hash"] + str(documents))
        write_cell(directory / f"{stored.path.name}__{name}", result, rows, "policy: x\n")


MORE = Plan(policies=("full", "window", "h2o", "a2sf"), budgets=(0.2, 0.5), documents={"piqa": 60, "arc_easy": 50})


VARIED = [
    ([({"split": s}, {"split": s, "content": s}) for s in ("test", "validation")], ["split test", "split validation"]),
    ([({"dir": f"/data/{d}"}, {"content": d}) for d in ("clean", "noisy")], ["dir clean", "dir noisy"]),
    ([({"dir": f"/{d}/x"}, {"content": d}) for d in ("clean", "noisy")], ["dir /clean/x", "dir /noisy/x"]),
    ([({}, {"content": "c"}), ({"source": "bundle"}, {"content": "d"})], ["source bundle", "source hub"]),
    ([({}, {"split": s, "content": "commit"}) for s in ("test", "validation")], ["split test", "split validation"]),
    (
        [({"fewshot_split": s}, {"fewshot_split": s, "content": s}) for s in ("a", "b")],
        ["fewshot split a", "fewshot split b"],
    ),
]


def varied(cells: list[StoredCell], directory: Path, several: list) -> Grid:
    for i, (settings, documents) in enumerate(several):
        swept(cells, directory, str(i), settings, documents)
    return gather([directory])


@pytest.mark.parametrize(("several", "labels"), VARIED)
def test_what_documents_a_sweep_varies_is_named(old, tmp_path, several, labels):
    grid = varied(old, tmp_path / "t", several)
    assert not [n for n in grid.notes if "changed" in n]
    assert sorted(grid.frame["variant"].unique()) == labels
    columns = results_frame(load_sweep(tmp_path / "t"))
    assert columns.groupby(["data_settings", "split", "fewshot_split"], dropna=False).ngroups == 2


@pytest.mark.parametrize(
    ("several", "labels"), [VARIED[0], *(pytest.param(*v, marks=pytest.mark.full) for v in VARIED[1:])]
)
def test_what_documents_a_sweep_varies_are_rows_of_their_own(tmp_path, several, labels):
    cells = write_sweep(tmp_path / "one", MORE)
    grid, alone = varied(cells, tmp_path / "s", several), gather([tmp_path / "one"])
    (table,), (single,) = build_tables(grid), build_tables(alone)
    assert len(table.rows) == 2 * len(single.rows)
    for label in labels:
        mine = [r for r in table.rows if r.label.endswith(f"[{label}]")]
        for row, plain in zip(mine, single.rows, strict=True):
            assert row.label == f"{plain.label} [{label}]"
            assert (row.entries, row.to_full, row.to_control) == (plain.entries, plain.to_full, plain.to_control) or (
                # as bold as alone; what is corrected over the table is corrected over twice as many tests
                [e.best for e in row.entries.values()] == [e.best for e in plain.entries.values()]
                and (row.to_full, row.to_control) == (plain.to_full, plain.to_control)
            )
    of_grid, of_one = compare_pair(grid), compare_pair(alone)
    assert [c.difference for c in of_grid[0] if labels[0] in c.first] == [c.difference for c in of_one[0]]
    assert len(of_grid[0]) == 2 * len(of_one[0])
    assert not of_grid[1]
    assert len(fidelity_frame(grid)[0]) == 2 * len(fidelity_frame(alone)[0])
    rankings, notes = rank(grid)
    assert [[r.mean for r in one] for one in rankings] == [[r.mean for r in one] for one in rank(alone)[0]] * 2
    assert not notes
    assert check_shape(grid, {"h2o", "window", "a2sf"})


def test_what_documents_a_sweep_varies_is_drawn(tmp_path):
    cells = write_sweep(tmp_path / "one", MORE)
    for name in ("clean", "noisy"):
        swept(cells, tmp_path / "s", name, {"dir": f"/data/{name}"}, {"content": name})
    shown = show([tmp_path / "s"], Selection(), TableOptions(out=tmp_path / "out", report=False))
    assert any("budget" in f.name for f in shown.files)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([{"seed": 1}, {"seed": 2}], ["seed 1", "seed 2"]),
        ([{"dtype": "bfloat16"}, {"dtype": "float32"}], ["dtype bfloat16", "dtype float32"]),
        ([{"limit": 10}, {"limit": None}], ["limit 10", "limit all"]),
        ([{"identity": {"device": d, "engine": 2}} for d in ("cpu", "cuda")], ["device cpu", "device cuda"]),
    ],
)
def test_whatever_else_a_sweep_varies_is_a_row_of_its_own(old, tmp_path, values, labels):
    for i, cell in enumerate(values):
        swept(old, tmp_path / "t", str(i), {}, {}, **cell)
    grid = gather([tmp_path / "t"])
    assert sorted(grid.frame["variant"].unique()) == labels
    assert len(build_tables(grid)[0].rows) == 2 * len(build_tables(grid_of(old))[0].rows)


def test_two_versions_of_a_policys_code_are_rows_that_are_compared_with_the_others(old, tmp_path):
    """In one sweep; the full cache and other policies have no part in them."""
    for stored in old:
        versions = ("a" * 16, "b" * 16) if stored.cell["policy"] == "a2sf" else ("",)
        for source in versions:
            swept([stored], tmp_path / "t", source, {}, {}, identity={"policy_source": source} if source else {})
    grid = gather([tmp_path / "t"])
    assert set(grid.frame["variant"]) == {""}
    (table,) = build_tables(grid)
    labels = {r.label: r for r in table.rows if r.label.startswith("A2SF")}
    assert sorted(labels) == [f"A2SF (policy source {x * 8})" for x in "ab"]
    assert all(r.to_full is not None and r.to_control is not None for r in labels.values())


def test_cells_of_more_and_of_fewer_documents_share_an_id_and_both_can_be_shown(old, tmp_path):
    for stored in old:
        result = {k: copy.deepcopy(v) for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
        result["cell"]["limit"] = 10
        write_cell(tmp_path / "s" / f"{stored.path.name}__n10", result, stored.documents, "policy: x\n")
    assert set(gather([tmp_path / "s"]).frame["variant"]) == {""}  # those of the largest limit
    both = gather([tmp_path / "s"], Selection(mixed=True))
    assert set(both.frame["variant"]) == {"limit 10", "limit all"}


def test_one_task_that_varies_gives_every_task_its_row(old, tmp_path):
    for split in ("test", "validation"):
        swept([c for c in old if c.cell["task"] == "piqa"], tmp_path / "s", split, {"split": split}, {"split": split})
    swept([c for c in old if c.cell["task"] != "piqa"], tmp_path / "s2", "test", {"split": "test"}, {"split": "test"})
    for cell in load_sweep(tmp_path / "s2"):
        cell.path.rename(tmp_path / "s" / cell.path.name)
    grid = grid_of([c for c in load_sweep(tmp_path / "s") if c.path.name.endswith(("__test", "__validation"))])
    systems = {(s.policy, s.variant): set(s.keys) for s in grid.systems()}
    assert systems["h2o", "split test"] == {"piqa", "arc_easy"}
    assert systems["h2o", "split validation"] == {"piqa"}


def test_versions_that_differ_are_named_under_the_table_and_refused_when_strict(old, tmp_path):
    assert "versions" not in legend(build_tables(grid_of(old))[0])
    for i, stored in enumerate(old):
        result = {k: copy.deepcopy(v) for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
        result["provenance"]["versions"] = {"torch": "2.13.0" if i % 2 else "2.12.1", "transformers": "5.24.0"}
        write_cell(tmp_path / "v" / stored.path.name, result, stored.documents, "policy: x\n")
    (table,) = build_tables(gather([tmp_path / "v"]))
    assert "different versions, which can move numbers: torch 2.12.1 (3 cells), torch 2.13.0 (3 cells)." in legend(
        table
    )
    assert set(results_frame(load_sweep(tmp_path / "v"))["torch"]) == {"2.13.0", "2.12.1"}
    with pytest.raises(UserError, match=r"different versions.*--strict"):
        gather([tmp_path / "v"], Selection(strict=True))
    gather([tmp_path / "s"], Selection(strict=True))
