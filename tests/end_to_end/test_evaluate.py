"""The real command on the real small model: results, resuming, failures, many processes, bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from a2sf.store.runs import is_cell, load_sweep, read_cell
from tests.started import started

ROOT = Path(__file__).parents[2]
GRID = ["policy=full,window,h2o,a2sf", "budget.ratio=0.2,0.4", "tasks=[copa]", "limit=4", "data=bundle"]
CELLS = 7  # full is one cell whatever the budget


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *arguments]


def evaluate(*arguments: str, runs: Path, anew: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; started `anew` where workers are to be started, or on request."""
    variables = {**os.environ, "COLUMNS": "150", "HF_HUB_OFFLINE": "1", **environment}
    arguments = (*arguments, f"runs_dir={runs}")
    if not anew and not any(
        a.startswith("hydra/launcher=") for a in arguments
    ):  # which a fork would wait for at its end
        return started("evaluate.py", *arguments, environment=variables)
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, timeout=400, cwd=ROOT, env=variables
    )


def tables(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return started("tables.py", *map(str, arguments), environment={**os.environ, "COLUMNS": "150", **environment})


def numbers(directory: Path) -> dict[str, object]:
    """Everything in the results but the timings."""
    return {
        s.path.name: (s.metrics, s.result["documents"], s.documents.to_json(orient="records"))
        for s in load_sweep(directory)
    }


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A small real sweep, run once."""
    runs = tmp_path_factory.mktemp("runs")
    done = evaluate("-m", *GRID, "sweep_name=small", runs=runs, anew=True)
    assert done.returncode == 0, done.stderr
    return runs, done


def test_a_sweep_ends_with_a_table_and_files(sweep):
    runs, done = sweep
    directory = runs / "small"
    assert f"{CELLS} cells, 0 done, {CELLS} to run" in done.stdout
    assert "by a short trial of this machine's speed" in " ".join(done.stdout.split())  # the model never ran here
    for label in ("Full cache", "Window", "H2O", "A2SF", "copa"):
        assert label in done.stdout
    assert "Traceback" not in done.stderr
    assert "it/s" not in done.stderr  # libraries keep to themselves
    assert re.search(rf"^{CELLS} of {CELLS} cells, 100 % of the work, .* so far; finished ", done.stdout, re.M)
    table = pd.read_csv(directory / "results.csv")
    assert ",".join(table.columns).startswith(
        "model,policy,budget_ratio,forgetting_factor,shots,task,metric,value,lm_eval_stderr,n"
    )
    assert len(table) == CELLS
    assert set(table["n"]) == {4}
    stored = load_sweep(directory)
    assert len(stored) == CELLS
    for cell in stored:
        assert list(cell.documents["doc_id"]) == [0, 1, 2, 3]
        agrees = (cell.documents["prediction"] == cell.documents["gold"]).mean()
        assert agrees == pytest.approx(cell.metrics["acc"]["value"])
        assert cell.result["documents"]["split"] == "validation"
        assert cell.result["provenance"]["versions"]["lm-eval"]
        assert cell.result["provenance"]["backend"] == "numba"  # what ran, not what was requested
        assert cell.result["timing"]["tokens_per_second"] > 0
    pruned = next(c for c in stored if c.cell["policy"] == "window" and c.cell["budget"]["ratio"] == 0.2)
    full = next(c for c in stored if c.cell["policy"] == "full")
    assert pruned.result["timing"]["cache_share"] < 0.25
    assert full.result["timing"]["cache_share"] == 1.0
    assert [list(a) for a in pruned.documents["loglikelihoods"]] != [list(a) for a in full.documents["loglikelihoods"]]


def test_the_same_command_runs_nothing_again(sweep):
    runs, first = sweep
    before = {p: p.stat().st_mtime_ns for p in (runs / "small").rglob("result.json")}
    again = evaluate("-m", *GRID, "sweep_name=small", runs=runs)
    assert again.returncode == 0, again.stderr
    assert f"{CELLS} cells, {CELLS} done, 0 to run" in again.stdout
    (table,) = re.findall(r"smollm2-135m, 0-shot.*?\n\n", again.stdout, re.DOTALL)
    assert table in first.stdout
    assert {p: p.stat().st_mtime_ns for p in (runs / "small").rglob("result.json")} == before


@pytest.mark.full
def test_wandb_gets_one_run_per_cell_and_a_summary_once(tmp_path):
    arguments = ["-m", *GRID, "sweep_name=small", "tracker=wandb"]
    done = evaluate(*arguments, runs=tmp_path, anew=True, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert "wandb sync" in done.stdout
    assert "W&B has" not in done.stdout
    logged = list((tmp_path / "small" / "wandb").glob("offline-run-*"))
    assert len(logged) == CELLS + 1
    again = evaluate(*arguments, runs=tmp_path)
    assert f"{CELLS} cells, {CELLS} done, 0 to run" in again.stdout
    assert "W&B has these cells already" in again.stdout
    assert list((tmp_path / "small" / "wandb").glob("offline-run-*")) == logged


@pytest.mark.full
def test_another_sweep_reuses_the_cells_and_a_higher_limit_extends_them(sweep):
    runs, _ = sweep
    linked = evaluate("-m", *GRID, "sweep_name=other", "policy=full,h2o", runs=runs)
    assert "3 cells, 3 done, 0 to run" in linked.stdout
    more = evaluate("-m", *GRID, "sweep_name=more", "policy=h2o", "budget.ratio=0.2", "limit=6", runs=runs)
    assert more.returncode == 0, more.stderr
    said = " ".join(more.stdout.split())
    assert "tokens to compute, about" in said
    assert "at the speed measured here" in said
    (extended,) = load_sweep(runs / "more")
    assert extended.result["timing"]["reused_requests"] == 8
    assert extended.metrics["acc"]["n"] == 6
    fresh = evaluate("-m", *GRID, "sweep_name=more", "policy=h2o", "budget.ratio=0.2", "limit=6", runs=runs / "fresh")
    assert fresh.returncode == 0, fresh.stderr
    (computed_anew,) = load_sweep(runs / "fresh" / "more")
    assert computed_anew.metrics == extended.metrics
    together = zip(extended.documents["loglikelihoods"], computed_anew.documents["loglikelihoods"], strict=True)
    for a, b in together:
        assert list(a) == pytest.approx(list(b), abs=1e-3)


@pytest.mark.full
def test_what_another_sweep_computed_is_logged_too_and_a_finished_sweep_on_demand(sweep):
    runs, _ = sweep
    arguments = ["-m", "policy=full,h2o", "tasks=[copa]", "limit=4", "data=bundle", "sweep_name=tracked"]
    boards = runs / "tracked" / "tensorboard"

    def logged() -> dict[str, int]:
        return {f.name: len(list(f.glob("events*"))) for f in boards.glob("*") if f.is_dir()}

    assert evaluate(*arguments, runs=runs).returncode == 0  # all reused, and no tracker
    assert logged() == {}
    names = {s.path.name for s in load_sweep(runs / "tracked")}
    assert sum("__full__" in n for n in names) == 1
    done = evaluate(*arguments, "tracker=tensorboard", runs=runs)
    assert "2 done, 0 to run" in done.stdout
    assert logged() == dict.fromkeys([*names, "summary"], 1)
    assert "tensorboard --logdir" in done.stdout
    again = evaluate(*arguments, "tracker=tensorboard", runs=runs)
    assert "TensorBoard has these cells already" in again.stdout


@pytest.mark.full
def test_a_damaged_result_is_set_aside_and_computed_again(sweep):
    runs, _ = sweep
    victim = sorted(p for p in (runs / "small").iterdir() if is_cell(p))[0]
    expected = read_cell(victim).metrics
    file = victim / "documents.parquet"
    file.write_bytes(file.read_bytes()[:100])
    again = evaluate("-m", *GRID, "sweep_name=small", runs=runs)
    assert again.returncode == 0, again.stderr
    assert "it will be computed again" in " ".join(again.stdout.split())
    assert read_cell(victim).metrics == expected
    assert [p for p in (runs / "small").iterdir() if ".corrupt-" in p.name]


@pytest.mark.full
def test_one_configuration_without_a_sweep(tmp_path):
    done = evaluate(
        "policy=a2sf", "forgetting_factor=0.2", "tasks=[copa]", "limit=2", "data=bundle", "shots=1", runs=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (stored,) = load_sweep(tmp_path / "single")
    assert stored.cell["forgetting_factor"] == 0.2
    assert stored.result["documents"]["fewshot_split"] == "validation"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["policy=h2o", "budget.ratio=1.7"], ["budget.ratio=1.7", "0 < ratio <= 1"]),
        (["-m", "policy=h2o,a2sf", "budget.ratio=0.1,nan"], ["budget.ratio=nan"]),
        (["policy=h2oo"], ["policy=h2oo", "did you mean h2o"]),
        (["-m", "+sweep=dmo"], ["sweep=dmo", "did you mean demo"]),
        (["tasks=[mathqa]", "data=bundle"], ["tasks=mathqa", "does not hold it"]),
        (["model.path=nobody/nothing", "tasks=[copa]", "data=bundle"], ["model.path=nobody/nothing", "hub"]),
        (["tasks=[copa]", "data=hub"], ["tasks=copa", "hub"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_ends_with_one_sentence_and_code_1(tmp_path, arguments, parts):
    done = evaluate(*arguments, runs=tmp_path / "runs")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert not list((tmp_path / "runs").rglob("result.json"))


@pytest.mark.full
def test_an_encoder_decoder_is_refused(tmp_path):
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    )
    done = evaluate(f"model.path={tmp_path / 't5'}", "tasks=[copa]", "data=bundle", runs=tmp_path / "runs")
    assert done.returncode == 1
    assert "encoder-decoder" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.full
def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").write_text("a file where the directory should be")
    done = evaluate("policy=full", "tasks=[copa]", "limit=1", "data=bundle", runs=tmp_path / "runs" / "x")
    assert done.returncode == 1
    assert "cannot be written" in done.stderr or "Not a directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.full
def test_two_processes_on_one_directory_compute_each_cell_once(sweep, tmp_path):
    runs = tmp_path / "runs"
    both = [
        subprocess.Popen(
            command("-m", *GRID, "sweep_name=small", "tracker=wandb", f"runs_dir={runs}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    outputs = [p.communicate(timeout=400) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    undisturbed, _ = sweep
    assert set(numbers(runs / "small")) == set(numbers(undisturbed / "small"))
    # every computed cell is logged once, by whoever computed it; each process writes a summary if it computed any
    logged = list((runs / "small" / "wandb").glob("offline-run-*"))
    assert CELLS + 1 <= len(logged) <= CELLS + 2
    table = pd.read_csv(runs / "small" / "results.csv")
    assert len(table) == CELLS


@pytest.mark.full
def test_a_sweep_in_the_background_of_a_script_can_be_stopped(tmp_path):
    """A shell makes such a process ignore SIGINT, and SIGTERM has to stop it nevertheless."""
    process = subprocess.Popen(
        command("-m", *GRID, "batch_size=1", "checkpoint=0.01", "sweep_name=stopped", f"runs_dir={tmp_path}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    started = time.monotonic()
    while not list(tmp_path.glob("stopped/.checkpoints/*.json")):
        assert process.poll() is None
        assert time.monotonic() - started < 200
        time.sleep(0.2)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "All finished work is saved" in said
    assert list(tmp_path.glob("stopped/.checkpoints/*.json"))
