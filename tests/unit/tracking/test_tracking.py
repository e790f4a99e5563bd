"""What trackers get is read back with their own readers, and nothing they refuse can cost a sweep its end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from a2sf.commands import track
from a2sf.errors import ConfigError, UserError
from a2sf.report.output import pictures
from a2sf.store.runs import results_frame, write_cell
from a2sf.tracking.content import one_type_per_column
from a2sf.tracking.tracker import Tracker, TrackerSpec
from a2sf.tracking.wandb_runs import run_id
from tests.sweep_fixture import Plan, write_sweep

ALL = ("wandb", "tensorboard")
SWEEP = "a [sweep]: 1/2 é" + "x" * 300


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """A sweep over a ratio and a list of ratios, with a setting of the policy's own."""
    plan = Plan(
        documents={"piqa": 5}, policies=("full", "h2o"), shots=(1,), extra={"policy_settings": {"recent_share": 0.5}}
    )
    return write_sweep(tmp_path_factory.mktemp("runs") / "s", plan)


@pytest.fixture
def mixed(cells):
    frame = results_frame(cells)
    frame["budget_ratio"] = frame["budget_ratio"].astype(object)
    frame.loc[2, "budget_ratio"] = "0.2/0.3/0.4"
    return frame


@pytest.fixture(scope="module")
def logged(cells, tmp_path_factory):
    """The sweep's directory, logged to every tracker: its cells, then the results with their plots."""
    directory = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        tracker = Tracker(TrackerSpec(kinds=ALL), SWEEP, directory)
        for stored in cells:
            tracker.log_cell(stored)
        tracker.log_cell(cells[0])  # again: it is the same run
        tracker.log_summary(results_frame(cells), lambda: pictures(cells[0].path.parent))
        assert not tracker.failed
        assert "wandb sync" in tracker.note
        assert "tensorboard --logdir" in tracker.note
    return directory


