"""A group stops when its comparisons are decided, and everything says so."""

from __future__ import annotations

import dataclasses
import json
import shutil

import filelock
import numpy as np
import pytest

from a2sf.analysis.results.gather import grid_of
from a2sf.analysis.results.selection import Selection
from a2sf.errors import ConfigError
from a2sf.hf.loading import ModelSpec
from a2sf.policies.budget import Budget
from a2sf.policies.schedule import Schedule
from a2sf.report.tables.cells import legend
from a2sf.report.tables.layout import build_tables
from a2sf.store.runs import load_sweep, results_frame
from a2sf.sweep.answer_store import FOLDER
from a2sf.sweep.early_stopping import Comparisons, comparisons, order_of
from a2sf.sweep.runner import Runner, _lock_file
from a2sf.sweep.stopping_rule import StoppingRule
from a2sf.tracking.tracker import Tracker, TrackerSpec
from tests.hub.build import write_model
from tests.unit.sweep.test_sweep import cell

PAIR = ("full", "window")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"pair": ["a2sf"]}, "early_stopping.pair"),
        ({"pair": "a2sf"}, "early_stopping.pair"),
        ({"pair": ["h2o", "h2o"]}, "two different"),
        ({"pair": PAIR, "half_width": 0}, "early_stopping.half_width"),
        ({"pair": PAIR, "half_width": "two"}, "early_stopping.half_width"),
        ({"pair": PAIR, "confidence": 1.0}, "early_stopping.confidence"),
    ],
)
def test_what_cannot_be_is_refused(settings, why):
    with pytest.raises(ConfigError, match=why):
        StoppingRule(**settings)


def test_a_pair_that_the_sweep_has_not_is_refused():
    with pytest.raises(ConfigError, match=r"h2oo.*did you mean h2o"):
        StoppingRule(("full", "h2oo")).check(["full", "h2o"])


def test_cells_of_equal_budget_and_schedule_are_compared():
    step, every = None, Schedule("every", every=4)  # as nondefault_schedule has them
    cells = [cell("full")]
    cells += [cell("window", budget=Budget(ratio=r)) for r in (0.1, 0.2)]
    cells += [cell("h2o", budget=Budget(ratio=r), schedule=s) for r in (0.1, 0.2, 0.4) for s in (step, every)]

    def compared(*pair):
        return [(a.budget and a.budget.ratio, b.budget.ratio) for a, b in comparisons(StoppingRule(pair), cells)]

    assert compared("full", "h2o") == [(None, r) for r in (0.1, 0.1, 0.2, 0.2, 0.4, 0.4)]
    assert compared("window", "h2o") == [(0.1, 0.1), (0.2, 0.2)]


def test_every_comparison_must_be_decided():
    current = Comparisons(StoppingRule(PAIR, half_width=20), [1] * 300, [("a", "b"), ("a", "c")])
    rng = np.random.default_rng(0)
    while not current.decided:
        a, b = rng.integers(0, 2, 2)
        current.see({"a": [a], "b": [a], "c": [b]})
    assert current.means[0].half_width < 0.1  # the even one was decided long before
    assert 0.15 < current.means[1].half_width <= 0.2
    assert not Comparisons(StoppingRule(PAIR), [1] * 3, []).decided


def test_the_order_is_one_and_random():
    assert order_of(50) == order_of(50) != list(range(50))
    assert sorted(order_of(50)) == list(range(50))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "s"
    model = ModelSpec(path=str(write_model(tmp_path_factory.mktemp("model"), tokens=1000)), device="cpu")
    rule = StoppingRule(PAIR, half_width=35.0, metric="acc")
    cells = [cell("full"), cell("window", budget=Budget(ratio=0.1)), cell("h2o", budget=Budget(ratio=0.1))]
    cells = [dataclasses.replace(c, model=model, limit=60, stopping_rule=rule) for c in cells]
    runner = Runner(directory, Tracker(TrackerSpec(), "s", directory))
    assert [o.status for o in runner.run(cells)] == ["done"] * 3
    return runner, cells


def test_a_group_stops_and_says_so(stopped):
    runner, _ = stopped
    found = {s.cell["policy"]: s for s in load_sweep(runner.directory)}
    documents = [list(s.documents.doc_id) for s in found.values()]
    n = len(documents[0])
    assert documents == [sorted(order_of(60)[:n])] * 3
    assert 5 < n < 60
    for stored in found.values():
        assert stored.stopped == f"{n} of 60"
        assert stored.metrics["acc"]["n"] == n == stored.result["documents"]["n"]
        (reported,) = stored.result["until"]["comparisons"]
        assert reported["high"] - reported["low"] <= 0.7 + 1e-9
        assert reported["e"] > 0  # evidence for a difference, which tables combine over tasks
        assert stored.result["timing"]["computed_tokens"] > 0
    difference = found["full"].metrics["acc"]["value"] - found["window"].metrics["acc"]["value"]
    assert reported["low"] <= difference <= reported["high"]
    frame = results_frame(found.values())
    assert set(frame.stopped) == {f"{n} of 60"}
    table = build_tables(grid_of(list(found.values()), Selection(mixed=True)), tested=False)[0]
    assert f"copa after {n} of 60 documents" in legend(table)


