"""Sizes in tokens: the table of prompts and budgets, and accuracy by the prompt's length."""

from __future__ import annotations

import json

import numpy as np
import pytest

from a2sf.analysis.results.gather import grid_of
from a2sf.analysis.results.labels import DASH
from a2sf.report.lengths import bins_of, length_figure, length_tables, share_tables
from a2sf.report.plots.sweep import draw_all
from a2sf.scoring.counts import quantiles
from a2sf.store.runs import StoredCell
from tests import sweep_fixture
from tests.sweep_fixture import Plan, write_sweep


@pytest.fixture
def cells(tmp_path, monkeypatch) -> list[StoredCell]:
    """Documents of 100 and 1,000 tokens in turn, the longer ones never answered under pruning."""
    made, write = sweep_fixture.documents_of, sweep_fixture.write_cell

    def documents_of(task, n, spread, salt):
        documents = made(task, n, spread, salt)
        long = np.arange(n) % 2 == 1
        documents["context_tokens"] = [[1000, 1002] if x else [100, 99] for x in long]
        documents.loc[long, "metric/acc"] = float(spread == 0)
        return documents

    def write_cell(path, result, documents, config):
        ratio = (result["cell"]["budget"] or {}).get("ratio")
        budget = None if ratio is None else quantiles([ratio * 100, ratio * 1000])
        return write(
            path, result | {"lengths": {"prompt": quantiles([100, 1000]), "budget": budget}}, documents, config
        )

    monkeypatch.setattr(sweep_fixture, "documents_of", documents_of)
    monkeypatch.setattr(sweep_fixture, "write_cell", write_cell)
    return write_sweep(tmp_path / "s", Plan(policies=["full", "h2o", "a2sf"], documents={"piqa": 40}))


def test_the_table_says_how_long_prompts_were_and_what_budgets_came_to(cells):
    (table,) = length_tables(grid_of(cells))
    assert table.frame.to_dict("records") == [
        {
            "Task": "piqa",
            "Documents": "40",
            "Prompt": "551 (100 to 1,002)",
            "Budget 0.2": "110 (20 to 200)",
            "Budget 0.5": "275 (50 to 500)",
        }
    ]
    # an older result says nothing of budgets
    for stored in cells:
        file = stored.path / "result.json"
        result = json.loads(file.read_text())
        assert result.pop("lengths")["prompt"]["median"] == 550
        stored.result.pop("lengths")
    (table,) = length_tables(grid_of(cells))
    assert table.frame.loc[0, "Budget 0.5"] == DASH


def test_the_picture_has_a_panel_per_budget_and_a_point_per_heap_of_lengths(cells, tmp_path):
    grid = grid_of(cells)
    figure = length_figure(grid)
    panels = [a for a in figure.axes if a.get_visible()]
    assert [a.get_title() for a in panels] == ["budget 0.2", "budget 0.5"]
    drawn = {line.get_label(): line for line in panels[0].lines}
    assert list(drawn) == ["Full cache", "H2O", "A2SF (factor 0.1)"]
    for label, line in drawn.items():
        assert line.get_xdata().tolist() == [100, 1002]
        assert line.get_ydata()[1] == (100 if label == "Full cache" else 0)
    assert [f.name for f in draw_all(grid, tmp_path) if f.stem == "length"] == ["length.png", "length.svg"]


def test_nothing_is_drawn_of_prompts_of_one_length(tmp_path):
    grid = grid_of(write_sweep(tmp_path / "s", Plan(policies=["full", "h2o"], budgets=[0.5], documents={"piqa": 20})))
    assert length_figure(grid) is None


def test_bins_are_heaps_of_lengths_or_hold_as_many_documents():
    assert bins_of([1000, 1010, 4070, 4090, 8170]) == [1000, 4070, 8170, 8171]
    assert bins_of([50, 50]) == [50, 51]
    edges = bins_of(list(range(100, 200)))
    assert len(edges) == 6
    assert all(19 <= n <= 21 for n in np.histogram(range(100, 200), edges)[0])


def test_what_a_threshold_cached_is_a_table_of_its_own(tmp_path):
    plan = Plan(policies=["full", "h2o"], documents={"piqa": 8})
    written = write_sweep(tmp_path / "s", plan)
    assert share_tables(grid_of(written)) == []
    one = next(c for c in written if c.cell["policy"] == "h2o")
    one.result["cell"] |= {"policy": "dms", "policy_label": "DMS", "budget": None, "policy_evicts": True}
    one.result["timing"] |= {"kept_tokens_mean": 31.25, "cache_share": 0.25, "cache_share_max": 0.5}
    grid = grid_of([c for c in written if c is one or c.cell["policy"] == "full"])
    (table,) = share_tables(grid)
    assert table.frame.drop(columns="Schedule").to_dict("records") == [
        {"Policy": "DMS", "Task": "piqa", "Tokens": "31.2", "Mean": "25.0", "Largest": "50.0"}
    ]
    # without a budget, and not the full cache
    assert {(s.policy, s.budget, s.is_full) for s in grid.systems()} == {
        ("full", DASH, True),
        ("dms", "own", False),
    }
