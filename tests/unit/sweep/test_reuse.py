"""A finished result is a cell's own if its stored identity is; the digits in a directory's name only say where to look."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from a2sf.app.plan import without_effect
from a2sf.errors import UserError
from a2sf.policies.budget import Budget
from a2sf.store.archive import pack, unpack
from a2sf.store.runs import StoredCell, load_sweep, write_cell
from a2sf.sweep import answer_store
from a2sf.sweep.cell import Cell
from a2sf.sweep.config.settings import Settings
from a2sf.sweep.reuse import SweepPlan, find_extendable, plan
from a2sf.sweep.runner import Runner, finish
from a2sf.tracking.tracker import Tracker, TrackerSpec
from tests.interrupted import interrupted
from tests.unit.sweep.test_sweep import cell, run, runner  # noqa: F401 (a fixture)

DIGITS = 8
"""Of names that earlier versions gave."""


def short(one: Cell) -> str:
    """The name of a cell's directory in earlier versions."""
    return one.name.removesuffix(one.id) + one.id[:DIGITS]


def store(path: Path, one: Cell, n: int = 4, **changes: object) -> StoredCell:
    """A finished result of a cell, without computing it; `changes` replace keys of its `cell` entry."""
    about = {**one.describe(), **changes}
    result = {
        "cell": {k: v for k, v in about.items() if k != "identity" or v is not None},
        "metrics": {"acc": {"value": 0.5, "stderr": 0.1, "n": 4, "higher_is_better": True}},
        "documents": {"n": n, "split": "test", "fingerprint": "f", "task_version": 1.0},
        "timing": {"seconds": 1.0, "tokens_per_second": 1.0},
    }
    return write_cell(path, result, pd.DataFrame({"doc_id": range(4), "doc_hash": list("abcd")}), "a: 1\n")


def test_a_name_has_sixteen_digits():
    assert len(cell().name.rpartition("__")[2]) == 16


@pytest.mark.parametrize("sweep", ["s", "another"])
def test_a_result_that_an_earlier_version_named_is_found_and_reused(tmp_path, sweep):
    one = cell("h2o")
    before = store(tmp_path / sweep / short(one), one, id=one.id[:DIGITS], name=short(one))
    made = plan([one], tmp_path / "s")
    assert (made.pending, made.notes) == ([], [])
    (stored,), failures = finish(tmp_path / "s", [one])
    assert (stored.result, failures) == (before.result, [])


@pytest.mark.parametrize("sweep", ["s", "another"])
@pytest.mark.parametrize("named", [short, lambda c: c.name])
def test_another_cells_result_under_the_same_digits_is_neither_reused_nor_overwritten(tmp_path, sweep, named):
    one, other = cell("h2o"), cell("h2o", budget=Budget(ratio=0.3))
    path = tmp_path / sweep / named(one)
    store(path, other)
    made = plan([one], tmp_path / "s")
    assert [c.name for c in made.pending] == [one.name]
    (note,) = made.notes
    assert str(path) in note
    assert "different: budget" in note
    assert finish(tmp_path / "s", [one])[0] == []
    # the new result has room, and the other one is still there
    store(tmp_path / "s" / one.name, one)
    assert plan([one], tmp_path / "s").pending == []
    budgets = [json.loads(f.read_text())["cell"]["budget"]["ratio"] for f in tmp_path.glob("*/*/result.json")]
    assert sorted(budgets) == [0.3, 0.5]


def test_a_result_without_an_identity_is_compared_in_what_it_says(tmp_path):
    one = cell("h2o")
    store(tmp_path / "s" / short(one), one, identity=None)
    assert plan([one], tmp_path / "s").pending == []
    store(tmp_path / "t" / short(one), one, identity=None, policy_settings={"recent_share": 0.25})
    assert len(plan([one], tmp_path / "t").notes) == 1


def test_another_limit_under_the_same_name_is_not_reused(tmp_path):
    one = cell("h2o")
    store(tmp_path / "s" / one.name, dataclasses.replace(one, limit=3))
    made = plan([one], tmp_path / "s")
    assert len(made.pending) == 1
    assert "different: limit" in made.notes[0]


def test_a_worker_takes_no_other_cells_result_for_its_own(runner):  # noqa: F811
    one, other = cell("h2o"), cell("h2o", budget=Budget(ratio=0.3))
    store(runner.directory / short(one), other)
    assert run(runner, one).status == "done"
    store(runner.directory / cell("window").name, other)
    with pytest.raises(UserError, match="holds the result of another cell"):
        run(runner, cell("window"))


