"""`kill -9` at random moments: nothing that was kept is computed again, and little is not kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time

import pytest

from a2sf.store.runs import is_cell, load_sweep, read_cell
from tests import killed
from tests.hub.build import write_model
from tests.models import write_piqa

KILLS, CHECKPOINT = 20, 0.25
SCORES = ["-m", "policy=full,window,h2o,a2sf,tova", "budget.ratio=0.2,0.5", "tasks=[piqa]", "batch_size=8"]
SAMPLES = [
    "-m",
    "policy=full,window,h2o",
    "budget.ratio=0.5",
    "samples=4",
    "gen_kwargs.temperature=1.0",
    "batch_size=8",
]
TEXTS = """
task: own_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "What is {{{{goal}}}}?"
doc_to_target: "{{{{sol1}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1.0}}
"""


def numbers(directory):
    """Everything in the results but the timings."""
    return {
        s.path.name: (s.metrics, s.result["documents"], s.documents.drop(columns="loglikelihoods").to_json())
        for s in load_sweep(directory)
    }


def likelihoods(directory):
    return {s.path.name: [x for row in s.documents["loglikelihoods"] for x in row] for s in load_sweep(directory)}


@pytest.mark.full
@pytest.mark.parametrize("grid", [SCORES, SAMPLES], ids=["log-likelihoods", "samples"])
def test_a_sweep_killed_at_random_moments_loses_and_repeats_little(tmp_path, grid):
    model = write_model(tmp_path / "model", "llama", tokens=1000)
    data = write_piqa(tmp_path / "data" / "piqa.jsonl", rows=30)
    common = [f"model.path={model}", "model.device=cpu", f"checkpoint={CHECKPOINT}"]
    if grid is SAMPLES:
        file = tmp_path / "own_sums.yaml"
        file.write_text(TEXTS.format(data=tmp_path / "data" / "piqa.jsonl"))
        common.append(f"tasks=[{file}]")
    else:
        common.append(f"data.dir={data}")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(killed.preload())
    notes = tmp_path / "notes"

    def start(runs: str, file: str):
        arguments = [*grid, *common, "sweep_name=s", f"runs_dir={tmp_path / runs}"]
        process = server.Process(target=killed.run, args=(arguments, str(tmp_path / file)))
        process.start()
        return process

    undisturbed = start("undisturbed", "other")
    undisturbed.join(200)
    assert undisturbed.exitcode == 0
    computed = [json.loads(line) for line in (tmp_path / "other").read_text().splitlines()]
    began = computed[0][1]
    lasts = computed[-1][1] - began

    rng, kept, stamps, kills, lost = random.Random(0), {}, {}, 0, 0
    while True:
        before = len(notes.read_text().splitlines()) if notes.exists() else 0
        process = start("runs", "notes")
        while kills < KILLS and process.is_alive():  # until it computes, or the work is done
            if len(notes.read_text().splitlines() if notes.exists() else ()) > before:
                break
            time.sleep(0.01)
        if kills == KILLS:
            process.join(200)
            assert process.exitcode == 0
        else:
            process.join(rng.uniform(0, lasts / 4))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
        kills += 1
        lines = notes.read_text().splitlines()[before:] if notes.exists() else []
        events = [json.loads(line) for line in lines]
        fresh = [(when, name, h) for kind, when, name, *more in events if kind == "computed" for h in more[0]]
        assert not [(name, h) for _, name, h in fresh if h in kept.get(name, ())]  # nothing is computed again
        for kind, _, name, *more in events:
            if kind == "kept":
                kept.setdefault(name, set()).update(more[0])
        done = {p.name for p in (tmp_path / "runs" / "s").glob("*__*") if is_cell(p)}
        unsaved = [when for when, name, h in fresh if name not in done and h not in kept.get(name, ())]
        lost += len(unsaved)
        passes = sorted(set(unsaved))  # by the killed process's own clock; it may have died keeping the last
        assert len(passes) < 2 or passes[-2] - passes[0] < CHECKPOINT
        for path in (tmp_path / "runs" / "s").glob("[!.]*__*"):  # a folder that was being written has a dot
            read_cell(path)  # complete
            stamp = (path / "result.json").stat().st_mtime_ns
            assert stamps.setdefault(path.name, stamp) == stamp
        if kills > KILLS:
            break
    assert lost > 0  # some kills came between two checkpoints
    assert numbers(tmp_path / "runs" / "s") == numbers(tmp_path / "undisturbed" / "s")
    expected = likelihoods(tmp_path / "undisturbed" / "s")
    for name, found in likelihoods(tmp_path / "runs" / "s").items():
        assert found == pytest.approx(expected[name], abs=1e-3)
    assert not (tmp_path / "runs" / "s" / ".checkpoints").exists()
