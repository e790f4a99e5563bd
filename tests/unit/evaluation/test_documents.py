"""Where documents are found, which splits are read, and what identifies them."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path

import pytest

from a2sf.errors import ConfigError, UserError
from a2sf.evaluation import definitions, sources, tasks

MMLU = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": "anatomy"}


def write(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def piqa(n=4, **more):
    return [{"goal": f"g{i}", "sol1": f"a{i}", "sol2": f"b{i}", "label": 0, **more} for i in range(n)]


def mmlu(name, n=3):
    return [{**MMLU, "question": f"{name} {i}?"} for i in range(n)]


def source(name, spec, shots=0):
    return sources.locate(definitions.definition(name), spec, shots)


def content(name, spec, shots=0):
    return tasks.Settled().data(name, spec, shots).content


# splits


@pytest.mark.parametrize(
    ("name", "rows"), [("mmlu_anatomy", mmlu("q")), ("gsm8k", [{"question": "1+1?", "answer": "#### 2"}])]
)
def test_no_shots_need_no_split_of_examples(tmp_path, name, rows):
    write(tmp_path / name / "test.jsonl", rows)
    task = tasks.build(name, tasks.DataSpec(dir=str(tmp_path)), shots=0, seed=1)
    assert len(task.eval_docs) == len(rows)
    assert tasks.provenance(task)["fewshot_split"] is None


def test_examples_come_from_where_the_task_says(tmp_path):
    for split in ("test", "dev", "validation", "auxiliary_train"):
        write(tmp_path / "mmlu_anatomy" / f"{split}.jsonl", mmlu(split))
    said = tasks.build("mmlu_anatomy", tasks.DataSpec(dir=str(tmp_path)), shots=2, seed=1)
    assert [d["question"] for d in said.examples().of(said.eval_docs[0])] == ["dev 0?", "dev 1?"]  # in order, as MMLU's
    for split in ("validation", "auxiliary_train", "test"):
        spec = tasks.DataSpec(dir=str(tmp_path), fewshot_split=split)
        task = tasks.build("mmlu_anatomy", spec, shots=2, seed=1)
        assert {d["question"].partition(" ")[0] for d in task.examples().of(task.eval_docs[0])} == {split}
    scored = tasks.build("mmlu_anatomy", tasks.DataSpec(dir=str(tmp_path), split="auxiliary_train"), shots=1, seed=1)
    assert scored.eval_docs[0]["question"] == "auxiliary_train 0?"


def test_a_tasks_written_examples_are_kept(tmp_path):
    write(tmp_path / "gsm8k_cot" / "test.jsonl", [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(9)])
    task = tasks.build("gsm8k_cot", tasks.DataSpec(dir=str(tmp_path)), shots=3, seed=1)
    written = task.config.fewshot_config.samples
    assert all(d in written for d in task.examples().of(task.eval_docs[0]))
    assert "trees in the grove" in task.fewshot_context(doc=task.eval_docs[0], num_fewshot=3)
    spec = tasks.DataSpec(dir=str(tmp_path), fewshot_split="test")
    other = tasks.build("gsm8k_cot", spec, shots=3, seed=1)
    assert "trees in the grove" not in other.fewshot_context(doc=other.eval_docs[0], num_fewshot=3)


def test_else_examples_come_from_validation(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / "piqa" / f"{split}.jsonl", piqa(kept=split))
    task = tasks.build("piqa", tasks.DataSpec(dir=str(tmp_path)), shots=1, seed=1)
    assert {d["kept"] for d in task.examples().pool} == {"validation"}


def test_a_split_that_the_data_lacks_is_named(tmp_path):
    write(tmp_path / "mmlu_anatomy" / "test.jsonl", mmlu("q"))
    spec = tasks.DataSpec(dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"takes its examples from dev.* holds only test .*data\.fewshot_split=test"):
        tasks.check("mmlu_anatomy", spec, shots=1)
    with pytest.raises(ConfigError, match=r"data\.split=tset .*did you mean test"):
        tasks.check("mmlu_anatomy", tasks.DataSpec(dir=str(tmp_path), split="tset"), shots=0)


def test_the_splits_of_every_definition_can_be_told(index_sample):
    """Whatever a definition says of its splits, 0 shots read the scored one alone, and shots one more or written ones."""
    kinds, refused = set(), {}
    for ref in index_sample:
        found = definitions.definition(ref)
        config = found.config
        try:
            none, some = source(ref, tasks.DataSpec()), source(ref, tasks.DataSpec(), shots=2)
        except ConfigError as error:
            refused[ref] = str(error)
            continue
        assert none.examples is None
        examples = config.get("fewshot_config") or {}
        stated = examples.get("split") or config.get("fewshot_split")
        if stated:
            assert some.examples == stated
        elif examples.get("samples") is not None:
            assert some.examples is None
        elif config.get("validation_split"):
            assert some.examples == config["validation_split"]
        kinds.add((bool(stated), examples.get("samples") is not None, some.kind))
    assert len(kinds) >= 5
    assert len(refused) < 10
    assert all("dataset" in why or "imported" in why or "test_split" in why for why in refused.values()), refused


@pytest.fixture(scope="module")
def index_sample():
    """Every 40th definition of lm-eval's, and those of a kind that few have."""
    index = definitions._index()
    names = [n for n, e in index.items() if e.kind.name in ("TASK", "PY_TASK")]
    rare = [n for n in names if any(k in (index[n].cfg or {}) for k in ("custom_dataset", "class"))]
    return [*names[::40], *rare]


