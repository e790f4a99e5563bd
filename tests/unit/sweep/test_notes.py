"""What a number hides: documents that cannot be right, prompts that are cut, warnings of libraries. Each is said."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import warning_once

from a2sf.analysis.results.selection import Selection
from a2sf.errors import ConfigError, Notice
from a2sf.hf.loading import ModelSpec, load
from a2sf.hf.warned import Warned
from a2sf.policies.base import Policy, Retention
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policies
from a2sf.policies.prepared import LayerRead, Prepared, Reader
from a2sf.policies.rule import Rule, Step
from a2sf.policies.schedule import STEP, Schedule
from a2sf.report.output import TableOptions, show
from a2sf.scoring.lm import PrunedLM
from a2sf.store.notes import notes_of
from a2sf.store.runs import write_cell
from a2sf.sweep.cell import Cell
from a2sf.sweep.group import CellGroup
from a2sf.tasks import spec as tasks
from a2sf.tasks.prompting import Prompting
from a2sf.tasks.spec import DataSpec
from a2sf.tasks.warned import collected
from baselines.kvzip import KVzip
from baselines.simlayerkv import SimLayerKV
from tests.hub.build import write_model

YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{goal}}}}"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
{more}
"""
GOOD = {"goal": "Which one?", "choices": ["this", "that"], "label": 1}
UTILS = """
import logging, warnings
import numpy as np
from lm_eval.utils import warning_once

log = logging.getLogger("lm_eval.tasks.ours")

def text(doc):
    warning_once(log, "a prompt is odd")
    return doc["goal"]

def results(doc, answers):
    log.warning(f"the answer of {doc['number']} is odd\\nand more")
    log.info("nothing")
    warnings.warn("ill-defined", RuntimeWarning)
    warnings.warn("old", DeprecationWarning)
    return {"acc": 1.0, **({"part": 1.0} if doc["number"] else {}), "lost": float("nan")}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load(ModelSpec(str(folder), device="cpu"))


def task(folder: Path, rows: list[dict], more: str = "", name: str = "odd") -> Path:
    (folder / f"{name}.jsonl").write_text(
        "".join(json.dumps(GOOD | r | {"number": i}) + "\n" for i, r in enumerate(rows))
    )
    file = folder / f"{name}.yaml"
    file.write_text(YAML.format(name=name, folder=folder, more=more))
    return file


@pytest.fixture
def computed(folder, loaded, tmp_path):
    """Results of the full cache and of H2O on a task, computed as a group."""

    def compute(file: Path, *others: Policy, schedule: Schedule = STEP, **more):
        lm = PrunedLM(loaded.model, tokenizer=loaded.tokenizer, **more)
        known = find_policies()
        ways = {known["full"](): None, known["h2o"](): Budget(ratio=0.5)} | dict.fromkeys(others, Budget(ratio=0.25))
        cells = [
            Cell(
                "m", ModelSpec(str(folder)), p, b, str(file), 0, None, 0, DataSpec(), schedule=schedule if b else STEP
            ).with_content()
            for p, b in ways.items()
        ]
        made = list(CellGroup(cells, lm.scorer, tmp_path / "runs" / "s").compute())
        assert len(made) == len(cells) > 0
        return made

    return compute


def texts(made) -> list[list[str]]:
    assert [c.error for c in made] == [None] * len(made)
    return [[n["text"] for n in c.result.get("notes", [])] for c in made]


def test_good_documents_need_no_note(computed, tmp_path):
    assert texts(computed(task(tmp_path, [{}, {"label": 0}]))) == [[], []]


NONE = "the right answer is none of the choices"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{}, {"label": -1}, {"label": 2}, {}], f"odd: in 2 of 4 documents (documents 1, 2), {NONE}"),
        ([{"label": "these"}, {"label": "this"}], f"odd: in 1 of 2 documents (document 0), {NONE}"),
        ([{"label": -2 + 1}] * 5, f"odd: in 5 of 5 documents (documents 0, 1, 2, …), {NONE}"),
        ([{}, {"choices": ["", "x"]}], "odd: in 1 of 2 documents (document 1), a choice is empty"),
        ([{}, {"choices": ["x", "x"]}], "odd: in 1 of 2 documents (document 1), a choice before the right one has the same"),
        ([{}, {"goal": None}], "odd: in 1 of 2 documents (document 1), goal is null, which the prompt shows as None"),
        ([{"goal": "so " * 3000}, {}], "odd: in 1 of 2 documents (document 0), the prompt is too long for the model's 2048"),
    ],
    ids=["outside", "text", "all", "empty", "twice", "null", "long"],
)  # fmt: skip
def test_documents_that_cannot_be_right_are_counted_and_named(computed, tmp_path, rows, said):
    for of_cell in texts(computed(task(tmp_path, rows))):
        (note,) = of_cell
        assert note.startswith(said)


def test_a_token_across_the_end_of_the_prompt_is_lm_evals_and_reported(computed, loaded, tmp_path):
    rows = [{"goal": "An examp", "choices": ["le is here", "le of it"]}, {}]
    file = task(tmp_path, rows, 'target_delimiter: ""')
    full, h2o = computed(file)
    for of_cell in texts([full, h2o]):
        assert "odd: in 1 of 2 documents (document 0), the tokens of prompt and continuation together" in of_cell[0]
    built = tasks.TaskSpec(str(file), DataSpec()).build(0)
    theirs = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=2)
    samples = lm_eval.evaluate(theirs, task_dict={"tasks": {"odd": built}}, bootstrap_iters=0)["samples"]["odd"]
    expected = [a[0] for s in sorted(samples, key=lambda s: s["doc_id"]) for a in s["filtered_resps"]]
    assert [x for row in full.documents["loglikelihoods"] for x in row] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("goal", "choice"), [("An examp", "le"), ("", ""), ("Which", "")])
def test_where_nothing_is_left_to_score_task_and_document_are_reported(computed, tmp_path, goal, choice):
    made = computed(task(tmp_path, [{}, {"goal": goal, "choices": [choice, "x"]}], 'target_delimiter: ""'))
    for cell in made:
        assert "task odd, document 1: a request has no token of continuation of its own" in str(cell.error)


@pytest.fixture
def odd(tmp_path):
    """A task whose code warns."""
    (tmp_path / "utils.py").write_text(UTILS)
    more = "process_results: !function utils.results\ndoc_to_text: !function utils.text"
    file = task(tmp_path, [{}, {}, {}], more)
    metrics = "[{metric: acc, aggregation: mean, higher_is_better: true}"
    named = [f"{{metric: {m}, aggregation: mean, higher_is_better: true}}" for m in ("part", "lost")]
    file.write_text(
        file.read_text().replace('doc_to_text: "{{goal}}"\n', "").replace(metrics, ", ".join([metrics, *named]))
    )
    return file


def test_warnings_of_libraries_are_collected_and_counted(computed, odd, tmp_path, capsys):
    lines = {
        "lm_eval warns: a prompt is odd": 1,  # lm-eval says it once while the task and its prompts are made
        "odd: the metric lost came out as nan, so that results have no value of it.": None,
        "lm_eval warns: the answer of 0 is odd": 3,
        "RuntimeWarning warns: ill-defined": 3,
    }
    made = computed(odd)
    for cell in made:  # what was said of the prompts, which are made once, is of all cells
        notes = {n["text"]: n.get("times") for n in cell.result["notes"]}
        counts = [text for text in notes if "not scored on the same number of documents" in text]
        assert {text: n for text, n in notes.items() if text not in counts} == lines, cell.cell.name
        assert len(counts) == 1
        assert {m: v["n"] for m, v in cell.result["metrics"].items()} == {"acc": 3, "part": 2, "lost": 3}
        assert cell.result["metrics"]["lost"]["value"] is None
    out = capsys.readouterr()
    assert "odd" not in out.out + out.err
    stored = [write_cell(tmp_path / "s" / c.cell.name, c.result, c.documents, "") for c in made]
    assert f"lm_eval warns: the answer of 0 is odd (In 2 cells, 6 times, {made[0].cell.name} the first.)" in notes_of(
        stored
    )
    shown = show([tmp_path / "s"], Selection(), TableOptions(plots=False))
    assert set(notes_of(stored)) <= set(shown.notes)
    report = (tmp_path / "s" / "report.html").read_text()
    assert all(text.partition("(")[0] in report for text in notes_of(stored))


def test_a_document_at_which_metrics_fail_is_shown(computed, tmp_path):
    for cell in computed(task(tmp_path, [{}, {"label": -5, "goal": "Which of them?"}])):
        assert str(cell.error).startswith("tasks=odd: its metrics fail at a document (IndexError: ")
        assert "Which of them?" in str(cell.error)


def test_metrics_that_fail_at_all_answers_are_named(computed, tmp_path):
    """lm-eval's Brier score needs as many choices in each document."""
    more = "metric_list: [{metric: acc}, {metric: brier_score}]"
    for cell in computed(task(tmp_path, [{}, {"choices": ["this one", "that one", "both"]}], more)):
        assert str(cell.error).startswith(
            "tasks=odd: its metrics (acc, brier_score) fail at the answers of all documents"
        )


