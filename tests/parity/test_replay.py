"""What a cell's traces export to is replayed to the same log-likelihoods and texts; a file of another model is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from a2sf.commands.replay import main
from a2sf.engine.replay import Recorded, Replay, read, write
from a2sf.errors import ConfigError, UserError
from a2sf.hf import loading
from a2sf.policies.budget import Budget
from a2sf.policies.schedule import Schedule
from a2sf.scoring.replay import Replayer, check_model
from a2sf.store.runs import load_sweep
from a2sf.sweep.runner import Runner
from tests.conftest import SMOLLM2
from tests.models import shared
from tests.unit.sweep.test_sweep import cell, runner  # noqa: F401

SYSTEMS = {
    "a2sf": {"budget": Budget(tokens=5)},
    "streaming": {"budget": Budget(tokens=5), "schedule": Schedule("every", every=4)},
    "adakv": {"budget": Budget(ratio=0.4, base="context"), "schedule": Schedule("prompt")},
}


@pytest.mark.parametrize("task", ["copa", pytest.param("needle", marks=pytest.mark.full)])
def test_a_trace_is_replayed_to_the_same_numbers(runner: Runner, tmp_path: Path, task: str):  # noqa: F811
    runner.trace = 1
    outcomes = runner.run([cell(policy, task=task, limit=1, **system) for policy, system in SYSTEMS.items()])
    assert [o.status for o in outcomes] == ["done"] * len(SYSTEMS), [o.error for o in outcomes]
    for stored in load_sweep(runner.directory):
        file, table = tmp_path / "r.json", tmp_path / "r.csv"
        main([str(stored.path), "--export", str(file)])
        (recorded,) = read(file).documents
        assert (recorded.evicted_at < len(recorded.read)).any()
        main([str(file), "--out", str(table), *(["--same-text"] if task == "needle" else [])])
        row, document = pd.read_csv(table, dtype={"generated": str}).iloc[0], stored.documents.iloc[0]
        assert (row["task"], row["document"]) == (task, 0)
        tokens = len(document["tokens"]) if task == "needle" else document["continuation_tokens"][0]
        assert [row["prompt"], row["text"]] == [document["context_tokens"][0], tokens]
        if task == "needle":
            assert row["generated"].startswith(document["generated"])  # the stop sequence follows
            assert pd.isna(row["first_difference"])
        else:
            assert row["loglikelihood"] * row["text"] == pytest.approx(document["loglikelihoods"][0], abs=1e-3)
            assert abs(row["loglikelihood"] - row["full"]) > 1e-3  # what was evicted makes a difference


def recorded(**more: object) -> Replay:
    """A text of the small Llama, of which everything but the newest two tokens was evicted at step 5."""
    T = 8
    steps = torch.full((3, 2, T), T)
    steps[..., :4] = 5
    document = Recorded("", 0, tuple(range(3, 9)), (9, 10, 11), steps.int().numpy())
    return Replay(**{"layers": 3, "kv_heads": 2, "documents": (document,), **more})  # type: ignore[arg-type]


def test_deviations_are_found(monkeypatch, tmp_path: Path):
    model = shared("llama")
    replay = recorded()
    done = Replayer(model).run(replay.documents[0])
    assert done.deviation is None
    assert len(done.loglikelihoods) == len(done.full) == len(done.generated) == 3
    assert done.retained == 4

    class Tokenizer:
        def decode(self, tokens: list[int]) -> str:
            return " ".join(map(str, tokens))

    made = loading.LoadedModel(model, Tokenizer(), None)
    monkeypatch.setattr(loading, "load", lambda spec: made)
    for off in (0.0, 0.5):
        logs = (done.loglikelihoods[0] - off, *done.loglikelihoods[1:])
        (first,) = replay.documents
        said = Recorded("", 0, first.prompt, first.text, first.evicted_at, logs)
        write(tmp_path / "r.json", recorded(documents=(said,)))
        arguments = [str(tmp_path / "r.json"), "--model", SMOLLM2, "--tolerance", "0.01"]
        if off:
            with pytest.raises(UserError, match=r"1 of 1 texts deviate by more than 0.01 nats .* is document 0"):
                main(arguments)
        else:
            main(arguments)
    with pytest.raises(UserError, match=r"1 of 1 generated texts differ .* document 0, from its token \d on"):
        main([str(tmp_path / "r.json"), "--model", SMOLLM2, "--same-text"])


def test_files_of_another_model_are_refused(tmp_path: Path):
    model = shared("llama")
    check_model(recorded(), model)
    (document,) = recorded().documents
    other = Recorded("", 0, (*document.prompt[:-1], 97), document.text, document.evicted_at)
    for replay, says in (
        (recorded(layers=4), r"layers=4 is not allowed: the model has 3, so that the file is of another model"),
        (recorded(kv_heads=4), r"kv_heads=4 is not allowed: the model has 2"),
        (recorded(documents=(other,)), r"documents\[0\]=token 97 is not allowed: the model knows 97 tokens"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_model(replay, model)
    file = tmp_path / "r.json"
    write(file, recorded(model="owner/other-7b"))
    with pytest.raises(ConfigError, match=r"--model=smollm2-135m is not allowed: the file is of owner/other-7b"):
        main([str(file), "--model", "smollm2-135m"])
    write(file, recorded(weights="c0ffee"))
    with pytest.raises(ConfigError, match=r"weights=c0ffee is not allowed: those of .* are"):
        main([str(file), "--model", "smollm2-135m"])
    write(file, recorded())
    for arguments, says in (
        (["--model", "smollm2-135m", "--tolerance", "-1"], "--tolerance=-1.0 is not allowed"),
        (["--model", "smollm2-135m", "--backend", "fast"], "backend=fast is not allowed"),
        (["--export", "x.json"], "is a replay file already"),
    ):
        with pytest.raises(ConfigError, match=says):
            main([str(file), *arguments])
    with pytest.raises(UserError, match="the file names no model; give one with --model"):
        main([str(file)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no folder of a cell"):
        main([str(tmp_path / "empty")])


def test_a_window_of_the_model_that_contradicts_the_recording_is_refused():
    """Two of its layers keep their own windows, whatever the file says of them."""
    model = shared("gemma3")
    layers, heads, T = 3, 2, 20
    steps = torch.full((layers, heads, T), T)
    steps[1, :, :10] = 12  # the global layer
    document = Recorded("", 0, tuple(range(3, 19)), tuple(range(19, 24)), steps.int().numpy())
    with pytest.raises(UserError, match=r"layer 0 does not follow the recording, because a sliding window"):
        Replayer(model).run(document)


def test_a_cell_without_traces_says_what_to_do(runner: Runner, tmp_path: Path):  # noqa: F811
    runner.run([cell("window")])
    (stored,) = load_sweep(runner.directory)
    with pytest.raises(UserError, match="has no traces; run the cell with trace=N"):
        main([str(stored.path), "--export", str(tmp_path / "r.json")])
    assert json.loads((stored.path / "result.json").read_text())["cell"]["policy"] == "window"
