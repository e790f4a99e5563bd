"""W&B gets what it can take, and nothing it refuses can cost a sweep its end."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from a2sf.experiments.runs import results_frame
from a2sf.experiments.tracking import Tracker, TrackerSpec, one_type_per_column
from tests.sweep_fixture import Plan, write_sweep


@pytest.fixture
def mixed(tmp_path):
    """A sweep over a ratio and a list of ratios: a column of numbers and text."""
    cells = write_sweep(tmp_path / "s", Plan(documents={"piqa": 5}, policies=("full", "h2o")))
    frame = results_frame(cells)
    frame["budget_ratio"] = frame["budget_ratio"].astype(object)
    frame.loc[1, "budget_ratio"] = "0.2/0.3/0.4"
    return frame


def test_every_column_holds_one_type(mixed):
    for _, column in one_type_per_column(mixed).items():
        assert len({type(v) for v in column if v is not None}) <= 1
    assert one_type_per_column(mixed)["value"].map(type).eq(float).all()
    assert "0.2/0.3/0.4" in set(one_type_per_column(mixed)["budget_ratio"])


def test_a_summary_of_mixed_budgets_is_logged(mixed, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(TrackerSpec(kind="wandb"), "a [sweep]: 1/2 é" + "x" * 300, tmp_path / "out")
    tracker.log_summary(mixed, {})
    assert tracker.failed is None
    (table,) = (tmp_path / "out").glob("wandb/offline-run-*/files/media/table/results_*.table.json")
    written = json.loads(table.read_text())
    assert len(written["data"]) == len(mixed)


@pytest.mark.parametrize("broken", [pd.DataFrame({"a": [object(), {1}]}), None])
def test_whatever_cannot_be_logged_is_a_note(broken, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(TrackerSpec(kind="wandb"), "s", tmp_path)
    tracker.log_summary(broken, {"picture": tmp_path / "not there.png"})
    assert "W&B failed" in tracker.note