def test_collecting_leaves_everything_as_it_was(capsys):
    log, before = logging.getLogger("transformers"), {}
    for name in ("lm_eval", "transformers", "datasets"):
        of = logging.getLogger(name)
        before[name] = (of.level, list(of.handlers), of.propagate)
    filters = list(warnings.filters)
    with collected() as outer:
        log.warning("outer 1")
        with collected() as inner:
            log.warning_once("inner")
        log.warning("outer 2")  # the same but for a digit
        with collected(Warned()) as again:
            log.warning_once("inner")
            warning_once(logging.getLogger("lm_eval"), "Prompts lose their beginning.")  # which we say ourselves
        with pytest.warns(Notice, match="at once"):
            warnings.warn("at once", Notice, stacklevel=1)
    assert outer.notes == [{"text": "transformers warns: outer 1", "times": 2}]
    assert inner.notes == again.notes == [{"text": "transformers warns: inner", "times": 1}]
    for name, (level, handlers, propagate) in before.items():
        of = logging.getLogger(name)
        assert (of.level, of.handlers, of.propagate) == (level, handlers, propagate)
    assert warnings.filters == filters
    assert capsys.readouterr().err == ""


@dataclass(frozen=True, kw_only=True)
class Odd(Policy):
    """Evicts the oldest token, and warns."""

    name: ClassVar[str] = "warning"
    label: ClassVar[str] = "Warning"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, rule=Rule(scored=False))

    def priorities(self, step: Step) -> torch.Tensor:
        warnings.warn("a number is odd", RuntimeWarning, stacklevel=1)
        return step.positions.float()


