"""Sweeps: what fails is recorded and tried again, what cannot be kept is not computed, and nobody waits for the dead."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pandas as pd
import pytest
import torch

from a2sf.engine.trace import load
from a2sf.errors import UserError
from a2sf.hf import memory
from a2sf.hf.loading import ModelSpec, fingerprint
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policies
from a2sf.report.page.page import read_failures
from a2sf.scoring.passes import looks
from a2sf.scoring.passes import run as scoring
from a2sf.store.runs import is_cell, load_sweep, tail_of
from a2sf.sweep import group
from a2sf.sweep import runner as sweep
from a2sf.sweep.cell import Cell
from a2sf.sweep.planning.estimate import estimate
from a2sf.sweep.reuse import plan
from a2sf.sweep.runner import DiskError, Runner, finish
from a2sf.tasks import spec as tasks
from a2sf.tracking.tracker import Tracker, TrackerSpec
from tests.conftest import SMOLLM2
from tests.interrupted import interrupted

HUB = tasks.DataSpec(content="c0ffee")


def cell(policy: str = "full", **more: object) -> Cell:
    made = find_policies()[policy]()
    given = {
        "model_name": "smollm2-135m",
        "model": ModelSpec(path=SMOLLM2, device="cpu"),
        "policy": made,
        "budget": Budget(ratio=0.5) if made.uses_budget else None,
        "task": "copa",
        "shots": 0,
        "limit": 4,
        "seed": 1,
        "data": tasks.DataSpec(source="bundle"),
    }
    return Cell(**{**given, **more})  # type: ignore[arg-type]


def run(runner: Runner, cell: Cell) -> sweep.Outcome:
    """A group of one."""
    (outcome,) = runner.run([cell])
    return outcome


@pytest.fixture
def runner(tmp_path, little, monkeypatch):
    monkeypatch.setattr(sweep.loading, "load", lambda spec: little)
    return Runner(tmp_path / "s", Tracker(TrackerSpec(), "s", tmp_path / "s"))


def test_a_cell_that_raises_on_its_third_document_is_recorded_and_retried(runner, monkeypatch):
    good = tasks.TaskSpec.build

    def broken(*arguments, **settings):
        task = good(*arguments, **settings)
        original = task.process_results

        def third(document, results, calls=[]):  # noqa: B006
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("cannot score this document")
            return original(document, results)

        task.process_results = third
        return task

    monkeypatch.setattr(tasks.TaskSpec, "build", broken)
    outcome = run(runner, cell())
    assert outcome.status == "failed"
    assert outcome.error.endswith("fail at the answers of all documents (RuntimeError: cannot score this document)")
    _, failures = finish(runner.directory, [cell()])
    assert "third" in failures[0]["traceback"]
    assert not list(runner.directory.glob("smollm2*"))

    monkeypatch.setattr(tasks.TaskSpec, "build", good)
    monkeypatch.setattr(scoring.Passes, "_score", None)  # what was scored was kept
    assert run(runner, cell()).status == "done"
    stored, failures = finish(runner.directory, [cell()])
    assert (len(stored), failures) == (1, [])


def test_a_model_that_fails_to_load_does_not_stop_the_others(runner, little, monkeypatch):
    def load(spec):
        if spec.dtype == "float64":
            raise OSError("weights are truncated")
        return little

    monkeypatch.setattr(sweep.loading, "load", load)
    bad = cell(model=ModelSpec(path=SMOLLM2, dtype="float64", device="cpu"))
    cells = [cell("h2o"), bad, cell("window")]
    assert [run(runner, c).status for c in cells] == ["done", "failed", "done"]
    stored, failures = finish(runner.directory, cells)
    assert len(stored) == 2
    assert failures[0]["error"] == "OSError: weights are truncated"


def test_nan_in_the_weights_is_a_failure_that_names_the_layer(runner, little):
    weight = little.model.model.layers[1].self_attn.v_proj.weight
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    try:
        outcome = run(runner, cell())
    finally:
        with torch.no_grad():
            weight[0, 0] = kept
    assert outcome.status == "failed"
    assert "value of layer 1" in outcome.error


def test_out_of_memory_halves_the_batch(runner, monkeypatch):
    sizes, read = [], looks.logits_in_parts

    def crowded(*arguments, input_ids, **more):
        sizes.append(input_ids.shape[1])
        if input_ids.shape[1] > 30:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return read(*arguments, input_ids=input_ids, **more)

    monkeypatch.setattr(looks, "logits_in_parts", crowded)
    assert run(runner, cell()).status == "done"
    assert sizes[0] > 30 >= max(sizes[-3:])


def test_too_little_memory_for_one_cell_takes_no_other_with_it(runner, monkeypatch):
    make = scoring.pass_of

    def crowded(row, todo, about):
        if any(0 < k.recent < k.budget for i in row.items for k in todo[i].retention):  # h2o's
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return make(row, todo, about)

    monkeypatch.setattr(scoring, "pass_of", crowded)
    cells = [cell(name) for name in ("full", "h2o", "window")]
    status = {o.name: o.status for o in runner.run(cells)}
    assert [status[c.name] for c in cells] == ["done", "failed", "done"]
    (loaded,) = runner._loaded.values()
    (scorer,) = loaded.scorers.values()
    assert scorer.tokens_per_pass == scorer.most_tokens


def test_little_memory_makes_smaller_passes_and_the_same_answers(runner, tmp_path, monkeypatch):
    usual, crowded = cell("h2o"), Runner(tmp_path / "t", Tracker(TrackerSpec(), "t", tmp_path / "t"))
    assert run(runner, usual).status == "done"
    monkeypatch.setattr(memory, "free_bytes", lambda model: 0)
    assert run(crowded, usual).status == "done"
    found = []
    for made, folder, tokens in ((runner, "s", 1024), (crowded, "t", 64)):
        (loaded,) = made._loaded.values()
        (scorer,) = loaded.scorers.values()
        assert scorer.most_tokens == tokens
        (result,) = load_sweep(tmp_path / folder)
        found.append(result.documents.select_dtypes("number"))
    pd.testing.assert_frame_equal(*found, rtol=1e-4)


def test_a_full_disk_stops_the_sweep_in_one_sentence(runner, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 100, 1000))
    with pytest.raises(DiskError, match=r"disk of .* is full"):
        run(runner, cell())


def test_a_disk_that_fills_while_writing_leaves_no_half_result(runner, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pandas.DataFrame.to_parquet", full)
    with pytest.raises(DiskError, match="No space left on device"):
        run(runner, cell())
    assert not [p for p in runner.directory.iterdir() if p.is_dir() and p.name not in ("failures", ".checkpoints")]


def test_a_file_system_that_takes_no_more(runner):
    """The kernel's own limit on a file's size stands in for a full disk: real writes fail half way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run(runner, cell("h2o"))  # data sets and compiled code are cached by now
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        with pytest.raises(DiskError, match="cannot be written"):
            run(runner, cell("window"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in runner.directory.glob("smollm2*")] == [cell("h2o").name]


def test_a_tracker_that_cannot_be_reached_costs_no_result(tmp_path, little, monkeypatch):
    import wandb

    def unreachable(*_, **__):
        raise wandb.errors.CommError("cannot reach the server")

    monkeypatch.setattr(sweep.loading, "load", lambda spec: little)
    monkeypatch.setattr(wandb, "init", unreachable)
    tracker = Tracker(TrackerSpec(kinds=("wandb",)), "s", tmp_path / "s")
    assert run(Runner(tmp_path / "s", tracker), cell()).status == "done"
    assert "cannot reach the server" in tracker.note


HOLD = """
import pathlib, sys, time, filelock
lock, ready, seconds = sys.argv[1:]
with filelock.SoftFileLease(lock, lease_duration=float(seconds)):
    pathlib.Path(ready).touch()
    time.sleep(600)
"""


def test_a_cell_that_another_process_computes_is_busy_until_that_process_is_dead(runner, tmp_path):
    ready = tmp_path / "ready"
    lock = sweep._lock_file(runner.directory, cell())
    lock.parent.mkdir(parents=True)
    owner = subprocess.Popen([sys.executable, "-c", HOLD, lock, ready, str(sweep.LEASE_SECONDS)])
    while not ready.exists():
        assert owner.poll() is None
        time.sleep(0.05)
    assert run(runner, cell()).status == "busy"
    owner.kill()
    owner.wait()
    started = time.monotonic()
    while (outcome := run(runner, cell())).status == "busy":
        assert time.monotonic() - started < 2 * sweep.LEASE_SECONDS
        time.sleep(0.5)
    assert outcome.status == "done"


def test_answers_of_unfinished_cells_are_read_by_the_next_start(runner, monkeypatch):
    runner.batch_size = 4
    cells = [cell(name) for name in ("full", "h2o", "window")]
    kept = interrupted(runner, cells, 3, monkeypatch)
    assert sum(map(len, kept.values())) == 3 * 4
    assert all(o.status == "done" for o in runner.run(cells))
    assert not (runner.directory / ".checkpoints").exists()
    stored_cells = load_sweep(runner.directory)
    assert {tail_of(stored.path) for stored in stored_cells} >= kept.keys()
    for stored in stored_cells:
        timing = stored.result["timing"]
        assert timing["reused_requests"] == 0
        columns = (stored.documents[c].explode() for c in ("request_hashes", "loglikelihoods"))
        of = dict(zip(*columns, strict=True))
        for h, answer in kept.get(tail_of(stored.path), {}).items():
            assert of[h] == answer[0]  # to the bit: not computed again


def test_a_damaged_checkpoint_counts_for_nothing(runner, monkeypatch):
    runner.batch_size = 4
    interrupted(runner, [cell("h2o")], 1, monkeypatch)
    (file,) = (runner.directory / ".checkpoints").glob("*.json")
    body = json.loads(file.read_text())
    first = next(iter(body["answers"]))
    body["answers"][first][0] = 99.0
    file.write_text(json.dumps(body))
    assert run(runner, cell("h2o")).status == "done"
    (stored,) = load_sweep(runner.directory)
    assert max(x for row in stored.documents["loglikelihoods"] for x in row) <= 0


def test_the_sum_over_a_sweep_is_what_was_computed(runner, monkeypatch):
    read, tokens = looks.logits_in_parts, []

    def counting(*arguments, input_ids, **more):
        tokens.append(input_ids.shape[1])
        return read(*arguments, input_ids=input_ids, **more)

    monkeypatch.setattr(looks, "logits_in_parts", counting)
    assert {o.status for o in runner.run([cell("full"), cell("h2o"), cell("a2sf")])} == {"done"}
    timings = [s.result["timing"] for s in load_sweep(runner.directory)]
    assert sum(t["computed_tokens"] for t in timings) == pytest.approx(sum(tokens))
    assert all(0.3 < t["shared"] <= 1 for t in timings)


def test_traces_are_kept_beside_the_result(runner):
    runner.trace = 2
    assert run(runner, cell("h2o")).status == "done"
    (path,) = runner.directory.glob("smollm2*")
    traces = load(path / "traces.npz")
    assert [t.document for t in traces] == [0, 1]
    kept = traces[0].retained()
    total = kept.shape[-1]
    assert set(kept.sum(-1).flatten().tolist()) == {total // 2}  # the budget, in every layer and head


def test_equal_cells_are_one_and_finished_ones_are_recognised(runner):
    cells = [cell("full"), cell("full"), cell("h2o")]
    assert len(plan(cells, runner.directory).pending) == 2
    run(runner, cells[0])
    made = plan(cells, runner.directory)
    assert [c.policy.name for c in made.pending] == ["h2o"]
    elsewhere = plan(cells, runner.directory.parent / "another")
    assert [c.policy.name for c in elsewhere.pending] == ["h2o"]
    assert is_cell(runner.directory.parent / "another" / cells[0].name)


def test_a_damaged_cell_is_set_aside_and_taken_from_another_sweep(runner):
    done = cell()
    run(runner, done)
    plan([done], runner.directory.parent / "another")
    file = runner.directory.parent / "another" / done.name / "result.json"
    text = file.read_text()
    file.unlink()  # the link, not the file that the other sweep holds
    file.write_text(text[:-100])
    made = plan([done], runner.directory.parent / "another")
    assert (made.pending, len(made.notes)) == ([], 1)


def test_weights_that_change_during_a_sweep_are_a_failure(runner, little, monkeypatch):
    changed = dataclasses.replace(little, fingerprint="other")
    monkeypatch.setattr(sweep.loading, "load", lambda spec: changed)
    outcome = run(runner, cell())
    assert (outcome.status, "changed after the sweep began" in outcome.error) == ("failed", True)


def test_a_worker_computes_no_cell_that_was_not_planned(runner):
    """A file of settings that changed after the plan makes another cell; the sweep's folder must not get it."""
    planned, other = cell("h2o"), cell("h2o", budget=Budget(ratio=0.4))
    outcomes = runner.run([planned, other], [planned.name])
    assert [(o.name, o.status) for o in outcomes] == [(planned.name, "done")]
    assert [p.name for p in runner.directory.iterdir() if is_cell(p)] == [planned.name]


IDENTIFYING = ["model.safetensors", "config.json", "tokenizer.json", "vocab.txt", "chat_template.jinja", "modeling.py"]


@pytest.mark.parametrize("name", IDENTIFYING)
def test_a_local_model_is_another_one_when_its_weights_config_or_tokenizer_change(tmp_path, name):
    for file in IDENTIFYING:
        (tmp_path / file).write_text("{}")
    (tmp_path / "notes.md").write_text("one")
    before = fingerprint(ModelSpec(path=str(tmp_path)))
    (tmp_path / "notes.md").write_text("another")
    assert fingerprint(ModelSpec(path=str(tmp_path))) == before
    (tmp_path / name).write_text("{ }")
    assert fingerprint(ModelSpec(path=str(tmp_path))) != before


def test_a_hub_model_is_looked_up_before_its_cells_are_named(runner, little, monkeypatch):
    """Else its cells would have another name on the next start, and be computed again."""
    commit = "0123456789" * 4
    monkeypatch.setattr("a2sf.hub.snapshot.commit_of", lambda wanted: (commit, None))
    monkeypatch.setattr(sweep.loading, "load", lambda spec: dataclasses.replace(little, fingerprint=commit))
    on_main = cell(model=ModelSpec(path="owner/name", device="cpu"), model_name="name")
    assert run(runner, on_main).status == "done"
    at_commit = ModelSpec(path="owner/name", device="cpu", revision=commit)
    assert plan([cell(model=at_commit, model_name="name")], runner.directory).pending == []
    (stored,) = load_sweep(runner.directory)
    assert stored.cell["identity"]["weights"] == commit


def test_a_model_that_cannot_be_loaded_is_tried_once(runner, monkeypatch):
    tried = []

    def load(spec):
        tried.append(spec)
        raise UserError("it lacks a layer.")

    monkeypatch.setattr(sweep.loading, "load", load)
    outcomes = [run(runner, cell(policy)) for policy in ("full", "h2o")]
    assert [o.error for o in outcomes] == ["it lacks a layer."] * 2
    assert len(tried) == 1


def test_a_failure_with_missing_weights_is_not_remembered(runner, little, monkeypatch):
    """A branch moves: the cell has another name, and the failure of the old one is nobody's any more."""
    of_commit = {
        c: cell(model=ModelSpec("owner/name", device="cpu", revision=c)) for c in ("a" * 40, "b" * 40, "c" * 40)
    }
    first, second, third = of_commit.values()
    runner.fail(first, UserError("no."))
    runner.fail(cell("h2o"), UserError("another cell's."))
    runner.fail(second, UserError("no."))
    left = {f["cell"] for f in read_failures([runner.directory])}
    assert left == {second.name, cell("h2o").name}
    monkeypatch.setattr(sweep.loading, "load", lambda spec: dataclasses.replace(little, fingerprint=spec.revision))
    stale = sweep.failure_file(runner.directory, second.name).read_text()
    assert run(runner, third).status == "done"
    assert {f["cell"] for f in read_failures([runner.directory])} == {cell("h2o").name}
    sweep.failure_file(runner.directory, second.name).write_text(stale)  # as an earlier version would have left it
    assert {f["cell"] for f in read_failures([runner.directory])} == {cell("h2o").name}


def test_nothing_is_served_across_another_engine_version(runner, monkeypatch):
    run(runner, cell())
    monkeypatch.setattr("a2sf.sweep.cell.ENGINE_VERSION", 999)
    assert len(plan([cell()], runner.directory).pending) == 1


def test_the_plan_estimates_tokens_and_time_from_measurements(runner):
    runs = runner.directory.parent
    cells = [cell(name, limit=8) for name in ("h2o", "window")]
    (before,) = estimate([cells], runs)
    assert before.seconds is None
    run(runner, cell("full"))
    (stored,) = load_sweep(runner.directory)
    planned, other, unknown = estimate([cells, [cell(task="piqa", limit=8)], [cell(limit=8, data=HUB)]], runs)
    assert planned.tokens == pytest.approx(before.tokens, rel=0.3)  # first from characters, then from tokens
    assert other.tokens
    assert unknown.tokens == pytest.approx(estimate([[cell(limit=8)]], runs)[0].tokens)  # the same task's lengths
    timing = stored.result["timing"]
    assert planned.seconds == pytest.approx(planned.tokens * timing["seconds"] / timing["computed_tokens"])
    assert all(o.status == "done" for o in runner.run(cells))
    computed = sum(s.result["timing"]["computed_tokens"] for s in load_sweep(runner.directory) if s.cell["limit"] == 8)
    assert planned.tokens == pytest.approx(
        computed, rel=0.35
    )  # four documents stand for eight, of which four are known


def test_a_failure_file_is_whole_json(runner, monkeypatch):
    monkeypatch.setattr(group, "evaluate", lambda *_: 1 / 0)
    run(runner, cell())
    record = json.loads(sweep.failure_file(runner.directory, cell().name).read_text())
    assert record["error"] == "ZeroDivisionError: division by zero"
    assert record["cell"]["task"] == "copa"


def test_the_commit_is_ours_and_nobody_elses(tmp_path, monkeypatch):
    """An environment inside another project's repository is not at that repository's commit."""
    elsewhere = tmp_path / "project" / ".venv" / "a2sf" / "experiments" / "sweep.py"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_text("")
    at = ["git", "-C", str(tmp_path / "project"), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    (tmp_path / "project" / "theirs.py").write_text("")
    for arguments in (["init", "-q"], ["add", "theirs.py"], ["commit", "-qm", "theirs"]):
        subprocess.run([*at, *arguments], check=True)
    monkeypatch.setattr(sweep, "__file__", str(elsewhere))
    sweep._git.cache_clear()
    assert sweep._git() == {"git_commit": None, "git_dirty": None}
    subprocess.run([*at, "add", "-f", str(elsewhere)], check=True)  # our repository holds its own files
    sweep._git.cache_clear()
    assert sweep._git()["git_commit"]
    sweep._git.cache_clear()
