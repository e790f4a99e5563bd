"""Conversations of a sweep: as lm-eval's own entry gives them, after interruptions, with a chat template."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from a2sf.errors import ConfigError
from a2sf.hf.loading import ModelSpec, load
from a2sf.scoring.lm import PrunedLM
from a2sf.scoring.requests import TEXT, Requests
from a2sf.store.runs import load_sweep
from a2sf.tasks import spec as tasks
from a2sf.tasks.prompting import Prompting
from a2sf.tasks.turns import NEXT
from tests.hub.build import write_model
from tests.interrupted import interrupted
from tests.own_tasks import simple_evaluate
from tests.small_cells import cell, runner

TASK = """
task: own_talks
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}} {{{{questions | join('<|next turn|>')}}}}"
doc_to_target: "{{{{questions | length}}}}"
process_results: !function utils.process_results
generation_kwargs: {{until: ["\\n\\n"], do_sample: false, max_gen_toks: 4, turns: 3}}
metric_list:
  - {{metric: even, aggregation: mean, higher_is_better: true}}
  - {{metric: answers, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0, shared_context: context}}
"""
UTILS = """
def process_results(doc, results):
    (texts,) = results
    assert len(texts) == len(doc["questions"]) and all(isinstance(t, str) for t in texts)
    return {"even": sum(len(t) % 2 == 0 for t in texts) / len(texts), "answers": len(texts)}
"""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = "It rained for three days, and the river rose to the lower road."
DOCUMENTS = [
    ["What rose?", " How long did it rain?", " Why?"],
    ["What rained?"],
    ["How far?", " And then?"],
    ["Why?", "?"],
]
COLUMNS = ["generated", "tokens", "turns", "finish", "metric/even", "metric/answers"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model") / "llama", tokens=1000))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps({"context": CONTEXT, "questions": q}) for q in DOCUMENTS))
    (folder / "utils.py").write_text(UTILS)
    (folder / "own_talks.yaml").write_text(TASK.format(data=data))
    return str(folder / "own_talks.yaml")


def plain(documents: pd.DataFrame) -> list[dict]:
    return json.loads(documents[COLUMNS].to_json(orient="records"))


def test_a_kill_loses_no_finished_conversation(model, task, tmp_path, monkeypatch):
    cells = [cell(model, task, p) for p in ("full", "h2o")]
    kept: dict[str, set[str]] = {}
    for passes in (1, 2):
        for name, answers in interrupted(runner(tmp_path, batch_size=3), cells, passes, monkeypatch).items():
            assert kept.get(name, set()) <= answers.keys()
            kept[name] = set(answers)
    assert 0 < sum(map(len, kept.values())) < 2 * len(DOCUMENTS)
    outcomes = runner(tmp_path, batch_size=3).run(cells)
    assert [o.status for o in outcomes] == ["done"] * 2, [o.error for o in outcomes]
    (tmp_path / "undisturbed").mkdir()
    assert {o.status for o in runner(tmp_path / "whole", batch_size=3).run(cells)} == {"done"}
    resumed, undisturbed = (
        {s.path.name: plain(s.documents) for s in load_sweep(f / "s")} for f in (tmp_path, tmp_path / "whole")
    )
    assert resumed == undisturbed
    (stored,) = [s for s in load_sweep(tmp_path / "s") if s.cell["policy"] == "h2o"]
    documents = stored.documents
    assert [len(t) for t in documents["turns"]] == [len(q) for q in DOCUMENTS]
    assert [sum(t) for t in documents["turns"]] == [len(t) for t in documents["tokens"]]
    assert list(documents["metric/answers"]) == [len(q) for q in DOCUMENTS]
    assert stored.metrics["even"]["value"] == pytest.approx(np.mean(documents["metric/even"]))


@pytest.mark.full
def test_lm_evals_entry_gives_the_texts_and_scores_of_a_sweep(model, task, tmp_path):
    assert [o.status for o in runner(tmp_path, batch_size=3).run([cell(model, task)])] == ["done"]
    (stored,) = load_sweep(tmp_path / "s")
    found = simple_evaluate(
        "a2sf",
        model_args={"pretrained": model, "device": "cpu", "policy": "h2o", "budget_ratio": 0.5},
        tasks=[task],
    )
    samples = sorted(found["samples"]["own_talks"], key=lambda s: s["doc_id"])
    assert [s["resps"][0][0] for s in samples] == [t.split(NEXT) for t in stored.documents["generated"]]
    assert found["results"]["own_talks"]["even,none"] == pytest.approx(stored.metrics["even"]["value"])


def test_with_a_chat_template_each_question_is_a_message(model, task):
    loaded = load(ModelSpec(model, device="cpu"))
    lm = PrunedLM(loaded.model, tokenizer=loaded.tokenizer)
    lm.tokenizer.chat_template = CHATML
    made = tasks.TaskSpec(task).build(0)
    requests = Requests(lm, TEXT, made.make_requests(lm, Prompting(chat_template=True), None))
    texts = [f"{CONTEXT} {DOCUMENTS[0][0]}", *DOCUMENTS[0][1:]]
    chat = [{"role": "user", "content": texts[0]}]
    prompt = requests.prompt(0)
    assert prompt.text == lm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    chat += [{"role": "assistant", "content": "So."}, {"role": "user", "content": texts[1]}]
    conversation = lm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert conversation == f"{prompt.text}So.{prompt.later[0].text}"
    assert lm.tok_encode(conversation) == [*prompt.tokens, *lm.tok_encode("So."), *prompt.later[0].tokens]
    assert all(q.closes for q in prompt.later)  # with the token that ends a message
    assert [q.text.count("user") for q in prompt.later] == [1, 1]


def test_examples_are_refused_before_anything_is_read(task):
    with pytest.raises(ConfigError, match="shots=2 is not allowed: own_talks is a conversation"):
        tasks.TaskSpec(task, shots=2).check()