@pytest.mark.parametrize("schedule", ["step", "prompt"])
@pytest.mark.parametrize("writes", [False, True], ids=["choices", "texts"])
def test_a_policys_warnings_are_notes_of_its_own_cell(computed, loaded, tmp_path, schedule, writes):
    row = {"goal": "Which one is the longest of them?", "choices": ["this and that", "that and this"], "target": "x"}
    file = task(tmp_path, [row] * 2, name="writes")
    if writes:
        file.write_text(WRITES.replace("FOLDER", str(tmp_path)).replace("UNTIL", "[]"))
    made = computed(file, Odd(), schedule=Schedule(schedule))
    found = [[n["times"] for n in c.result.get("notes", []) if n["text"].endswith("a number is odd")] for c in made]
    assert found[:2] == [[], []]
    (times,) = found[2]
    assert times >= loaded.model.config.num_hidden_layers  # once in each at least


@dataclass(frozen=True, kw_only=True)
class OddReader(KVzip):
    """KVzip, but it warns while it reads a prompt."""

    name: ClassVar[str] = "odd_reader"
    label: ClassVar[str] = "Odd reader"

    def prepare(self, model: Reader, tokens: list[int]) -> Prepared:
        warnings.warn("a prompt is odd", RuntimeWarning, stacklevel=1)
        return super().prepare(model, tokens)


