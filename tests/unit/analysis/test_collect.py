"""Cells of different documents are never paired or mixed in silence."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from a2sf.analysis.collect import Selection, gather, grid_of
from a2sf.errors import UserError
from a2sf.experiments.runs import StoredCell, load_sweep, write_cell
from tests.sweep_fixture import Plan, write_sweep

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
