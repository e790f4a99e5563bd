"""The progress of a sweep: by the work done, not by the number of cells, and also where nobody looks at a terminal."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from a2sf.hf.loading import ModelSpec
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policy
from a2sf.policies.schedule import STEP
from a2sf.scoring.counts import Counts
from a2sf.scoring.systems import Answer, Answers, System
from a2sf.sweep.answer_store import AnswerStore
from a2sf.sweep.cell import Cell
from a2sf.sweep.planning import progress
from a2sf.sweep.planning.estimate import WorkEstimate
from a2sf.sweep.planning.progress import Progress, shown
from a2sf.sweep.reuse import SweepPlan
from a2sf.sweep.runner import failure_file
from a2sf.tasks import spec as tasks


def cell(task: str, ratio: float = 0.5) -> Cell:
    return Cell(
        model_name="m",
        model=ModelSpec(path="owner/name", revision="a" * 40, device="cpu"),
        policy=find_policy("h2o")(),
        budget=Budget(ratio=ratio),
        task=task,
        shots=0,
        limit=4,
        seed=1,
        data=tasks.DataSpec(source="bundle"),
    )


LONG, SHORT = [cell("piqa", 0.2), cell("piqa", 0.4)], [cell("copa")]
GROUPS = [LONG, SHORT]
BY_SECONDS = [WorkEstimate(9000.0, 180.0), WorkEstimate(1000.0, 20.0)]
BY_TOKENS = [WorkEstimate(9000.0), WorkEstimate(1000.0)]


class Sweep:
    """A sweep's folder, a clock, and what this process is at."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        directory.mkdir()
        self.directory, self.now, self.at = directory, time.time(), dict[str, float]()
        monkeypatch.setattr(progress, "is_cell", Path.is_dir)

    def progress(self, estimates: list[WorkEstimate]) -> Progress:
        made = SweepPlan([c for g in GROUPS for c in g], frozenset(), [])
        return Progress(made, GROUPS, estimates, self.directory, self.at.get, lambda: self.now)

    def finish(self, cell: Cell) -> None:
        self.at.pop(cell.name, None)
        (self.directory / cell.name).mkdir()


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    return Sweep(tmp_path / "s", monkeypatch)


def test_at_the_start_the_remaining_time_is_that_of_the_plan(sweep):
    known, unknown = sweep.progress(BY_SECONDS), sweep.progress(BY_TOKENS)
    sweep.now += 30  # the model is loaded
    for p in (known, unknown):
        p.look()
    assert known.left == 200.0
    assert "about 3 min left" in str(known)
    assert unknown.left is None
    assert "left" not in str(unknown)


def test_the_time_left_follows_from_the_work_of_a_group_in_flight(sweep):
    """By the number of cells nothing would be known before the first ends, and three cells would seem equal."""
    p = sweep.progress(BY_TOKENS)
    sweep.now += 90
    sweep.at |= {c.name: 0.5 for c in LONG}
    p.look()
    assert p.share == pytest.approx(0.45)
    assert p.left == pytest.approx(110.0)
    sweep.now += 90
    for c in LONG:
        sweep.finish(c)
    assert p.look() == f"finished {LONG[0].name} and 1 more"
    assert p.cells == 2
    assert p.left == pytest.approx(20.0)


def test_a_cell_that_only_lacks_what_no_estimate_counts_is_not_100_percent(sweep):
    """Such as reading the full cache's texts under each system."""
    p = sweep.progress(BY_TOKENS)
    sweep.now += 90
    sweep.at |= {c.name: 1.0 for c in (*LONG, *SHORT)}
    p.look()
    assert "0 of 3 cells, 99 % of the work" in str(p)
    assert "left" not in str(p)
    for c in (*LONG, *SHORT):
        sweep.finish(c)
    p.look()
    assert "3 of 3 cells, 100 % of the work" in str(p)


def test_a_plan_that_was_wrong_is_corrected_by_what_was_done(sweep):
    p = sweep.progress(BY_SECONDS)
    sweep.now += 180  # three times as slow
    sweep.at |= {c.name: 1 / 3 for c in LONG}
    p.look()
    assert 2.3 * 140 < p.left < 3 * 140


def test_what_other_processes_have_kept_counts(sweep):
    """Under a launcher nothing is underway in the process that shows it."""
    p = sweep.progress(BY_TOKENS)
    answers = answers_of(LONG[0])
    answers.begin(pending=4, requests=4, tokens=1000)
    answers.progress.read += 600
    store = AnswerStore(sweep.directory, "documents", seconds=60)
    store.add(LONG[0], answers, None, [*"abcd"])
    answers.computed = {"a": Answer(-1.0, True, 3, 2)}
    store.save([LONG[0].name])
    sweep.now += 60
    assert p.look() == ""
    assert p.share == pytest.approx(0.6 * 0.45)
    assert p.at() == LONG[0].name
    again = sweep.progress(BY_TOKENS)  # what was done before is no speed of this run
    sweep.now += 60
    again.look()
    assert again.left is None


def test_a_cell_that_fails_is_over(sweep):
    p = sweep.progress(BY_TOKENS)
    file = failure_file(sweep.directory, SHORT[0].name)
    file.parent.mkdir()
    file.write_text(json.dumps({}))
    assert p.look() == f"failed {SHORT[0].name}"
    assert p.cells == 1


def answers_of(cell) -> Answers:
    return Answers(System(cell.policy, cell.budget, STEP), Counts(STEP, 3, [True]))


def test_a_systems_share_is_of_tokens_not_of_requests():
    answers = answers_of(LONG[0])
    assert answers.share == 0.0
    answers.begin(pending=4, requests=4)
    answers.computed = {"long": Answer(-1.0, True, 80, 10)}
    assert answers.share == 0.25  # where tokens are not counted
    answers.computed = {}
    answers.begin(pending=4, requests=4, tokens=100)
    answers.progress.read += 90
    assert answers.share == pytest.approx(0.9)
    answers.known = {"a": Answer(-1.0, True, 3, 2), "b": Answer(-1.0, True, 3, 2)}
    answers.begin(pending=2, requests=4, tokens=100)
    answers.progress.read += 90
    assert answers.share == pytest.approx(0.95)  # half was known before


def test_a_log_gets_a_line_per_finished_cell_and_per_minute(sweep, monkeypatch):
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(progress, "MINUTE", 0.2)
    log = io.StringIO()
    with shown(Console(file=log, width=40), sweep.progress(BY_SECONDS)):
        sweep.at |= {c.name: 0.5 for c in LONG}
        time.sleep(0.5)
        sweep.finish(LONG[0])
        time.sleep(0.1)
        sweep.finish(SHORT[0])
    lines = log.getvalue().splitlines()
    assert any(line.endswith(f"computing {LONG[0].name} and 1 more") for line in lines)
    assert any(line.startswith("1 of 3 cells,") and line.endswith(f"finished {LONG[0].name}") for line in lines)
    assert lines[-1].startswith("2 of 3 cells,")
    assert all("% of the work" in line for line in lines)


def test_a_terminal_gets_a_bar_with_the_time_left(sweep):
    screen = io.StringIO()
    with shown(Console(file=screen, force_terminal=True, width=120), sweep.progress(BY_SECONDS)):
        pass
    assert "0 of 3 cells" in screen.getvalue()
    assert "about 3 min left" in screen.getvalue()