@dataclass(frozen=True, kw_only=True)
class OddLook(SimLayerKV):
    """SimLayerKV, but it warns while it looks at the first layer."""

    name: ClassVar[str] = "odd_look"
    label: ClassVar[str] = "Odd look"

    def look(self, read: LayerRead) -> float:
        if read.layer == 0:
            warnings.warn("a prompt is odd", RuntimeWarning, stacklevel=1)
        return super().look(read)


@dataclass(frozen=True, kw_only=True)
class Recent(Policy):
    """Half of the budget, but at most 32 tokens, is for the newest tokens; where `first`, some for the first ones."""

    name: ClassVar[str] = "recent_of_ones_own"
    label: ClassVar[str] = "Recent"

    newest: int = 32
    first: int = 0

    def retention(self, budget: int, layer: int) -> Retention:
        sinks = min(self.first, budget)
        return Retention(budget=budget, sinks=sinks, recent=min(self.newest, budget - sinks))


@pytest.mark.parametrize("schedule", ["step", "prompt"])
def test_a_budget_that_leaves_no_choice_is_a_note(computed, tmp_path, schedule):
    """A policy retains what a window does where protected tokens fill the budget, as those of a window always do."""
    known = find_policies()
    rows = [{"goal": "Which one is the longest of them? " * n} for n in (1, 2, 24)]
    plain = [Recent(), Recent(newest=0), Recent(first=2), known["window"](), known["streaming"]()]
    of_cut = [known["snapkv"](), known["pyramidkv"](), known["chunkkv"](by="snapkv")] if schedule == "prompt" else []
    made = computed(task(tmp_path, rows), *plain, *of_cut, schedule=Schedule(schedule))
    found = texts(made)[2:]
    assert [c.error for c in made] == [None] * len(made)
    prompts = made[2].result["lengths"]["prompt"]
    assert prompts["median"] * 0.25 < 32 < prompts["max"] * 0.25  # two documents of three, two choices each
    said = (
        "in 4 of 6 requests the budget is not larger than the number of protected tokens, so that nothing is ranked: "
    )
    newest, both = (f"{said}only the {what} tokens are retained." for what in ("newest", "first and the newest"))
    want = [[f"odd: Recent (recent_of_ones_own): {newest}"], [], [f"odd: Recent (recent_of_ones_own): {both}"], [], []]
    by = [f"odd: {name} (window 32): {newest}" for name in ("SnapKV", "PyramidKV")]
    assert found[:5] == want
    assert found[5:7] == [[x] for x in by][: len(of_cut)]
    assert [text.partition(": in ")[2] for of_cell in found[7:] for text in of_cell] == [newest[3:]][: len(of_cut)]


def test_notes_that_differ_in_task_and_counts_are_one(computed, tmp_path):
    rows = [{"goal": "Which one is the longest of them? " * n} for n in (1, 2, 24)]
    stored = []
    for name in ("odd", "even"):
        made = computed(task(tmp_path, rows, name=name), Recent(), Recent(first=2))
        stored += [write_cell(tmp_path / "s" / c.cell.name, c.result, c.documents, "") for c in made]
    counted = [text for text in notes_of(stored) if "nothing is ranked" in text]
    assert [text.partition(" requests")[0] for text in counted] == [
        f"odd, even: Recent (recent_of_ones_own): in {2 * 4} of {2 * 6}"
    ] * 2
    assert ["first and the newest" in text for text in counted] == [False, True]
    assert all(text.endswith(" the first.)") and "(In 2 cells, " in text for text in counted)


@pytest.mark.parametrize("policy", [OddReader(sinks=1), OddLook(sinks=1, recent=2)], ids=["reads", "looks"])
@pytest.mark.parametrize("writes", [False, True], ids=["choices", "texts"])
def test_warnings_while_a_prompt_is_prepared_are_notes_of_that_policys_cell(computed, tmp_path, writes, policy):
    row = {"goal": "Which one is the longest of them?", "choices": ["this and that", "that and this"], "target": "x"}
    file = task(tmp_path, [row, row | {"goal": "And which of them is the shortest?"}], name="writes")
    if writes:
        file.write_text(WRITES.replace("FOLDER", str(tmp_path)).replace("UNTIL", "[]"))
    made = computed(file, policy, schedule=Schedule("prompt"))
    found = [[n["times"] for n in c.result.get("notes", []) if n["text"].endswith("a prompt is odd")] for c in made]
    assert found == [[], [], [2]]


