"""The full cache's texts under other systems: what is stored is what an independent reading of them gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.loading import ModelSpec
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policies
from a2sf.policies.schedule import Schedule
from a2sf.scoring.passes.full_cache_prefix import cached_tokens, peak_tokens
from a2sf.scoring.passes.run import Passes
from a2sf.store.runs import load_sweep
from a2sf.sweep.cell import Cell
from a2sf.sweep.runner import Runner
from a2sf.tasks.spec import DataSpec
from a2sf.tracking.tracker import Tracker, TrackerSpec
from tests.hub.build import write_model
from tests.unit.sweep.test_sweep import cell as cell_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random model: 3 layers, 2 key/value heads of 8 numbers."""
    return ModelSpec(str(write_model(tmp_path_factory.mktemp("model") / "llama", tokens=1000)), device="cpu")


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path / "s", Tracker(TrackerSpec(), "s", tmp_path / "s"))


@pytest.fixture
def cell(model):
    """Cells of short needle texts."""
    data = DataSpec(source="bundle", task_args='{"lengths": [60]}')

    def cell(policy: str = "full", **more: object) -> Cell:
        return cell_of(policy, model=model, model_name="small", task="needle", data=data, **more)

    return cell


def by_policy(directory: Path) -> dict:
    return {s.cell["policy"]: s for s in load_sweep(directory)}


def token_by_token(model, prompt: list[int], text: list[int], policy: str, budget: Budget, new: int) -> float:
    """The log-likelihood of a text, read through a bounded cache as text is generated."""
    made = find_policies()[policy]()
    cache = PrunedCache(model, made, budget if made.uses_budget else None, max_new_tokens=new)
    total, tokens = 0.0, prompt
    with torch.inference_mode():
        for target in text:
            logits = model(input_ids=torch.tensor([tokens]), cache=cache).logits[0, -1]
            total += float(logits.log_softmax(-1)[target])
            tokens = [target]
    return total


def test_texts_of_the_full_cache_are_read_under_each_system(runner: Runner, cell):
    runner.full_texts = True
    budget = Budget(tokens=48)
    cells = [cell("h2o", budget=budget, limit=2), cell(limit=2)]
    assert [o.status for o in runner.run(cells)] == ["done"] * 2
    found = by_policy(runner.directory)
    lm = runner._loaded[cells[0].model].scorers["auto"].lm
    for policy, stored in found.items():
        for row, full in zip(stored.documents.itertuples(), found["full"].documents.itertuples(), strict=True):
            text = list(full.tokens)
            assert row.full_text_tokens == len(text)
            prompt = lm.tok_encode(row.context)
            expected = token_by_token(lm.model, prompt, text, policy, budget, 32)
            assert row.full_text_loglikelihood == pytest.approx(expected, abs=2e-3)
    h2o, full = (found[p].documents for p in ("h2o", "full"))
    assert (h2o["full_text_loglikelihood"] < full["full_text_loglikelihood"]).all()
    # keys and values of 3 layers, 2 heads of 8 numbers, float32
    assert h2o["cache_bytes"].tolist() == [48 * 3 * 2 * 8 * 2 * 4] * 2
    assert full["cache_bytes"].tolist() == [
        (c[0] + len(n) - 1) * 3 * 2 * 8 * 2 * 4 for c, n in zip(full["context_tokens"], full["tokens"], strict=True)
    ]


def test_a_finished_full_cache_is_found_again(runner: Runner, cell):
    runner.run([cell(limit=2)])
    runner.full_texts = True
    runner.run([cell("window", limit=2, budget=Budget(tokens=32))])
    window = by_policy(runner.directory)["window"].documents
    assert window["full_text_loglikelihood"].notna().all()
    assert "full_text_loglikelihood" not in by_policy(runner.directory)["full"].documents


def test_without_a_full_cache_there_are_no_columns_and_a_failure_is_a_note(runner: Runner, cell, monkeypatch):
    runner.full_texts = True
    assert [o.status for o in runner.run([cell("window", limit=1)])] == ["done"]
    assert "full_text_loglikelihood" not in by_policy(runner.directory)["window"].documents

    def failing(self, pending):
        for p in pending:
            p.answers.error = RuntimeError("no memory")
        yield from ()

    monkeypatch.setattr(Passes, "run", failing)
    cells = [cell(limit=1), cell("h2o", limit=1)]
    assert [o.status for o in runner.run(cells)] == ["done"] * 2
    stored = by_policy(runner.directory)["h2o"]
    assert stored.documents["full_text_loglikelihood"].isna().all()
    assert stored.documents["generated"].notna().all()
    assert any("could not be read: no memory." in n["text"] for n in stored.notes)


@pytest.mark.parametrize(
    ("schedule", "total", "prompt", "peak"),
    [
        (Schedule(), 50, 30, 10),
        (Schedule(), 7, 5, 7),
        (Schedule("every", every=4), 50, 30, 13),
        (Schedule("prompt"), 50, 30, 30),
        (Schedule("prompt"), 90, 30, 70),
        (Schedule("prompt", then="step"), 50, 30, 30),
        (Schedule("prompt", then="step"), 50, 4, 10),
    ],
)
def test_the_peak_of_a_cache(schedule: Schedule, total: int, prompt: int, peak: int):
    """Against the largest of what is cached after each token; before the cut the complete prompt is cached."""
    kept = find_policies()["h2o"]().keeps(10)
    assert peak_tokens(kept, schedule, total, prompt) == peak
    after = [cached_tokens(kept, schedule, t, prompt) for t in range(1, total + 1)]
    before = min(total, prompt) if schedule.prompt else 0
    assert peak == max(before, *after)
