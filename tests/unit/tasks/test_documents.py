"""Where documents are found, which splits are read, and what identifies them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import textwrap
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from a2sf.compat.lm_eval import TaskReader
from a2sf.errors import ConfigError, UserError
from a2sf.tasks import definitions
from a2sf.tasks import spec as tasks
from a2sf.tasks.data import json_files, sources
from a2sf.tasks.data.document_list import DocumentList

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
    return tasks.ContentFinder().resolve(tasks.TaskSpec(name, spec, shots)).content


# splits


@pytest.mark.parametrize(
    ("name", "rows"), [("mmlu_anatomy", mmlu("q")), ("gsm8k", [{"question": "1+1?", "answer": "#### 2"}])]
)
def test_no_shots_need_no_split_of_examples(tmp_path, name, rows):
    write(tmp_path / name / "test.jsonl", rows)
    task = tasks.TaskSpec(name, tasks.DataSpec(dir=str(tmp_path))).build(1)
    assert len(task.eval_docs) == len(rows)
    assert tasks.provenance(task)["fewshot_split"] is None


def test_examples_come_from_where_the_task_says(tmp_path):
    for split in ("test", "dev", "validation", "auxiliary_train"):
        write(tmp_path / "mmlu_anatomy" / f"{split}.jsonl", mmlu(split))
    said = tasks.TaskSpec("mmlu_anatomy", tasks.DataSpec(dir=str(tmp_path)), 2).build(1)
    assert [d["question"] for d in said.examples().of(said.eval_docs[0])] == ["dev 0?", "dev 1?"]  # in order, as MMLU's
    for split in ("validation", "auxiliary_train", "test"):
        spec = tasks.DataSpec(dir=str(tmp_path), fewshot_split=split)
        task = tasks.TaskSpec("mmlu_anatomy", spec, 2).build(1)
        assert {d["question"].partition(" ")[0] for d in task.examples().of(task.eval_docs[0])} == {split}
    scored = tasks.TaskSpec("mmlu_anatomy", tasks.DataSpec(dir=str(tmp_path), split="auxiliary_train"), 1).build(1)
    assert scored.eval_docs[0]["question"] == "auxiliary_train 0?"


def test_a_tasks_written_examples_are_kept(tmp_path):
    write(tmp_path / "gsm8k_cot" / "test.jsonl", [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(9)])
    task = tasks.TaskSpec("gsm8k_cot", tasks.DataSpec(dir=str(tmp_path)), 3).build(1)
    written = task.config.fewshot_config.samples
    assert all(d in written for d in task.examples().of(task.eval_docs[0]))
    assert "trees in the grove" in task.fewshot_context(doc=task.eval_docs[0], num_fewshot=3)
    spec = tasks.DataSpec(dir=str(tmp_path), fewshot_split="test")
    other = tasks.TaskSpec("gsm8k_cot", spec, 3).build(1)
    assert "trees in the grove" not in other.fewshot_context(doc=other.eval_docs[0], num_fewshot=3)


def test_else_examples_come_from_validation(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / "piqa" / f"{split}.jsonl", piqa(kept=split))
    task = tasks.TaskSpec("piqa", tasks.DataSpec(dir=str(tmp_path)), 1).build(1)
    assert {d["kept"] for d in task.examples().pool} == {"validation"}


def test_a_split_that_the_data_lacks_is_named(tmp_path):
    write(tmp_path / "mmlu_anatomy" / "test.jsonl", mmlu("q"))
    spec = tasks.DataSpec(dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"takes its examples from dev.* holds only test .*data\.fewshot_split=test"):
        tasks.TaskSpec("mmlu_anatomy", spec, 1).check()
    with pytest.raises(ConfigError, match=r"data\.split=tset .*did you mean test"):
        tasks.TaskSpec("mmlu_anatomy", tasks.DataSpec(dir=str(tmp_path), split="tset")).check()


def test_the_splits_of_every_definition_are_known(index_sample):
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
    entries = {n: e for n, e in definitions.index().items() if e.kind.name in ("TASK", "PY_TASK")}
    files = (p for p in definitions.TASKS_DIRECTORY.rglob("*") if p.suffix in ("", ".yaml") and p.is_file())
    folders = {
        p.parent for p in files if "custom_dataset:" in p.read_text(encoding="utf-8", errors="ignore")
    }  # also those of templates
    near = [n for n, e in entries.items() if e.kind.name == "PY_TASK" or e.yaml_path.parent in folders]
    rare = [n for n in near if {"custom_dataset", "class"} & set(TaskReader().config(entries[n]))]
    assert len(rare) > 60
    return [*list(entries)[::40], *rare]


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


def test_splits_with_a_common_beginning_are_distinguished(tmp_path):
    for split in ("validation_matched", "validation_mismatched"):
        write(tmp_path / "mnli" / f"{split}.jsonl", [{"kept": split}])
    found = sources.find_splits(tmp_path, "mnli", definitions.definition("mnli").config)
    assert {k: [f.stem for f in v] for k, v in found.items()} == {s: [s] for s in found}
    assert "validation_matched" in found


def test_the_wheels_mmlu_is_found(bundle):
    found = source("mmlu_anatomy", bundle, shots=5)
    assert (found.scored, found.examples) == ("test", "dev")
    task = tasks.TaskSpec("mmlu_anatomy", bundle, 5).build(1)
    assert len(task.eval_docs) == 135


def test_every_subject_of_the_wheels_mmlu(bundle):
    for member in definitions.resolve("mmlu"):
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
    task = tasks.TaskSpec("piqa", tasks.DataSpec(dir=str(a))).build(1)
    assert set(task.eval_docs["label"]) == {1}  # nor does the datasets library serve what it kept


def test_only_splits_that_are_read_count(tmp_path):
    for split in ("test", "dev"):
        write(tmp_path / "mmlu_anatomy" / f"{split}.jsonl", mmlu(split))
    spec = tasks.DataSpec(dir=str(tmp_path))
    none, some = content("mmlu_anatomy", spec), content("mmlu_anatomy", spec, shots=1)
    write(tmp_path / "mmlu_anatomy" / "dev.jsonl", mmlu("another"))
    assert content("mmlu_anatomy", spec) == none
    assert content("mmlu_anatomy", spec, shots=1) != some


def test_documents_that_changed_after_they_were_identified_are_refused(tmp_path):
    write(tmp_path / "piqa.jsonl", piqa())
    data = tasks.ContentFinder().resolve(tasks.TaskSpec("piqa", tasks.DataSpec(dir=str(tmp_path))))
    tasks.TaskSpec("piqa", data).build(1)
    write(tmp_path / "piqa.jsonl", piqa(5))
    with pytest.raises(UserError, match="changed after the sweep began"):
        tasks.TaskSpec("piqa", data).build(1)


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
    data = tasks.ContentFinder().resolve(tasks.TaskSpec(ref, tasks.DataSpec()))
    assert tasks.TaskSpec(ref, data).build(1).content == data.content
    write(tmp_path / "x.jsonl", piqa(6))
    with pytest.raises(UserError, match="tasks=mine: its documents changed"):
        tasks.TaskSpec(ref, data).build(1)
    assert content("needle", tasks.DataSpec()) == content("needle", tasks.DataSpec(source="bundle"))


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "piqa.jsonl").write_text('{"goal": 1')
    with pytest.raises(UserError, match=r"piqa\.jsonl cannot be read as json") as raised:
        tasks.TaskSpec("piqa", tasks.DataSpec(dir=str(tmp_path))).build(1)
    assert "\n" not in str(raised.value)


def test_documents_without_the_fields_of_the_task_are_one_sentence(tmp_path):
    write(tmp_path / "arc_easy.jsonl", [{"other": 1}])
    with pytest.raises(UserError, match="tasks=arc_easy: its documents cannot be used") as raised:
        tasks.TaskSpec("arc_easy", tasks.DataSpec(dir=str(tmp_path))).build(1)
    assert "\n" not in str(raised.value)


# value for value

ODD = [
    {"n": 4, "when": "1989-11-09", "days": ["1989-11-09"], "mixed": "4", "more": {"a": 1}, "big": 2**70},
    {"n": 2.5, "when": "1990-10-03 12:00:00", "days": [], "mixed": 4, "more": {"b": [1, 2.5]}, "extra": True},
    {"n": 7, "when": "2001-01-01", "days": ["2001-01-01", "x"], "mixed": [1], "more": None},
]
GENERATES = """
task: odd
output_type: generate_until
validation_split: validation
doc_to_text: "{{when}}: {{n}} {{mixed}} {{days}}"
doc_to_target: "{{n}}"
generation_kwargs: {until: ["\\n"]}
metric_list: [{metric: exact_match}]
"""


def odd(folder, data):
    """Documents of a definition that is read by the path of its file."""
    (folder / "odd.yaml").write_text(GENERATES + data)
    return str(folder / "odd.yaml")


@pytest.mark.parametrize("layout", ["lines", "list", "definition", "compressed"])
def test_json_is_read_value_for_value(tmp_path, layout):
    lines = "".join(json.dumps(r) + "\n" for r in ODD)
    folder = tmp_path / "data"
    folder.mkdir()
    if layout == "list":
        (folder / "odd.json").write_text(json.dumps(ODD, indent=2))
    elif layout == "compressed":
        (folder / "odd.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    else:
        (folder / "odd.jsonl").write_text(lines)
    ref, spec = odd(tmp_path, ""), tasks.DataSpec(dir=str(folder))
    if layout in ("definition", "compressed"):
        file = next(folder.iterdir())
        ref = odd(tmp_path, f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {file}}}}}\n")
        spec = tasks.DataSpec()
    task = tasks.TaskSpec(ref, spec).build(1)
    assert repr(list(task.eval_docs)) == repr([{**dict.fromkeys([*ODD[0], "extra"]), **r} for r in ODD])
    assert [task.doc_to_target(d) for d in task.eval_docs] == ["4", "2.5", "7"]
    assert task.doc_to_text(task.eval_docs[0]) == "1989-11-09: 4 4 ['1989-11-09']"


def test_a_tasks_own_processing_sees_and_keeps_the_values(tmp_path):
    write(tmp_path / "x.jsonl", [{"n": 1, "s": "1989-11-09"}, {"n": 2.5, "s": "b"}, {"n": 3, "s": "c"}])
    (tmp_path / "utils.py").write_text(
        textwrap.dedent(
            """
            def process(dataset):
                assert dataset.column_names == list(dataset.features) == ["n", "s"]
                made = dataset.map(lambda d, i: {"twice": d["n"] * 2, "at": i}, with_indices=True, num_proc=1)
                made = made.filter(lambda d: d["n"] != 3, load_from_cache_file=False).rename_column("s", "name")
                return made.map(lambda b: {"odd": [n == 1 for n in b["n"]]}, batched=True, remove_columns=["at"])
            """
        )
    )
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {tmp_path / 'x.jsonl'}}}}}\n"
    (tmp_path / "odd.yaml").write_text(
        GENERATES.replace('"{{when}}: {{n}} {{mixed}} {{days}}"', "name")
        + source
        + "process_docs: !function utils.process\n"
    )
    task = tasks.TaskSpec(str(tmp_path / "odd.yaml"), tasks.DataSpec()).build(1)
    assert repr(list(task.eval_docs)) == repr(
        [
            {"n": 1, "twice": 2, "name": "1989-11-09", "odd": True},
            {"n": 2.5, "twice": 5.0, "name": "b", "odd": False},
        ]
    )


def test_other_methods_of_a_dataset_are_as_there_or_refused():
    rows = [{"n": i, "s": str(i)} for i in range(9)]
    mine, theirs = DocumentList(rows), Dataset.from_list(rows)
    for method, arguments in {
        "shuffle": {"seed": 4},
        "select": {"indices": [3, 1]},
        "sort": {"column_names": "s"},
    }.items():
        assert list(getattr(mine, method)(**arguments)) == list(getattr(theirs, method)(**arguments))
    assert mine["s"] == list(theirs["s"])
    assert mine[2:4] == theirs[2:4]
    assert mine[-1] == theirs[-1]
    mine[0]["n"] = 100  # as of a dataset, what is given out is a copy
    assert mine[0]["n"] == 0
    with pytest.raises(UserError, match=r"sort of a dataset would change n of document 0 from 1 to 1\.0"):
        DocumentList([{"n": 1}, {"n": 2.5}]).sort("n")
    with pytest.raises(AttributeError):
        mine.set_format("numpy")


PLAIN_VALUE = st.one_of(
    st.text(max_size=5),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    st.none(),
    st.sampled_from(["1989-11-09", "1989-11-09 10:00", "x"]),
)
VALUE = st.recursive(
    PLAIN_VALUE,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@example(rows=[{"x": [None, 1.0000000000000002e16]}], listed=False)
@example(rows=[{"x": [None], "y": 1.0000000000000002e16}], listed=False)
@given(
    rows=st.lists(st.fixed_dictionaries({"x": VALUE}, optional={"y": PLAIN_VALUE}), min_size=1, max_size=3),
    listed=st.booleans(),
)
def test_documents_keep_their_identity_where_a_table_held_them_unchanged(tmp_path_factory, rows, listed):
    """And only there: what a table changed has another number now, and an earlier result must not be taken for it."""
    assume(json_files.one_type_each(rows, listed))
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    file.write_text(json.dumps(rows) if listed else "".join(json.dumps(r) + "\n" for r in rows))
    table = load_dataset("json", data_files=str(file), split="train", cache_dir=str(file.parent / "cache"))
    assert repr(list(table)) == repr(list(DocumentList(json_files.read(file))))


def test_the_identity_of_documents_moves_with_what_is_read(tmp_path):
    write(tmp_path / "piqa.jsonl", piqa())
    plain = hashlib.sha256(
        f"validation .jsonl {hashlib.sha256((tmp_path / 'piqa.jsonl').read_bytes()).hexdigest()}".encode()
    )
    spec = tasks.DataSpec(dir=str(tmp_path))
    assert content("piqa", spec) == plain.hexdigest()[:16]  # what it always was
    write(tmp_path / "piqa.jsonl", [*piqa(), {**piqa(1)[0], "label": 0.5}])
    moved = hashlib.sha256(
        f"validation .jsonl {hashlib.sha256((tmp_path / 'piqa.jsonl').read_bytes()).hexdigest()}".encode()
    )
    assert content("piqa", spec) != moved.hexdigest()[:16]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": 2', "in line 2"),
        ('{"a": 1, "a": 2}', "the field a twice"),
        ('{"a": 1}\n[2]', r"document 1 is not a JSON object but \[2\]"),
        ('{\n"a": [1, 2]\n}', "one document per line"),
        ("\n\n", "holds no document"),
    ],
)
def test_json_that_cannot_be_read_is_one_sentence(tmp_path, text, message):
    (tmp_path / "piqa.jsonl").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        tasks.TaskSpec("piqa", tasks.DataSpec(dir=str(tmp_path))).build(1)
    assert "piqa.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("there", "unread"),
    [
        (["piqa/train.jsonl"], "piqa/validation.csv"),
        (["piqa/test.jsonl"], "piqa/validation.tsv"),
        ([], "piqa.csv"),
        (["piqa/test.jsonl"], "piqa/validation.jsonl.gz"),
        ([], "piqa.jsonl.gz"),
    ],
)
def test_a_file_that_is_not_read_is_named(tmp_path, there, unread):
    """And no other split is scored in its place."""
    for file in (*there, unread):
        write(tmp_path / file, piqa())
    with pytest.raises(ConfigError, match=r"such a file is not read.*; give Arrow, Parquet, JSONL or JSON") as raised:
        source("piqa", tasks.DataSpec(dir=str(tmp_path)))
    assert unread in str(raised.value)


def test_a_file_that_is_not_read_may_lie_beside_the_one_that_is(tmp_path):
    for file in ("piqa/validation.jsonl", "piqa/validation.csv", "piqa/train.csv", "piqa/notes.txt"):
        write(tmp_path / file, piqa())
    assert source("piqa", tasks.DataSpec(dir=str(tmp_path))).scored == "validation"
    with pytest.raises(ConfigError, match=r"train\.csv is not allowed"):
        source("piqa", tasks.DataSpec(dir=str(tmp_path), fewshot_split="train"), shots=1)


@pytest.mark.parametrize(
    ("file", "fields"), [('[{"question": "q", "label": 0}]', "question, label"), ('["a", "b"]', "text")]
)
def test_fields_that_documents_lack_are_named_with_those_they_have(tmp_path, file, fields):
    (tmp_path / "piqa.json").write_text(file)
    with pytest.raises(UserError, match=rf"its templates use [a-z12, ]+; the fields of the first document: {fields}\)"):
        tasks.TaskSpec("piqa", tasks.DataSpec(dir=str(tmp_path))).build(0)


def test_a_field_that_is_missing_in_a_list_of_choices_is_named(tmp_path):
    """Without it, the choices are no list, and lm-eval's error is about a syntax tree."""
    (tmp_path / "piqa.json").write_text('[{"goal": "g", "sol1": "a", "label": 0}]')
    with pytest.raises(
        UserError, match=r"its templates use sol2; the fields of the first document: goal, sol1, label\)"
    ):
        tasks.TaskSpec("piqa", tasks.DataSpec(dir=str(tmp_path))).build(0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"doc_to_text": "{{nation}}"}, r"its templates use nation; .*: goal, sol1, sol2, label\)"),
        ({"test_split": "valid"}, "they have no split valid; there are test"),
    ],
)
def test_a_task_that_names_files_says_what_they_have(tmp_path, change, why):
    write(tmp_path / "mine.jsonl", piqa())
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "mine.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{goal}}",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "doc_to_target": "label",
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(task | change))
    with pytest.raises(UserError, match=rf"its documents cannot be used from its files.*{why}"):
        tasks.TaskSpec(str(tmp_path / "mine.yaml"), tasks.DataSpec()).build(0)