def test_warnings_of_an_interrupted_cell_are_stored():
    warned = Warned()
    for n in range(3):
        warned.add("numpy", f"overflow in {n}")
    again = Warned.of(json.loads(json.dumps(warned.notes)))
    again.add("numpy", "overflow in 7")
    assert again.notes == [{"text": "numpy warns: overflow in 0", "times": 4}]


WRITES = """
task: writes
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/writes.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{goal}}"
doc_to_target: target
generation_kwargs: {until: UNTIL, max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match}]
metadata: {version: 1.0}
"""


def test_generated_texts(computed, tmp_path):
    rows = [{"target": "x"}, {"target": ""}, {"target": None}, {"goal": "so " * 3000, "target": "y"}]
    task(tmp_path, rows, name="writes")
    file = tmp_path / "texts.yaml"
    own = WRITES.replace("FOLDER", str(tmp_path))
    file.write_text(own.replace("UNTIL", '["\\n"]'))
    made = computed(file)
    for none, null, cut, limit in texts(made):
        assert null.startswith("writes: in 1 of 4 documents (document 2), target is null")
        assert limit.startswith("writes: texts were ended by the limit of their tokens")
        assert none.startswith("writes: in 1 of 4 documents (document 1), there is no right answer")
        assert cut.startswith("writes: in 1 of 4 documents (document 3), the prompt is too long for the model's 2048")
    for cell in made:
        assert cell.result["notes"][-1]["times"] == (cell.documents["ended"] == False).sum() > 0  # noqa: E712
    ended = tmp_path / "whole.yaml"  # every text has the last token's letters
    stop = json.dumps([t[0] for t in made[0].documents["generated"]])
    ended.write_text(own.replace("UNTIL", stop))
    assert next(c.documents["ended"].all() for c in computed(ended))
    file = tmp_path / "empty.yaml"
    file.write_text(own.replace("UNTIL", '["x", ""]'))
    for cell in computed(file):
        assert "generation_kwargs.until=['x', ''] is not allowed" in str(cell.error)


@pytest.mark.parametrize("until", ['""', '["x", ""]', "[1]"])
def test_an_empty_stop_sequence_is_refused(until):
    with pytest.raises(ConfigError, match=r"gen_kwargs\.until=.* is not allowed: give texts of at least one character"):
        Prompting(gen_kwargs=f'{{"until": {until}}}')


def test_examples_without_an_answer_are_counted(folder, loaded, tmp_path):
    file = task(tmp_path, [{"goal": f"Which {i}?", "label": -1 if i in (1, 2) else 1} for i in range(4)])
    file.write_text(file.read_text() + "fewshot_split: test\n")
    lm = PrunedLM(loaded.model, tokenizer=loaded.tokenizer)
    cell = Cell("m", ModelSpec(str(folder)), find_policies()["full"](), None, str(file), 3, None, 0, DataSpec())
    (made,) = CellGroup([cell.with_content()], lm.scorer, tmp_path / "runs" / "s").compute()
    assert texts([made])[0][1] == (
        "odd: of 4 examples that stand before documents, 2 have a right answer that is none of their choices, so that "
        "they show a wrong one."
    )


def test_lm_evals_users_are_warned_of_prompts_that_are_cut(loaded, tmp_path, caplog):
    lm = PrunedLM(loaded.model, tokenizer=loaded.tokenizer, max_length=16)
    built = tasks.TaskSpec(str(task(tmp_path, [{}, {"goal": "so " * 30}])), DataSpec()).build(0)
    with caplog.at_level(logging.WARNING, "lm_eval"):
        lm_eval.evaluate(lm, task_dict={"tasks": {"odd": built}}, bootstrap_iters=0)
    said = [r.getMessage() for r in caplog.records if "Prompts lose their beginning" in r.getMessage()]
    assert len(said) == 1
    assert said[0].endswith("the model's 16 positions: 2 of 4 requests, task odd, document 1 the first.")