@pytest.mark.parametrize("key", ["documents", "told"])
def test_cells_that_were_lost_are_of_the_same_documents(stopped, key):
    """Also by a file of an earlier version, which called the documents `told`."""
    runner, cells = stopped
    (file,) = (runner.directory / FOLDER).glob("until-*.json")
    body = json.loads(file.read_text())
    file.write_text(json.dumps({key if k == "documents" else k: v for k, v in body.items()}))
    before = {s.path.name: s.result for s in load_sweep(runner.directory)}
    for lost in (cells[1], cells[2]):
        shutil.rmtree(runner.directory / lost.name)
    assert [o.status for o in runner.run(cells[1:])] == ["done"] * 2
    for stored in load_sweep(runner.directory):
        assert stored.metrics == before[stored.path.name]["metrics"]
        assert stored.result["until"] == before[stored.path.name]["until"]


def test_a_cell_whose_comparison_was_not_decided_does_not_stop_where_others_did(stopped):
    runner, cells = stopped
    later = dataclasses.replace(cells[1], budget=Budget(ratio=0.3))
    assert [o.status for o in runner.run([later])] == ["done"]
    (stored,) = [s for s in load_sweep(runner.directory) if s.path.name == later.name]
    assert stored.stopped is None
    assert stored.result["documents"]["n"] == 60
    assert stored.result["until"]["comparisons"] == []
    shutil.rmtree(stored.path)


def test_another_process_computes_a_group_completely_or_not_at_all(stopped):
    """All its cells decide together when it stops, so that two processes may not divide them."""
    runner, cells = stopped
    others = [dataclasses.replace(c, limit=50) for c in cells]
    with filelock.SoftFileLease(_lock_file(runner.directory, others[1]), lease_duration=60):
        assert [o.status for o in runner.run(others)] == ["busy"] * 3
    assert not any(c.name == s.path.name for c in others for s in load_sweep(runner.directory))


def test_a_run_of_all_documents_is_another_cell_and_starts_from_there(stopped):
    runner, cells = stopped
    unstopped = dataclasses.replace(cells[1], stopping_rule=None, limit=20)
    assert unstopped.tail != cells[1].tail
    assert [o.status for o in runner.run([unstopped])] == ["done"]
    (stored,) = [s for s in load_sweep(runner.directory) if s.cell["limit"] == 20]
    assert list(stored.documents.doc_id) == list(range(20))
    assert stored.stopped is None
    assert 0 < stored.result["timing"]["reused_requests"] < 40
    shutil.rmtree(stored.path)


def test_a_metric_that_documents_have_not_fails_with_those_they_have(stopped, tmp_path):
    _, cells = stopped
    runner = Runner(tmp_path / "t", Tracker(TrackerSpec(), "t", tmp_path / "t"))
    odd = [dataclasses.replace(c, limit=3, stopping_rule=StoppingRule(PAIR, metric="f2")) for c in cells[:2]]
    outcomes = runner.run(odd)
    assert [o.status for o in outcomes] == ["failed"] * 2
    assert "early_stopping.metric" in (outcomes[0].error or "")
    assert "acc" in (outcomes[0].error or "")
    assert json.loads(next((tmp_path / "t" / "failures").iterdir()).read_text())["error"] == outcomes[0].error


def test_cells_that_are_not_compared_get_the_documents_that_decided(stopped, tmp_path):
    """A sequence a pass, so that at the decision they lack answers; also where the decision is read from disk."""
    _, cells = stopped
    directory = tmp_path / "t"
    rule = StoppingRule(PAIR, half_width=70.0, metric="acc")  # decided after a few documents
    group = [dataclasses.replace(c, stopping_rule=rule) for c in cells]
    runner = Runner(directory, Tracker(TrackerSpec(), "t", directory), batch_size=1)
    assert [o.status for o in runner.run(group)] == ["done"] * 3
    before = {s.path.name: s.result["documents"]["n"] for s in load_sweep(directory)}
    assert len(set(before.values())) == 1
    for lost in group:
        shutil.rmtree(directory / lost.name)
    assert (directory / ".checkpoints").exists()
    assert [o.status for o in runner.run(group)] == ["done"] * 3
    assert {s.path.name: s.result["documents"]["n"] for s in load_sweep(directory)} == before
