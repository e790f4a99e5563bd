"""Calibration: what an error is, who gets slots; the command finishes, continues where it stopped and writes a policy."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from a2sf import Budget, attend, make_policy
from a2sf.analysis.results.labels import name_settings, shorten_names
from a2sf.calibration import grid, run
from a2sf.calibration.allocate import allocate_budget
from a2sf.calibration.capture import Captured, capture, projections
from a2sf.calibration.end_to_end import HeldOut
from a2sf.calibration.local import HeadAtRatio, errors
from a2sf.calibration.texts import WHEEL, PlainText, passages, read_text
from a2sf.commands.policy import calibrate
from a2sf.engine.state import Options
from a2sf.errors import ConfigError, UserError
from a2sf.policies.rule import Head
from a2sf.shipped import shipped
from a2sf.tasks.spec import SUITES
from tests.hub.build import write_model
from tests.models import NO_SDPA, small

FEW = (
    grid.PAPER,
    grid.H2O,
    Head(forgetting_factor=0.7, recent_share=0.25),
    Head(mean_over_age=True, recent_share=0.5, sinks=2),
)


# what is measured


def layer(seed: int, tokens: int = 20) -> Captured:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, tokens, 8, generator=g) for n in (4, 2, 2))
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return Captured(0, q, k, v, Options(8**-0.5), full)


def test_an_error_is_that_of_the_policy_after_the_projection():
    """The oracle: each policy by itself, its output projected at once."""
    seen, projection = layer(0), torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
    ratios = (0.2, 0.55)
    found = errors(seen, projection, [HeadAtRatio(head, ratio) for head in FEW for ratio in ratios])
    own = (seen.output[0].transpose(0, 1).flatten(1) @ projection).square().sum()
    for at, (head, ratio) in enumerate((h, r) for h in FEW for r in ratios):
        settings_ = {"recent_share": head.recent_share, "sinks": head.sinks}
        name = "mean_attention" if head.mean_over_age else "a2sf"
        policy = make_policy(name, forgetting_factor=head.forgetting_factor, **settings_)
        budget = Budget(ratio=ratio).slots(total=20, context=20, layer=0)
        output, _ = attend(policy, seen.query, seen.key, seen.value, budget=budget, backend="reference")
        lost = output[0] - seen.output[0]
        assert found[at, -1] == pytest.approx(
            float((lost.transpose(0, 1).flatten(1) @ projection).square().sum() / own), rel=1e-4
        )
        for kv in range(2):
            alone = torch.zeros_like(lost)
            alone[2 * kv : 2 * kv + 2] = lost[2 * kv : 2 * kv + 2]
            expected = float((alone.transpose(0, 1).flatten(1) @ projection).square().sum() / own)
            assert found[at, kv] == pytest.approx(expected, rel=1e-4)
    assert errors(seen, projection, [HeadAtRatio(FEW[0], 1.0)]).max() < 1e-10


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox", *NO_SDPA])
def test_every_layer_is_seen_and_its_projection_found(kind):
    no_windows = {"layer_types": ["full_attention"] * 3} if kind in NO_SDPA else {}
    model, seen = small(kind, **no_windows), []
    logits = capture(model, range(5, 25), seen.append, last=3)
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(torch.arange(5, 25)[None]).logits[0, -3:], atol=1e-4, rtol=1e-3)
    assert [x.number for x in seen] == sorted(projections(model))
    for x in seen:
        assert projections(model)[x.number].shape == (x.output.shape[1] * x.output.shape[3], 32)


def test_the_change_end_to_end_is_nothing_at_a_full_budget_and_the_models_own_below():
    model, ids = small("llama"), tuple(torch.randint(3, 97, (30,), generator=torch.Generator().manual_seed(0)).tolist())
    held_out, policy = HeldOut(model, [ids]), make_policy("h2o")
    assert held_out.change(policy, [1.0], 0) == pytest.approx(0, abs=1e-3)
    from a2sf import pruning

    with torch.inference_mode():
        own = model(torch.tensor([ids[:-1]])).logits[0]
        with pruning(model, policy, Budget(ratio=0.2)):
            pruned = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
    lost = (pruned.log_softmax(-1) - own.log_softmax(-1)).gather(-1, torch.tensor(ids[1:])[:, None]).abs().sum()
    assert held_out.change(policy, [0.2], 0) == pytest.approx(float(lost), rel=1e-3)
    assert held_out.change(policy, [0.2, 1.0], 0) == pytest.approx(float(lost) / 2, rel=1e-3)
    some = [held_out.change(policy, [0.2], 0, only=layer) for layer in range(3)]
    assert 0 < min(some) < max(some) < 2 * float(lost)


# slots


@settings(max_examples=50, deadline=None)
@given(data=st.data(), n=st.integers(1, 6))
def test_slots_go_to_whom_they_help_most(data, n):
    multiples = (0.25, 0.5, 1.0, 1.5, 3.0)
    numbers = st.lists(st.floats(0, 5), min_size=5, max_size=5)
    curves = np.array([data.draw(numbers) for _ in range(n)])
    shares = allocate_budget(curves, multiples)
    assert shares.mean() == pytest.approx(1)
    assert shares.min() >= 0.25 - 1e-9
    assert shares.max() <= 3 + 1e-9


def test_slots_of_two_against_all_ways_to_share_them():
    multiples = np.array([0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75])
    curves = np.array([2.0 / multiples, 0.1 / multiples])
    a, b = allocate_budget(curves, multiples)

    def total(a: float) -> float:
        return sum(np.interp(x, multiples, c) for x, c in zip((a, 2 - a), curves, strict=True))

    best = min(total(x) for x in np.arange(0.25, 1.7501, 0.05))
    assert total(a) == pytest.approx(best)
    assert a > 1.4 > 0.6 > b
    np.testing.assert_allclose(allocate_budget(np.ones((3, 7)), multiples).mean(), 1)
    with pytest.raises(ValueError, match="ascend around 1"):
        allocate_budget(curves, multiples[::-1])


# texts


def test_what_is_calibrated_on_is_scored_by_no_preset():
    files = [yaml.safe_load(f.read_text()) for f in (shipped("conf") / "sweep").glob("*.yaml")]
    presets = [file["tasks"] for file in files if "tasks" in file]  # others take those of the preset they are built on
    assert len(presets) > len(files) / 2
    scored = {t for p in presets for t in ([p] if isinstance(p, str) else p)} | {t for s in SUITES.values() for t in s}
    assert not scored & set(WHEEL)
    assert {"piqa", "needle"} <= scored
    text = read_text()
    assert len(text.pieces) > 3000
    assert text.digest == read_text().digest


def test_no_piece_is_in_two_passages():
    text = PlainText("numbers", tuple(f"{i} {i} {i} {i}" for i in range(200)))

    def tokenizer(joined: str) -> dict[str, list[int]]:
        return {"input_ids": [int(n) for n in joined.split()]}

    cut = passages(text, tokenizer, (5, 11), 30, 20, seed=1)
    assert [len(p) for p in cut.local] == [5, 11, 5, 11]
    every = [set(p) for p in (*cut.local, *cut.held_out)]
    assert sum(map(len, every)) == len(set().union(*every))
    assert (
        passages(text, tokenizer, (5, 11), 30, 20, seed=1) == cut != passages(text, tokenizer, (5, 11), 30, 20, seed=2)
    )
    with pytest.raises(UserError, match=r"numbers is too short: .* fewer --tokens"):
        passages(text, tokenizer, (5, 11), 30, 5000, seed=1)


# the command


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


def calibrated(model: Path, *more: str) -> None:
    arguments = ["--model", str(model), "--tokens", "60", "--held-out", "60", "--lengths", "24", "36", "--top", "1"]
    calibrate.main([*arguments, "--out", "mine.yaml", *more])


def test_the_command_writes_a_policy_and_continues_where_it_stopped(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "settings", lambda: FEW)
    monkeypatch.setattr(grid, "settings", lambda: FEW)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(read_text().pieces[:40]))
    arguments = ("--budget", "0.2", "0.3", "--per", "head", "--shares", "--text", str(text), "--name", "two")
    # killed after a few passages: what was measured is kept
    real, left = HeldOut.change, iter(range(3))

    def killed(*given: object) -> float:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(HeldOut, "change", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, *arguments)
    monkeypatch.setattr(HeldOut, "change", real)
    seen = []
    monkeypatch.setattr(run, "capture", lambda *given: seen.append(1) or capture(*given))
    calibrated(model, *arguments)
    stopped, went_on = Path("mine.yaml").read_text(), len(seen)
    calibrated(model, *arguments)
    assert Path("mine.yaml").read_text() == stopped
    assert went_on == 2 == len(seen)  # the slots' pass over two passages; the third time nothing is measured
    made = yaml.safe_load(stopped)
    assert made["name"] == "two"
    assert made["made"]["text"] == {"source": "text.txt", "digest": read_text(text).digest}
    assert made["made"]["budgets"] == [0.2, 0.3]
    assert made["made"]["change"] == min(t["change"] for t in made["made"]["tried"])
    assert [t["name"] for t in made["made"]["tried"][:2]] == [f"all layers: {grid.describe(h)}" for h in FEW[:2]]
    policy = make_policy("calibrated", file="mine.yaml")
    policy.check(3, 2)
    assert sum(policy.layer_budget(10, i, 3) for i in range(3)) == 30
    rows = list(csv.DictReader(Path("mine.errors.csv").read_text().splitlines()))
    assert len(rows) == 3 * 2 * 4 * 3
    assert "Score it with: a2sf run policy=calibrated policy.file=mine.yaml" in capsys.readouterr().out

    # from nothing, it comes to the same
    for file in Path("runs/calibrated/.partial").iterdir():
        file.unlink()
    calibrated(model, *arguments)
    assert Path("mine.yaml").read_text() == stopped


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--per", "heads"], r"--per=heads is not allowed: give one of model, layer, head \(did you mean head"),
        (["--budget", "1.0"], "--budget=1.0 is not allowed: give shares of a sequence's tokens, above 0 and below 1"),
        (["--lengths", "3"], "--lengths=3 is not allowed: give passages of at least 16 tokens"),
        (["--held-out", "0"], "--held-out=0 is not allowed: give a whole number, at least 1"),
        (["--text", "nowhere.txt"], "--text=nowhere.txt is not allowed: it cannot be read"),
        (["--model", "no/such/model.gguf"], "model.path=no/such/model.gguf"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(arguments, message):
    with pytest.raises(ConfigError, match=message):
        calibrate.main(arguments)


def test_tables_call_a_file_by_its_name():
    import pandas as pd

    def stated(name: str) -> str:
        policy = make_policy("calibrated", file={"name": name, "layers": [{"sinks": 1}]})
        return json.dumps({"file": policy.file})

    frame = pd.DataFrame(
        {
            "policy": "calibrated",
            "label": "Calibrated",
            "settings": [stated("layer 0.2"), stated("head 0.2"), json.dumps({"file": [[0, i] for i in range(40)]})],
            "variant": "",
            "is_full": False,
            "schedule": "step",
        }
    )
    labels = name_settings(frame)["label"].tolist()
    assert labels[:2] == ["Calibrated (layer 0.2)", "Calibrated (head 0.2)"]
    assert len(labels[2]) < 40


def test_one_name_at_several_budgets_is_one_system_and_never_two_at_one():
    """A file for each budget is one line of a plot; two contents of one name at one budget stay two systems."""
    import pandas as pd

    def stated(name: str, sinks: int) -> str:
        policy = make_policy("calibrated", file={"name": name, "layers": [{"sinks": sinks}]})
        return json.dumps({"file": policy.file}, sort_keys=True)

    rows = [("a", 1, "0.1"), ("a", 2, "0.2"), ("b", 1, "0.1"), ("b", 2, "0.1")]
    frame = pd.DataFrame(
        {"policy": "calibrated", "budget": b, "task": "piqa", "settings": stated(name, sinks)}
        for name, sinks, b in rows
    )
    given = frame["settings"].tolist()
    found = shorten_names(frame, ["policy", "settings", "budget", "task"])["settings"].tolist()
    assert found[0] == found[1] == json.dumps({"file": {"name": "a"}})
    assert found[2:] == given[2:]
