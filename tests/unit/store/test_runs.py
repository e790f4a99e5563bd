"""Run directories: complete or absent, and damage is found."""

from __future__ import annotations

import errno
import json
import os

import pandas as pd
import pytest

from a2sf.analysis.results.gather import grid_of
from a2sf.errors import UserError
from a2sf.store import runs
from tests.sweep_fixture import Plan, write_sweep

DOCUMENTS = pd.DataFrame({"doc_id": [0, 1], "loglikelihoods": [[-1.0, -2.0], [-0.5, -0.25]]})


def result(**cell):
    described = {
        "name": "x",
        "model": "m",
        "policy": "p",
        "policy_settings": {},
        "budget": None,
        "forgetting_factor": None,
        "task": "t",
        "shots": 0,
        "limit": 2,
        "seed": 1,
        "dtype": "float32",
    }
    return {
        "cell": described | cell,
        "metrics": {"acc": {"value": 0.5, "stderr": 0.1, "n": 2, "higher_is_better": True}},
        "documents": {"n": 2, "split": "validation", "task_version": 1, "fingerprint": "f"},
        "timing": {"seconds": 1.0, "tokens_per_second": 9.0},
    }


def test_what_is_written_is_read_back(tmp_path):
    runs.write_cell(tmp_path / "s" / "a", result(), DOCUMENTS, "config: 1\n")
    (stored,) = runs.load_sweep(tmp_path / "s")
    assert stored.metrics["acc"]["value"] == 0.5
    assert [list(x) for x in stored.documents["loglikelihoods"]] == [[-1.0, -2.0], [-0.5, -0.25]]
    frame = runs.results_frame([stored])
    assert list(frame.columns[:10]) == runs.LEADING_COLUMNS
    assert frame.loc[0, "budget_ratio"] == 1.0


def test_a_finished_cell_is_never_overwritten(tmp_path):
    runs.write_cell(tmp_path / "a", result(shots=0), DOCUMENTS, "")
    runs.write_cell(tmp_path / "a", result(shots=5), DOCUMENTS, "")
    assert runs.read_cell(tmp_path / "a").cell["shots"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("where", ["to_parquet", "replace", "write_text"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, where):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = pd.DataFrame if where == "to_parquet" else type(tmp_path)
    monkeypatch.setattr(owner, where, full)
    with pytest.raises(OSError, match="No space left"):
        runs.write_cell(tmp_path / "a", result(), DOCUMENTS, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", [runs.RESULT, runs.DOCUMENTS, runs.CONFIG])
@pytest.mark.parametrize("damage", ["truncated", "gone", "altered"])
def test_damage_is_found(tmp_path, file, damage):
    runs.write_cell(tmp_path / "a", result(), DOCUMENTS, "key: value\n")
    target = tmp_path / "a" / file
    content = target.read_bytes()
    if damage == "gone":
        target.unlink()
    else:
        target.write_bytes(content[: len(content) // 2] if damage == "truncated" else content.replace(b"a", b"b", 1))
    with pytest.raises(runs.CorruptCell):
        runs.read_cell(tmp_path / "a")
    moved = runs.set_aside(tmp_path / "a")
    assert moved.exists()
    assert not runs.is_cell(moved)


def test_the_table_is_replaced_whole(tmp_path, monkeypatch):
    stored = runs.write_cell(tmp_path / "a", result(), DOCUMENTS, "")
    runs.write_table(tmp_path, [stored])
    before = (tmp_path / runs.TABLE).read_text()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "replace", full)
    with pytest.raises(OSError, match="No space"):
        runs.write_table(tmp_path, [stored])
    assert (tmp_path / runs.TABLE).read_text() == before
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]


def test_the_same_cell_of_another_sweep_is_linked(tmp_path):
    runs.write_cell(tmp_path / "one" / "a", result(), DOCUMENTS, "")
    runs.link_cell(tmp_path / "one" / "a", tmp_path / "two" / "a")
    assert runs.read_cell(tmp_path / "two" / "a").result == runs.read_cell(tmp_path / "one" / "a").result


def test_empty_and_missing_directories(tmp_path):
    with pytest.raises(UserError, match="no finished cell"):
        runs.load_sweep(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        runs.load_sweep(tmp_path / "nothing")


def test_results_hold_no_nan(tmp_path):
    body = result()
    body["metrics"]["acc"]["value"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        runs.write_cell(tmp_path / "a", body, DOCUMENTS, "")
    assert json.dumps([p.name for p in tmp_path.iterdir()]) == "[]"


def test_a_sweep_of_budgets_in_tokens_alone_has_a_table(tmp_path):
    tokens = {"budget": {"ratio": None, "tokens": 60, "base": "total"}}
    cells = write_sweep(tmp_path / "s", Plan(policies=("h2o",), budgets=(0.2,), extra=tokens))
    assert set(grid_of(cells).frame["budget"]) == {"60 tokens"}


def test_a_schedule_has_a_column_and_step_by_step_is_none(tmp_path):
    for schedule, column in ((None, ""), ("step", ""), ("every4", "every4")):
        extra = {} if schedule is None else {"schedule": schedule}  # None: a cell of before there were schedules
        cells = write_sweep(tmp_path / str(schedule), Plan(policies=("h2o",), budgets=(0.2,), extra=extra))
        assert set(runs.results_frame(cells)["schedule"]) == {column}


class Killed(BaseException):
    """Stands for SIGKILL: nothing runs after it."""


def test_a_cell_whose_replacing_was_killed_is_recovered(tmp_path, monkeypatch):
    path = tmp_path / "s" / "a"
    runs.write_cell(path, result(), DOCUMENTS, "")
    with monkeypatch.context() as killed:
        killed.setattr(runs.shutil, "rmtree", lambda *_, **__: None)
        killed.setattr(runs.atomic, "rename", lambda *_: (_ for _ in ()).throw(Killed))
        killed.setattr(runs.Path, "exists", lambda _: True)  # so that the error handler does nothing
        with pytest.raises(Killed):
            runs.rewrite_cell(path, result(), DOCUMENTS, "", {})
    assert runs.finished_cells(tmp_path / "s") == []
    runs.recover_cells(tmp_path / "s")
    assert [c.path for c in runs.finished_cells(tmp_path / "s")] == [path]


def test_a_replaced_cell_that_was_not_removed_is_removed_later(tmp_path, monkeypatch):
    path = tmp_path / "s" / "a"
    runs.write_cell(path, result(), DOCUMENTS, "")
    with monkeypatch.context() as killed:
        killed.setattr(runs.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            runs.rewrite_cell(path, result(), DOCUMENTS, "new", {})
    runs.recover_cells(tmp_path / "s")
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["a"]
    assert (path / "config.yaml").read_text() == "new"
