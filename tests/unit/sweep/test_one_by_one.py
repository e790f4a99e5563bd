"""Texts and rolling windows of unfinished cells: kept as they come, read by the next start, and by a larger limit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from a2sf.hf.loading import ModelSpec
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policies
from a2sf.scoring.generation.rows import RowGenerator
from a2sf.scoring.passes.run import Passes
from a2sf.store.runs import load_sweep
from a2sf.sweep.cell import Cell
from a2sf.sweep.runner import Runner
from a2sf.tasks import spec as tasks
from a2sf.tracking.tracker import Tracker, TrackerSpec
from tests.hub.build import write_model
from tests.interrupted import interrupted

COMMON = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
metadata: {{version: 1.0}}
"""
WRITES = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLS = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
QUESTIONS = [
    "What is the capital of France? It is",
    "One, two, three, four,",
    "Water boils at a temperature of",
    "The sun rises in the east and sets in the",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random model."""
    return ModelSpec(str(write_model(tmp_path_factory.mktemp("model") / "llama", tokens=1000)), device="cpu")


@pytest.fixture
def make(tmp_path, model):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"question": q, "answer": "Paris"}) for q in QUESTIONS))

    def cell(kind: str, limit: int = 4, policy: str = "h2o") -> Cell:
        file = tmp_path / f"{kind}.yaml"
        file.write_text(COMMON.format(task=f"own_{kind}", data=data) + {"writes": WRITES, "rolls": ROLLS}[kind])
        rule = find_policies()[policy]()
        budget = Budget(ratio=0.5) if rule.uses_budget else None
        return Cell("small", model, rule, budget, str(file), 0, limit, 1, tasks.DataSpec())

    return cell


@pytest.fixture
def runners(tmp_path):
    """Sweeps that know nothing of each other."""

    def new(name: str) -> Runner:
        directory = tmp_path / name / "s"
        return Runner(directory, Tracker(TrackerSpec(), "s", directory), batch_size=2)

    return new


@pytest.fixture
def batches(monkeypatch):
    """How many sequences the model was given, of each batch."""
    sizes: list[int] = []
    let_in, run = RowGenerator._let_in, Passes.run

    def texts(self, new):
        sizes.append(len(new))
        return let_in(self, new)

    def windows(self, pending):
        sizes.append(len(pending))
        return run(self, pending)

    monkeypatch.setattr(RowGenerator, "_let_in", texts)
    monkeypatch.setattr(Passes, "run", windows)
    return sizes


def stored(directory: Path) -> dict[str, tuple[object, ...]]:
    return {s.path.name: (s.metrics, s.result["scored"], s.documents.to_json()) for s in load_sweep(directory)}


@pytest.mark.parametrize(("kind", "passes"), [("writes", 1), ("rolls", 3)])
def test_the_next_start_continues_with_what_is_missing(make, runners, batches, monkeypatch, kind, passes):
    cells = [make(kind), make(kind, policy="window")]
    undisturbed = runners("undisturbed")
    assert {o.status for o in undisturbed.run(cells)} == {"done"}
    runner = runners("killed")
    kept = interrupted(runner, cells, passes, monkeypatch)
    done = sum(map(len, kept.values()))
    assert done == 2 * passes  # two sequences a pass
    batches.clear()
    assert {o.status for o in runner.run(cells)} == {"done"}
    assert sum(batches) == 2 * 4 - done
    assert stored(runner.directory) == stored(undisturbed.directory)
    assert not (runner.directory / ".checkpoints").exists()


@pytest.mark.parametrize("kind", ["writes", "rolls"])
def test_a_larger_limit_asks_for_the_new_documents_alone(make, runners, batches, kind):
    runner, complete = runners("few"), runners("whole")
    assert runner.run([make(kind, limit=2)])[0].status == complete.run([make(kind)])[0].status == "done"
    batches.clear()
    assert runner.run([make(kind)])[0].status == "done"
    assert sum(batches) == 2
    (of_all,) = [s for s in load_sweep(runner.directory) if s.cell["limit"] == 4]
    (expected,) = load_sweep(complete.directory)
    assert of_all.metrics == expected.metrics
    assert of_all.result["timing"]["reused_requests"] == 2
    assert of_all.result["scored"] == expected.result["scored"]


def test_what_is_drawn_at_random_is_kept_too(make, runners, batches, monkeypatch):
    cells = [make("writes"), make("writes", policy="window")]
    file = Path(cells[0].task)
    file.write_text(file.read_text().replace("do_sample: false", "do_sample: true, temperature: 1.0"))
    undisturbed, runner = runners("undisturbed"), runners("drawn")
    assert {o.status for o in undisturbed.run(cells)} == {"done"}
    done = sum(map(len, interrupted(runner, cells, 1, monkeypatch).values()))
    assert 0 < done < 8
    batches.clear()
    assert {o.status for o in runner.run(cells)} == {"done"}
    assert sum(batches) == 8 - done
    assert stored(runner.directory) == stored(undisturbed.directory)


def test_an_empty_text_has_a_log_likelihood_of_nought(make, runners):
    cell = make("rolls")
    data = Path(cell.task).parent / "data.jsonl"
    data.write_text("\n".join([json.dumps({"question": "", "answer": ""}), data.read_text()]))
    runner = runners("empty")
    (outcome,) = runner.run([cell])
    assert (outcome.status, outcome.error) == ("done", None)
    (stored,) = load_sweep(runner.directory)
    assert stored.documents["loglikelihoods"].iloc[0][0] == 0.0