def test_only_answers_of_the_same_identity_are_extended(tmp_path):
    one, other = cell("h2o"), cell("h2o", budget=Budget(ratio=0.3))
    more = dataclasses.replace(one, limit=90)
    store(tmp_path / "s" / short(one), other)
    assert find_extendable(tmp_path, [more]) == {}
    store(tmp_path / "t" / short(one), one)
    assert find_extendable(tmp_path, [more])[more.name].path.parent.name == "t"
    for limit in (9, 5):  # the one with most documents
        longer = dataclasses.replace(one, limit=limit)
        store(tmp_path / "u" / longer.name, longer, n=limit)
    assert find_extendable(tmp_path, [more])[more.name].cell["limit"] == 9


def test_a_checkpoint_is_read_for_its_own_cell_alone(runner, monkeypatch):  # noqa: F811
    runner.batch_size = 4
    one, other = cell("h2o"), cell("h2o", budget=Budget(ratio=0.3))
    interrupted(runner, [other], 1, monkeypatch)
    (file,) = (runner.directory / answer_store.FOLDER).glob("*.json")
    body = json.loads(file.read_text())
    assert body["cell"] == json.loads(json.dumps(other.identity))
    file.rename(file.with_name(f"{one.tail}.json"))
    assert run(runner, one).status == "done"
    fresh = Runner(runner.directory.parent / "t" / "t", Tracker(TrackerSpec(), "t", runner.directory.parent / "t"))
    assert run(fresh, one).status == "done"
    a, b = (load_sweep(r.directory)[0].documents["loglikelihoods"].map(list).tolist() for r in (runner, fresh))
    np.testing.assert_allclose(a, b, rtol=1e-6)  # in other batches


def test_a_checkpoint_of_an_earlier_version_is_read_and_removed(runner, monkeypatch):  # noqa: F811
    runner.batch_size = 4
    one = cell("h2o")
    kept = interrupted(runner, [one], 1, monkeypatch)
    (file,) = (runner.directory / answer_store.FOLDER).glob("*.json")
    body = json.loads(file.read_text())
    body["cell"] = one.id[:DIGITS]
    body["checksum"] = answer_store._checksum({k: v for k, v in body.items() if k != "checksum"})
    marked = next(iter(body["answers"]))
    file.unlink()
    file.with_name(f"{one.tail.removesuffix(one.id)}{one.id[:DIGITS]}.json").write_text(json.dumps(body))
    passes: list[int] = []
    from a2sf.scoring.passes import looks

    read = looks.logits_in_parts
    monkeypatch.setattr(looks, "logits_in_parts", lambda *a, **k: (passes.append(1), read(*a, **k))[1])
    assert run(runner, one).status == "done"
    assert marked in kept[one.tail]
    assert len(passes) < 2  # of two passes one was kept
    assert not (runner.directory / answer_store.FOLDER).exists()


def test_an_archive_of_earlier_names_adds_no_cell_twice(tmp_path):
    one, other = cell("h2o"), cell("window")
    for c in (one, other):
        store(tmp_path / "old" / short(c), c, id=c.id[:DIGITS])
    archive = pack(tmp_path / "old")
    store(tmp_path / "s" / one.name, one)
    assert [s.path.name for s in unpack(archive, tmp_path / "s")] == [short(other)]
    store(tmp_path / "t" / short(one), other)
    with pytest.raises(UserError, match="is not the archive's cell of that name"):
        unpack(archive, tmp_path / "t")


def test_a_cell_that_a_killed_process_was_replacing_is_found_again(tmp_path):
    one = cell("h2o")
    path = store(tmp_path / "s" / one.name, one).path
    path.rename(path.with_name(f".{path.name}.1-abcdef01.old"))
    assert plan([one], tmp_path / "s").pending == []


def test_a_key_that_has_no_effect_on_a_finished_cell_is_named(tmp_path):
    one = cell("h2o")
    stored = store(tmp_path / "s" / one.name, one)
    stored.result["provenance"] = {"backend": "numba"}
    asked = dataclasses.replace(one, model_name="My", backend="reference")
    made = SweepPlan([asked], frozenset([asked.name]), [], {asked.name: stored})

    def of(cell: Cell, trace: int) -> Settings:
        return Settings((cell,), TrackerSpec(), None, "s", str(tmp_path), False, trace, 60.0)

    notes = without_effect(made, [of(asked, 2)])
    keys = [note.partition(" has no effect on 1 finished cell (")[0] for note in notes]
    assert keys == ["trace=2", "model.name=My", "backend=reference"]
    assert all(note.endswith("give another runs_dir.") for note in notes)
    same = SweepPlan([one], frozenset([one.name]), [], {one.name: stored})
    assert without_effect(same, [of(one, 0)]) == []
