"""The long-context tasks: as long as requested, answerable, the same every time, and several questions for one text."""

from __future__ import annotations

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from a2sf import Budget
from a2sf.errors import ConfigError
from a2sf.hf.loading import ModelSpec, tokenizer_folder
from a2sf.policies.find import find_policies
from a2sf.scoring.passes.packing import Item, pack
from a2sf.sweep import cell, group
from a2sf.tasks import spec as tasks
from a2sf.tasks.long.families import FAMILIES, HOPS, QUESTIONS
from a2sf.tasks.prompting import Prompting
from tests.conftest import SMOLLM2

LENGTHS = [600, 1200]


@pytest.fixture(scope="module")
def folder() -> str:
    return str(tokenizer_folder(ModelSpec(SMOLLM2)))


def of(folder: str | None = None, **arguments: object) -> tasks.DataSpec:
    return tasks.DataSpec(source="bundle", tokenizer=folder, task_args=json.dumps({"contexts": 2} | arguments))


@pytest.fixture(scope="module")
def made(folder):
    """Each family's tasks, choosing and writing."""
    names = [f"long_{family}{twin}" for family in FAMILIES for twin in ("", "_generate")]
    return {n: tasks.TaskSpec(n, of(folder, lengths=LENGTHS)).build(0) for n in names}


@pytest.fixture(scope="module")
def count(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: len(tokenizer(text).input_ids)


def test_the_suites_are_the_families():
    assert tasks.expand_suite("long") == [f"long_{f}" for f in FAMILIES]
    assert tasks.expand_suite(["long_generate"]) == [f"long_{f}_generate" for f in FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_answer_have_the_requested_length(made, count, family):
    for twin in (made[f"long_{family}"], made[f"long_{family}_generate"]):
        documents = list(twin.eval_docs)
        assert [d["length"] for d in documents[:4]] == LENGTHS * 2  # a limit takes the same number of each length
        for d in documents:
            prompt = twin.doc_to_text(d)
            most = max(count(f"{prompt} {c}") for c in d["choices"])
            if twin.OUTPUT_TYPE == "generate_until":
                most = count(prompt) + twin.config.generation_kwargs["max_gen_toks"]
            assert 0.94 * d["length"] <= most <= d["length"]
    # what choosing reads is what writing reads
    contexts = [{d["context"] for d in made[f"long_{family}{twin}"].eval_docs} for twin in ("", "_generate")]
    assert contexts[0] == contexts[1]
    assert len(contexts[0]) == 2 * len(LENGTHS)


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_of_one_text_have_prompts_and_choices_of_one_length(made, count, family):
    task = made[f"long_{family}"]
    by_context: dict[str, list[dict]] = {}
    for d in task.eval_docs:
        by_context.setdefault(d["context"], []).append(d)
    for documents in by_context.values():
        assert len(documents) == QUESTIONS
        assert len({count(task.doc_to_text(d)) for d in documents}) == 1
        assert len({count(f" {c}") for d in documents for c in d["choices"]}) == 1
        assert all(len(set(d["choices"])) == len(d["choices"]) == 4 for d in documents)
        assert len({d["choices"][d["gold"]] for d in documents}) == QUESTIONS


def said(document: dict) -> list[str]:
    """The sentences of a text, without how it begins."""
    return document["context"].split("\n\n")[1].split(". ")


def test_the_text_holds_the_right_answer_and_no_other(made):
    for d in made["long_single"].eval_docs:
        right = [c for c in d["choices"] if f"{d['prefix']} {c}." in d["context"]]
        assert right == [d["choices"][d["gold"]]]
        assert sum(c in d["context"] for c in d["choices"]) == 1
    for d in made["long_multikey"].eval_docs:
        assert all(f"is {c}." in d["context"] for c in d["choices"])
        assert [f"{d['prefix']} {c}." in d["context"] for c in d["choices"]].index(True) == d["gold"]
    for d in made["long_multivalue"].eval_docs:
        key = d["prefix"].split()[-2]
        values = [s.split()[-1] for s in said(d) if s.startswith(f"One of the access codes of {key}")]
        assert [v.rstrip(".") for v in values] == d["answers"]
    for d in made["long_multiquery"].eval_docs:
        keys = d["prefix"].removeprefix("The access codes of ").removesuffix(" are").split(" and ")
        assert all(f"code of {k} is {v}." in d["context"] for k, v in zip(keys, d["answers"], strict=True))
    for d in made["long_variables"].eval_docs:
        value = d["question"].split(" are ")[1].split(",")[0]
        holders: list[str] = []
        for sentence in said(d):
            words = sentence.rstrip(".").split()
            if words[:1] == ["Let"] and words[3] in (value, *holders):
                holders.append(words[1])
        assert holders == d["answers"]
        assert len(holders) == HOPS
    for name, apart in (("long_common", ", "), ("long_frequent", " ")):
        for d in made[name].eval_docs:
            entries = d["context"].split("\n\n")[1].rstrip(".").split(apart)
            times = [entries.count(c) for c in d["choices"]]
            right = times.pop(d["gold"])
            assert min(times) >= 1
            assert right >= 2 * max(times)
    written = next(iter(made["long_common_generate"].eval_docs))
    score = made["long_common_generate"].process_results
    assert score(written, [f"the {written['answers'][0]} and a few others"]) == {"recall": 0.25}
    assert score(written, [written["target"]]) == {"recall": 1.0}


def test_documents_follow_from_the_seed_and_the_lengths_alone(folder, made):
    from a2sf.tasks.long.documents import _rows

    task = made["long_multikey"]
    _rows.cache_clear()
    again = tasks.TaskSpec("long_multikey", of(folder, lengths=LENGTHS)).build(7)
    assert list(again.eval_docs) == list(task.eval_docs)
    short = tasks.TaskSpec("long_multikey", of(folder, lengths=LENGTHS[:1])).build(0)
    assert list(short.eval_docs) == [d for d in task.eval_docs if d["length"] == LENGTHS[0]]
    other = tasks.TaskSpec("long_multikey", of(folder, lengths=LENGTHS[:1], seed=1)).build(0)
    assert list(other.eval_docs) != list(short.eval_docs)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"lengths": "long"}, r"task_args\.lengths=long is not allowed: give a list of whole numbers"),
        ({"lengths": [1024, 1024]}, "each once"),
        ({"lengths": [64]}, r"task_args\.lengths=64 is not allowed: a text of long_multikey has at least \d+ tokens"),
        ({"contexts": 0}, r"task_args\.contexts=0"),
        ({"room": -1}, r"task_args\.room=-1"),
    ],
)
def test_bad_arguments(folder, arguments, why):
    with pytest.raises(ConfigError, match=why):
        tasks.TaskSpec("long_multikey", of(folder, **arguments)).build(0)