# where files are found


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["piqa.jsonl"], ["validation"]),
        (["piqa/validation.jsonl", "piqa/train.jsonl"], ["validation", "train"]),
        (["piqa/validation-00000-of-00002.jsonl", "piqa/validation-00001-of-00002.jsonl"], ["validation"]),
        (["piqa/validation/a.jsonl", "piqa/dev/b.jsonl"], ["validation", "dev"]),
        (["baber/piqa/validation.jsonl"], ["validation"]),
        (["someone/piqa/only/validation.jsonl"], ["validation"]),
        (["piqa/validation_matched.jsonl", "piqa/validation_mismatched.jsonl"], []),
        (["piqa/notes.jsonl"], []),
        (["other/validation.jsonl"], []),
    ],
    ids=lambda x: " ".join(x),
)
def test_layouts(tmp_path, files, splits):
    for file in files:
        write(tmp_path / file, piqa())
    found = sources.find_splits(tmp_path, "piqa", definitions.definition("piqa").config)
    assert list(found) == splits
    assert sum(map(len, found.values())) == (len(files) if splits else 0)


def test_splits_that_begin_alike_are_kept_apart(tmp_path):
    for split in ("validation_matched", "validation_mismatched"):
        write(tmp_path / "mnli" / f"{split}.jsonl", [{"kept": split}])
    found = sources.find_splits(tmp_path, "mnli", definitions.definition("mnli").config)
    assert {k: [f.stem for f in v] for k, v in found.items()} == {s: [s] for s in found}
    assert "validation_matched" in found


def test_the_wheels_mmlu_is_found(bundle):
    found = source("mmlu_anatomy", bundle, shots=5)
    assert (found.scored, found.examples) == ("test", "dev")
    task = tasks.build("mmlu_anatomy", bundle, shots=5, seed=1)
    assert len(task.eval_docs) == 135


def test_every_subject_of_the_wheels_mmlu(bundle):
    for member in tasks.resolve("mmlu"):
        assert source(member.ref, bundle, shots=5).examples == "dev"


# what identifies documents


def test_content_follows_the_documents_alone(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write(a / "piqa.jsonl", piqa())
    write(b / "piqa" / "validation.jsonl", piqa())
    assert content("piqa", tasks.DataSpec(dir=str(a))) == content("piqa", tasks.DataSpec(dir=str(b)))
    before = content("piqa", tasks.DataSpec(dir=str(a)))
    stat = (a / "piqa.jsonl").stat()
    write(a / "piqa.jsonl", [r | {"label": 1} for r in piqa()])  # as long as before
    os.utime(a / "piqa.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = content("piqa", tasks.DataSpec(dir=str(a)))
    assert after != before
    task = tasks.build("piqa", tasks.DataSpec(dir=str(a)), shots=0, seed=1)
    assert set(task.eval_docs["label"]) == {1}  # nor does the datasets library serve what it kept


def test_only_splits_that_are_read_count(tmp_path):
    for split in ("test", "dev"):
        write(tmp_path / "mmlu_anatomy" / f"{split}.jsonl", mmlu(split))
    spec = tasks.DataSpec(dir=str(tmp_path))
    none, some = content("mmlu_anatomy", spec), content("mmlu_anatomy", spec, shots=1)
    write(tmp_path / "mmlu_anatomy" / "dev.jsonl", mmlu("another"))
    assert content("mmlu_anatomy", spec) == none
    assert content("mmlu_anatomy", spec, shots=1) != some


def test_documents_that_changed_after_they_were_settled_are_refused(tmp_path):
    write(tmp_path / "piqa.jsonl", piqa())
    settled = tasks.Settled().data("piqa", tasks.DataSpec(dir=str(tmp_path)), 0)
    tasks.build("piqa", settled, shots=0, seed=1)
    write(tmp_path / "piqa.jsonl", piqa(5))
    with pytest.raises(UserError, match="changed after the sweep began"):
        tasks.build("piqa", settled, shots=0, seed=1)


def test_documents_of_the_tasks_own_are_identified_by_what_they_are(tmp_path):
    write(tmp_path / "x.jsonl", piqa())
    (tmp_path / "mine.yaml").write_text(
        textwrap.dedent(
            f"""
            task: mine
            dataset_path: json
            dataset_kwargs: {{data_files: {{validation: {tmp_path / "x.jsonl"}}}}}
            output_type: multiple_choice
            validation_split: validation
            doc_to_text: "{{{{goal}}}}"
            doc_to_target: label
            doc_to_choice: "{{{{[sol1, sol2]}}}}"
            """
        )
    )
    ref = str(tmp_path / "mine.yaml")
    settled = tasks.Settled().data(ref, tasks.DataSpec(), 0)
    assert tasks.build(ref, settled, shots=0, seed=1).content == settled.content
    write(tmp_path / "x.jsonl", piqa(6))
    with pytest.raises(UserError, match="tasks=mine: its documents changed"):
        tasks.build(ref, settled, shots=0, seed=1)
    assert content("needle", tasks.DataSpec()) == content("needle", tasks.DataSpec(source="bundle"))


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "piqa.jsonl").write_text('{"goal": 1')
    with pytest.raises(UserError, match=r"piqa\.jsonl cannot be read as json") as told:
        tasks.build("piqa", tasks.DataSpec(dir=str(tmp_path)), shots=0, seed=1)
    assert "\n" not in str(told.value)


def test_documents_without_the_fields_of_the_task_are_one_sentence(tmp_path):
    write(tmp_path / "arc_easy.jsonl", [{"other": 1}])
    with pytest.raises(UserError, match="tasks=arc_easy: its documents cannot be used") as told:
        tasks.build("arc_easy", tasks.DataSpec(dir=str(tmp_path)), shots=0, seed=1)
    assert "\n" not in str(told.value)
