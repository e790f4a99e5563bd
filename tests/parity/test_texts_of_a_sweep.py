"""Texts of a sweep with several answers and thinking: as lm-eval's own entry gives them, and after interruptions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from a2sf.errors import ConfigError
from a2sf.store.runs import load_sweep
from a2sf.sweep.prepare.models import check_prompting
from tests.hub.build import write_model
from tests.interrupted import interrupted
from tests.own_tasks import simple_evaluate
from tests.small_cells import cell, runner

TASK = """
task: own_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 8{more}}}
filter_list:
  - {{name: first, filter: [{{function: regex, regex_pattern: "([a-z])"}}, {{function: take_first}}]}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1.0}}
repeats: {repeats}
"""
QUESTIONS = ["What is the capital of France? It is", "One, two, three, four,", "Water boils at", "The sun sets in the"]
DRAWN = ", do_sample: true, temperature: 1.0"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model") / "llama", tokens=1000))


@pytest.fixture
def task(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"question": q, "answer": "a"}) for q in QUESTIONS))

    def write(more: str = ", do_sample: false", repeats: int = 1) -> str:
        file = tmp_path / f"sums_{repeats}_{'sample' in more}_{len(more)}.yaml"  # a definition is read once
        file.write_text(TASK.format(data=data, more=more, repeats=repeats))
        return str(file)

    return write


def results(folder):
    return {s.path.name: (s.metrics, s.documents.to_json()) for s in load_sweep(folder / "s")}


def by_lm_eval(model: str, task: str, **more) -> list[list[str]]:
    found = simple_evaluate(
        "a2sf",
        model_args={"pretrained": model, "device": "cpu", "policy": "h2o", "budget_ratio": 0.5, **more},
        tasks=[task],
    )
    return [s["resps"][0] for s in sorted(found["samples"]["own_sums"], key=lambda s: s["doc_id"])]


def test_lm_evals_entry_gives_the_texts_of_a_sweep(model, task, tmp_path):
    assert [o.status for o in runner(tmp_path).run([cell(model, task())])] == ["done"]
    (stored,) = load_sweep(tmp_path / "s")
    assert by_lm_eval(model, task()) == [[t] for t in stored.documents["generated"]]
    # drawn, several of each document
    (tmp_path / "more").mkdir()
    (outcome,) = runner(tmp_path / "more").run([cell(model, task(DRAWN), samples=3)])
    assert outcome.status == "done", outcome.error
    (stored,) = load_sweep(tmp_path / "more" / "s")
    drawn = [list(t) for t in stored.documents["draws/generated"]]
    assert len({t for of in drawn for t in of}) > 6
    assert by_lm_eval(model, task(DRAWN, repeats=3)) == drawn


def test_a_group_with_four_answers_survives_interruptions(model, task, tmp_path, monkeypatch):
    drawn = '{"do_sample": true, "temperature": 1.0}'
    cells = [cell(model, task(), p, samples=4, gen_kwargs=drawn) for p in ("full", "h2o", "window")]
    (tmp_path / "whole").mkdir()
    assert {o.status for o in runner(tmp_path / "whole").run(cells)} == {"done"}
    kept: dict[str, set[str]] = {}
    for passes in (2, 3):
        for name, answers in interrupted(runner(tmp_path), cells, passes, monkeypatch).items():
            assert kept.get(name, set()) <= answers.keys()  # no finished answer is lost
            kept[name] = set(answers)
    assert sum(map(len, kept.values())) > 8
    assert {o.status for o in runner(tmp_path).run(cells)} == {"done"}
    assert results(tmp_path) == results(tmp_path / "whole")
    (full,) = [s for s in load_sweep(tmp_path / "s") if s.cell["policy"] == "full"]
    row = full.documents.iloc[0]
    assert len(row["draws/generated"]) == len(row["request_hashes"]) == len(row["draws/tokens"]) == 4
    assert row["generated"] == row["draws/generated"][0]
    values = np.stack(full.documents["draws/metric/exact_match,first"])
    assert full.metrics["exact_match,first"]["value"] == pytest.approx(values.mean())
    assert {"exact_match:avg@4,first", "exact_match:pass@2,first", "exact_match:maj@4,first"} <= full.metrics.keys()
    # a larger limit adds documents, and the same answers are taken over
    few = [cell(model, task(), "h2o", 2, samples=4, gen_kwargs=cells[0].prompting.gen_kwargs)]
    (tmp_path / "few").mkdir()
    assert {o.status for o in runner(tmp_path / "few").run(few)} == {"done"}
    assert {o.status for o in runner(tmp_path / "few").run([cells[1]])} == {"done"}
    (more,) = [s for s in load_sweep(tmp_path / "few" / "s") if s.cell["limit"] is None]
    assert more.result["timing"]["reused_requests"] == 8
    assert results(tmp_path)[more.path.name] == (more.metrics, more.documents.to_json())


def test_thinking_is_apart_and_what_was_cut_off_in_it_is_no_answer(model, task, tmp_path):
    assert [o.status for o in runner(tmp_path).run([cell(model, task())])] == ["done"]
    (plain,) = load_sweep(tmp_path / "s")
    tokens = [list(t) for t in plain.documents["tokens"]]
    end = tokens[0][2]  # ends the thinking of this text at its third token, or later
    (tmp_path / "thinks").mkdir()
    (outcome,) = runner(tmp_path / "thinks").run([cell(model, task(), think_end_token=str(end))])
    assert outcome.status == "done", outcome.error
    (thinks,) = load_sweep(tmp_path / "thinks" / "s")
    documents = thinks.documents
    first = documents.iloc[0]
    at = len(tokens[0]) - tokens[0][::-1].index(end)
    assert (list(first["tokens"])[:at], first["thinking_tokens"]) == (tokens[0][:at], at)
    assert first["thinking"]
    for _, row in documents.iterrows():
        if end not in list(row["tokens"]):
            assert (row["finish"], row["generated"], bool(row["ended"])) == ("thinking", "", False)
            assert row["thinking_tokens"] == len(row["tokens"])
    assert "thinking" in set(documents["finish"])
    assert by_lm_eval(model, task(), think_end_token=end) == [[t] for t in documents["generated"]]
    with pytest.raises(
        ConfigError, match="think_end_token='</thought>' is not allowed: the tokenizer has no such token"
    ):
        check_prompting([cell(model, task(), think_end_token="</thought>")], hub=False)  # before a model is loaded