def read_wandb(run: Path) -> dict:
    """A run that was not sent, as W&B's own reader shows it."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(run)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_every_column_holds_one_type(mixed):
    for _, column in one_type_per_column(mixed).items():
        assert len({type(v) for v in column if v is not None}) <= 1
    assert one_type_per_column(mixed)["value"].map(type).eq(float).all()
    assert "0.2/0.3/0.4" in set(one_type_per_column(mixed)["budget_ratio"])


def test_wandb_has_a_run_for_each_cell_with_the_columns_that_people_filter_by(cells, logged):
    runs = [read_wandb(r) for r in sorted(logged.glob("wandb/offline-run-*"))]
    found = {run["name"]: run for run in runs if run["name"] != "summary"}
    assert set(found) == {s.path.name for s in cells}
    assert len({run["run_id"] for run in runs}) == len(cells) + 1  # the cell that was logged twice is one run
    for stored in cells:
        run, pruned = found[stored.path.name], stored.cell["budget"] is not None
        columns = {
            k: run["config"][k] for k in ("model", "policy", "budget_ratio", "task", "shots", "schedule", "limit")
        }
        assert columns == {
            "model": "tiny",
            "policy": stored.cell["policy"],
            "budget_ratio": stored.cell["budget"]["ratio"] if pruned else 1.0,
            "task": "piqa",
            "shots": 1,
            "schedule": "step",
            "limit": None,
        }
        assert run["config"]["policy_recent_share"] == 0.5
        assert run["config"]["cell"] == stored.cell
        assert run["config"]["baseline"] is not pruned
        assert run["tags"] == ([] if pruned else ["baseline"])
        for metric in ("acc", "acc_norm"):
            assert run["summary"][f"{metric}/piqa/1shot"] == pytest.approx(stored.metrics[metric]["value"])
            assert run["summary"][f"{metric}_stderr/piqa/1shot"] == pytest.approx(stored.metrics[metric]["stderr"])
        assert run["summary"]["cache_share"] == stored.result["timing"]["cache_share"]


def test_wandb_has_the_sweep_as_one_table_with_its_plots(cells, logged):
    (place,) = (r for r in logged.glob("wandb/offline-run-*") if "summary" in r.name)
    summary = read_wandb(place)["summary"]
    table = json.loads((place / "files" / summary["results"]["path"]).read_text())
    frame = pd.DataFrame(table["data"], columns=table["columns"])
    assert len(frame) == len(results_frame(cells))
    assert set(frame.loc[frame["baseline"] == "yes", "policy"]) == {"full"}
    assert {"model", "policy", "budget_ratio", "schedule", "forgetting_factor", "task", "shots"} <= set(frame)
    drawn = {name for name, value in summary.items() if isinstance(value, dict) and value.get("_type") == "image-file"}
    assert drawn == {f.stem for f in (cells[0].path.parent / "plots").glob("*.png")} != set()


def test_tensorboard_has_the_same(cells, logged):
    def read(folder: str) -> EventAccumulator:
        events = EventAccumulator(str(logged / "tensorboard" / folder), size_guidance={"images": 0, "tensors": 0})
        return events.Reload()

    folders = {f.name for f in (logged / "tensorboard").iterdir() if f.is_dir()}
    assert folders == {s.path.name for s in cells} | {"summary"}
    for stored in cells:
        events = read(stored.path.name)
        (accuracy,) = events.Scalars("acc/piqa/1shot")  # also of the cell that was logged twice
        assert accuracy.value == pytest.approx(stored.metrics["acc"]["value"])
        start = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        columns = HParamsPluginData.FromString(start).session_start_info.hparams
        assert columns["policy"].string_value == stored.cell["policy"]
        assert columns["budget_ratio"].number_value == (stored.cell["budget"] or {"ratio": 1.0})["ratio"]
        assert columns["policy_recent_share"].number_value == 0.5
        assert columns["baseline"].string_value == ("no" if stored.cell["budget"] else "yes")
        assert columns["shots"].number_value == 1
        assert "limit" not in columns  # there was none
    summary = read("summary")
    assert set(summary.Tags()["images"]) == {f.stem for f in (cells[0].path.parent / "plots").glob("*.png")}
    (text,) = summary.Tensors("results/text_summary")
    table = text.tensor_proto.string_val[0].decode().splitlines()
    assert table[0].startswith("| baseline | model | policy |")
    assert len(table) == 2 + len(results_frame(cells))


def test_a_summary_of_mixed_budgets_is_logged(mixed, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(TrackerSpec(kinds=ALL), SWEEP, tmp_path / "out")
    tracker.log_summary(mixed, dict)
    assert not tracker.failed
    (table,) = (tmp_path / "out").glob("wandb/offline-run-*/files/media/table/results_*.table.json")
    written = json.loads(table.read_text())
    assert len(written["data"]) == len(mixed)


@pytest.mark.parametrize("broken", [pd.DataFrame({"a": [object(), {1}]}), None])
def test_whatever_cannot_be_logged_is_a_note(broken, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(TrackerSpec(kinds=ALL), "s", tmp_path)
    tracker.log_summary(broken, lambda: {"picture": tmp_path / "not there.png"})
    assert "W&B failed" in tracker.note
    assert "TensorBoard failed" in tracker.note


def test_one_tracker_that_fails_leaves_the_other_alone(cells, tmp_path, monkeypatch):
    monkeypatch.setattr("wandb.init", lambda **_: (_ for _ in ()).throw(OSError("no route")))
    tracker = Tracker(TrackerSpec(kinds=ALL, directory=str(tmp_path / "boards")), "s", tmp_path / "s")

    def draw():
        raise ValueError("no plot of this")

    tracker.log_cell(cells[0])
    tracker.log_summary(results_frame(cells), draw)
    assert tracker.failed == {"W&B": "no route"}
    assert "no plot of this" in tracker.note
    assert f"tensorboard --logdir {tmp_path}/boards/s" in tracker.note
    assert {f.name for f in (tmp_path / "boards" / "s").iterdir() if f.is_dir()} == {cells[0].path.name, "summary"}


def test_a_tracker_that_is_not_installed_is_reported_at_once(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'tensorboard is not installed; pip install "a2sf\[tensorboard\]"'):
        TrackerSpec(kinds=("tensorboard",))


class Server:
    """What W&B's server does of what the tests need: `wandb.init` as the sweep calls it, raising what wandb raises.

    Attributes:
        deleted: ids that it takes no more.
        runs: by id, everything that was logged to it.
    """

    def __init__(self) -> None:
        self.deleted: set[str] = set()
        self.runs: dict[str, list[dict]] = {}
        self.down = False
        self.requests = 0

    def init(self, *, id, name, **_):
        import wandb

        self.requests += 1
        if self.down:
            raise wandb.errors.CommError("Run initialization has timed out after 30.0 sec")
        if id in self.deleted:
            raise wandb.errors.CommError(
                f"run {name} was previously created and deleted; try a new run name (Error 409)"
            )
        logged = self.runs.setdefault(id, [])
        return SimpleNamespace(log=logged.append, finish=lambda: None)


@pytest.fixture
def server(monkeypatch):
    made = Server()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("wandb.init", made.init)
    return made


def tracked(cells, kinds=("wandb",), **more) -> Tracker:
    """A tracker that was given a complete sweep, as after a start of the program."""
    directory = cells[0].path.parent
    tracker = Tracker(TrackerSpec(kinds=kinds), "s", directory, **more)
    for stored in cells:
        tracker.log_cell(stored)
    tracker.log_summary(results_frame(cells), dict)
    return tracker


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path / "s", Plan(documents={"piqa": 5}, policies=("full", "h2o", "window"), budgets=(0.2,)))


def test_a_run_that_was_deleted_is_logged_under_a_new_id_and_the_others_under_their_own(sweep, server):
    run = run_id("s", sweep[1].path.name)
    server.deleted.add(run)
    assert tracked(sweep).complete
    names = [s.path.name for s in sweep]
    expected = {run_id("s", names[0]), f"{run}-2", run_id("s", names[2]), run_id("s", "summary")}
    assert set(server.runs) == expected
    server.deleted.add(f"{run}-2")
    assert tracked(sweep, again=True).complete
    assert f"{run}-3" in server.runs


def test_a_run_that_is_refused_under_any_id_costs_no_other(sweep, server):
    lost = run_id("s", sweep[1].path.name)
    server.deleted |= {lost, f"{lost}-2", f"{lost}-3"}
    tracker = tracked(sweep)
    assert not tracker.complete
    assert f"W&B failed for 1 of its runs ({sweep[1].path.name}: run" in tracker.note
    assert len(server.runs) == 3  # the others and the summary
    server.deleted.clear()
    tracker = tracked(sweep)  # only what is missing
    assert (tracker.complete, tracker.logged, len(server.runs)) == (True, 1, 4)
    assert all(len(r) == 1 for r in server.runs.values())


def test_a_server_that_does_not_answer_is_not_called_for_every_cell(sweep, server):
    server.down = True
    tracker = tracked(sweep)
    assert "timed out" in tracker.failed["W&B"]
    assert server.requests == 2
    server.down = False
    assert tracked(sweep).logged == 3


def test_every_cell_is_logged_once_over_restarts_and_again_when_it_was_computed_again(sweep, server):
    for expected in (3, 0):
        tracker = tracked(sweep)
        assert tracker.logged == expected
    assert "W&B has these cells already" in tracker.note
    assert all(len(r) == 1 for r in server.runs.values())
    body = {k: v for k, v in sweep[0].result.items() if k != "checksums"}
    body["metrics"]["acc"]["value"] += 0.01
    documents = sweep[0].documents
    shutil.rmtree(sweep[0].path)
    changed = write_cell(sweep[0].path, body, documents, "")
    assert tracked([changed, *sweep[1:]]).logged == 1
    other = Tracker(TrackerSpec(kinds=("wandb",), project="other"), "s", sweep[0].path.parent)
    other.log_cell(changed)  # another project has it not
    assert other.logged == 1


def test_what_was_deleted_on_the_disk_is_logged_again(sweep):
    assert tracked(sweep, ("tensorboard",)).logged == 3
    assert tracked(sweep, ("tensorboard",)).logged == 0
    shutil.rmtree(sweep[0].path.parent / "tensorboard")
    assert tracked(sweep, ("tensorboard",)).logged == 3


def test_the_command_logs_a_finished_sweep(sweep, server, tmp_path, capsys):
    directory = str(sweep[0].path.parent)
    (tmp_path / "own" / "tracker").mkdir(parents=True)
    (tmp_path / "own" / "tracker" / "team.yaml").write_text("kinds: {team: wandb}\nproject: team\n")
    track.main([directory, "tracker=wandb"])
    assert "3 cells, 3 logged now" in capsys.readouterr().out
    assert len(server.runs) == 4
    track.main([directory, "tracker=wandb"])
    output = capsys.readouterr().out
    assert "3 cells, 0 logged now" in output
    assert "--again" in output
    track.main([directory, "tracker=team", "--config-dir", str(tmp_path / "own")])
    assert "3 logged now" in capsys.readouterr().out
    track.main([directory, "tracker=[wandb,tensorboard]", f"tracker.directory={tmp_path}/boards"])
    assert len(list((tmp_path / "boards" / "s").glob("*/events*"))) == 4
    server.down = True
    with pytest.raises(SystemExit):
        track.main([directory, "tracker=wandb", "--again"])
    for wrong, message in (
        ([directory], "needs a tracker"),
        (["tracker=wandb"], "needs the directory"),
    ):
        with pytest.raises(UserError, match=message):
            track.main(wrong)
    with pytest.raises(UserError, match="is not a directory"):
        track.main([str(tmp_path / "none"), "tracker=wandb"])
