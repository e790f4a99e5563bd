"""Mistakes in a task's file that lm-eval accepts: each is one sentence before anything is scored."""

from __future__ import annotations

import dataclasses
import json

import pytest
from rich.console import Console

from a2sf.compat.lm_eval import METRICS, OF_EACH_DOCUMENT
from a2sf.errors import ConfigError, UserError
from a2sf.sweep.prepare import documents
from a2sf.sweep.stopping_rule import StoppingRule
from a2sf.tasks import checks
from a2sf.tasks.spec import DataSpec, TaskSpec
from tests.unit.sweep.test_sweep import cell

FILE = {
    "output_type": "multiple_choice",
    "doc_to_text": '"{{goal}}"',
    "doc_to_target": "label",
    "doc_to_choice": '"{{[sol1, sol2]}}"',
    "metric_list": "[{metric: acc}]",
}
TEXT = {"output_type": "generate_until", "doc_to_target": "sol1", "doc_to_choice": "null"}
REGISTERS = """
from lm_eval.api.registry import register_aggregation, register_metric

@register_aggregation("mine_mean")
def mean(items):
    return sum(items) / len(items)

@register_metric(metric="mine", higher_is_better=True, aggregation="mine_mean", output_type="generate_until")
def mine(items):
    return items

def same(documents):
    return documents
"""
CODE = """
def length(predictions, references):
    return len(predictions[0])

def results(doc, results):
    return {"right": 1.0, "many": 3, "text": "x"}

def longer(documents):
    return documents.map(lambda d: {"made": d["goal"] + "?"})
"""


def own(folder, name="odd", rows=({}, {}), **changed) -> TaskSpec:
    """A task of a user's own; `rows` change its documents."""
    made = [{"goal": f"q{i}", "sol1": f"a{i}", "sol2": "no", "label": i % 2, **row} for i, row in enumerate(rows)]
    (folder / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    (folder / "code.py").write_text(CODE)
    (folder / "registers.py").write_text(REGISTERS)
    lines = [f"task: {name}", "dataset_path: json", f"dataset_kwargs: {{data_files: {{test: {folder}/d.jsonl}}}}"]
    lines += ["test_split: test", *(f"{k}: {v}" for k, v in {**FILE, **changed}.items())]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    return TaskSpec(str(folder / f"{name}.yaml"))


def how(metric):
    return f"[{{metric: {metric}, aggregation: mean, higher_is_better: true}}]"


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"metric_list": "[{metric: accu}]"}, ["metric_list=accu", "odd is a task of multiple_choice", "mean acc"]),
        ({"metric_list": how("accu")}, ["metric_list=accu", "computes acc, acc_norm"]),
        ({"metric_list": how("bleu")}, ["metric_list=bleu"]),
        ({"metric_list": how("!function code.length")}, ["code.length", "computes acc"]),
        ({"metric_list": "[acc, accu]"}, ["metric_list=accu"]),
        (TEXT | {"metric_list": "[{metric: exact_mach}]"}, ["metric_list=exact_mach", "mean exact_match"]),
        (TEXT | {"metric_list": how("exact_mach")}, ["metric_list=exact_mach", "mean exact_match"]),
        ({"metric_list": "[{metric: acc, aggregation: meen}]"}, ["aggregation=meen", "did you mean mean"]),
        (
            TEXT | {"metric_list": how("exact_match"), "filter_list": "[{name: x, filter: [{function: take_frist}]}]"},
            ["filter_list=take_frist", "take_first"],
        ),
        ({"doc_to_text": "qestion"}, ["doc_to_text=qestion", "goal, sol1, sol2, label", "{{'qestion'}}"]),
        ({"doc_to_target": "lable"}, ["doc_to_target=lable", "did you mean label"]),
        (TEXT | {"doc_to_target": "sol9", "metric_list": how("exact_match")}, ["doc_to_target=sol9"]),
        ({"doc_to_choice": "chioces"}, ["doc_to_choice=chioces", "goal, sol1, sol2, label"]),
        (
            {"fewshot_split": "test", "fewshot_config": "{doc_to_text: qestion}"},
            ["doc_to_text=qestion"],
        ),
    ],
    ids=str,
)
def test_what_would_give_no_numbers_or_wrong_ones_is_refused(tmp_path, changed, parts):
    spec = dataclasses.replace(own(tmp_path, **changed), shots=1 if "fewshot_config" in changed else 0)
    with pytest.raises(ConfigError) as raised:
        spec.build(1)
    assert "\n" not in str(raised.value)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"metric_list": "null"},
        {"metric_list": "[{metric: acc}, {metric: acc_mutual_info}, {metric: brier_score}]"},
        {"doc_to_text": '""'},
        {"doc_to_text": '"Answer:"'},
        {"doc_to_text": "\"{{'qestion'}}\""},
        {"doc_to_text": "made", "process_docs": "!function code.longer"},
        {"doc_to_target": "no"},  # a choice
        {"doc_to_target": "anything", "process_results": "!function code.results", "metric_list": how("right")},
        TEXT | {"metric_list": how("!function code.length")},
        TEXT | {"metric_list": "[{metric: mine}]", "process_docs": "!function registers.same"},  # its code registers it
    ],
    ids=str,
)
def test_what_lm_eval_can_use_is_accepted(tmp_path, changed):
    spec = own(tmp_path, **changed)
    spec.check()
    assert len(spec.build(1).eval_docs) == 2