def a_cell(data: tasks.DataSpec, task: str = "long_single", policy: str = "h2o") -> cell.Cell:
    return cell.Cell(
        "small", ModelSpec(SMOLLM2), find_policies()[policy](), Budget(ratio=0.2, base="context"), task, 0, 4, 0, data
    )


def test_lengths_beyond_the_models_positions_and_examples_are_refused():
    with pytest.raises(ConfigError, match=r"lengths=\[1024, 8193\] .* small has 8192 positions, .* would need 8193"):
        a_cell(of(lengths=[1024, 8193])).with_content()
    with pytest.raises(ConfigError, match=r"shots=1 .* the lengths in task_args\.lengths"):
        tasks.TaskSpec("long_single", of(), 1).check()


def test_a_template_needs_room_of_its_own():
    """Else lm-eval would cut the front of a prompt, which is the template's."""
    chat = Prompting(chat_template=True)
    with pytest.raises(ConfigError, match=r"lengths=\[8192\] .* take 30 of the 8192 positions .* task_args\.room=30"):
        dataclasses.replace(a_cell(of(lengths=[8192])), prompting=chat).with_content()
    measured = cell.spec_with_tokenizer(dataclasses.replace(a_cell(of(lengths=[8192], room=30)), prompting=chat))
    assert measured.data.tokenizer


def test_a_cell_reads_each_text_once(smollm2, tmp_path):
    from a2sf.scoring.lm import PrunedLM

    one = a_cell(of(lengths=[600])).with_content()
    assert one.data.tokenizer
    assert one.id == dataclasses.replace(a_cell(of(lengths=[600])), data=one.data).id
    assert one.id != a_cell(of(lengths=[601])).with_content().id
    lm = PrunedLM(smollm2.model, tokenizer=smollm2.tokenizer)
    (done,) = group.CellGroup([one], lm.scorer, tmp_path / "s").compute()
    if done.error is not None:
        raise done.error
    result, documents = done.result, done.documents
    assert result["metrics"]["acc"]["n"] == 4
    assert documents["context"].nunique() == 4
    timing = result["timing"]
    assert timing["computed_tokens"] < 600 + 4 * 25 + 16 * 6 < timing["tokens"] / 10


def test_a_long_beginning_is_read_once_although_rows_are_short():
    text = tuple(range(5000))
    read = [Item((*text, 9000 + i, i), key=0, shareable=100) for i in range(300)]
    assert sum(len(row.tokens) for row in pack(read, max_tokens=1000)) == 5000 + 600
    # and not put together where nothing is shared
    apart = [Item((*text, 9000 + i, i), key=i, shareable=100) for i in range(3)]
    assert [len(row.tokens) for row in pack(apart, max_tokens=1000)] == [5002] * 3


def test_lm_evals_own_ruler_gets_the_models_tokenizer_and_its_lengths(monkeypatch, folder, count):
    """Its words come from a package that is not needed otherwise."""
    words = {"nouns": ["river", "lamp"], "adjectives": ["green", "tall"], "verbs": ["run"]}
    package = SimpleNamespace(RandomWord=lambda: SimpleNamespace(_categories=words))
    monkeypatch.setitem(sys.modules, "wonderwords", package)
    monkeypatch.setattr("nltk.data.find", lambda *_: True)
    task = tasks.TaskSpec("niah_single_1", of(folder, max_seq_lengths=[400])).build(0)
    document = next(iter(task.eval_docs))
    written = 128  # tokens that RULER leaves for the answer
    assert document["length"] == count(document["input"]) + written <= 400 == document["max_length"]
    assert task.config.metadata["tokenizer"] == folder
    with pytest.raises(ConfigError, match=r"max_seq_lengths=\[9000\].* 8192 positions"):
        a_cell(of(max_seq_lengths=[9000]), task="niah_single_1").with_content()