@pytest.mark.parametrize("kind", METRICS)
def test_the_metrics_are_those_that_lm_eval_computes(tmp_path, kind):
    named = ", ".join(f"{{metric: {m}, aggregation: mean, higher_is_better: true}}" for m in METRICS[kind])
    changed = {} if kind == "multiple_choice" else {"doc_to_target": "sol1", "doc_to_choice": "null"}
    task = own(tmp_path, output_type=kind, metric_list=f"[{named}]", **changed).build(1)
    task.build_all_requests(samples=[0])
    answers = [-1.0 if kind == "loglikelihood_rolling" else (-1.0 - i, True) for i in range(len(task.instances))]
    made = task.process_results(task.eval_docs[0], answers)
    assert set(made) == set(METRICS[kind])
    assert set(checks.of_each(made)) == set(METRICS[kind]) & set(OF_EACH_DOCUMENT)


@pytest.mark.parametrize("task", ["piqa", "lambada_openai"])
def test_stopping_by_a_metric_that_a_task_has_not_is_refused_first(task):
    rule = StoppingRule(("full", "window"), metric="f2")
    with pytest.raises(ConfigError, match=rf"early_stopping.metric=f2 is not allowed: {task} has acc.* of each"):
        documents.check([cell("full", task=task, data=DataSpec(), stopping_rule=rule)])
    documents.check([cell("full", task=task, data=DataSpec(), stopping_rule=StoppingRule(rule.pair))])


@pytest.mark.parametrize("metric", ["many", "text", "acc"])
def test_stopping_by_a_metric_of_a_function_is_refused_with_the_documents(tmp_path, metric):
    """The file does not show what the function gives; the first document does."""
    spec = own(tmp_path, process_results="!function code.results", metric_list=how("right"))
    made = dataclasses.replace(cell("full", task=spec.ref), data=DataSpec(), limit=2)
    one, other = (
        dataclasses.replace(made, stopping_rule=StoppingRule(("full", "window"), metric=m)) for m in ("right", metric)
    )
    documents.check([one, other])
    documents.check_stopping([one])
    assert documents.fetch([one], [one], {}, Console(quiet=True)) == [one]
    with pytest.raises(ConfigError, match=rf"early_stopping.metric={metric} .* odd has right of each document"):
        documents.check_stopping([one, other])  # before the plan, as they are here
    with pytest.raises(ConfigError, match=rf"early_stopping.metric={metric} .* odd has right of each document"):
        documents.fetch([other], [other], {}, Console(quiet=True))


@pytest.mark.parametrize("kind", ["multiple_choice", "loglikelihood"])
def test_documents_without_a_label_are_refused_with_the_field(tmp_path, kind):
    changed = {} if kind == "multiple_choice" else {"doc_to_choice": "null"}
    spec = own(tmp_path, rows=[{}, {}, {"label": None}], output_type=kind, **changed)
    some, every = (dataclasses.replace(cell("full", task=spec.ref), data=DataSpec(), limit=n) for n in (2, 3))
    assert documents.fetch([some], [some], {}, Console(quiet=True)) == [some]
    with pytest.raises(UserError, match=r"tasks=odd: the field label \(doc_to_target\) .* the first is number 2"):
        documents.fetch([every], [every], {}, Console(quiet=True))


def test_metrics_that_fail_name_the_field_that_is_null(tmp_path):
    task = own(tmp_path, rows=[{"label": None}, {}]).build(1)
    with pytest.raises(UserError, match="it has no label"):
        task.process_results(task.eval_docs[0], [(-1.0, False), (-2.0, False)])
