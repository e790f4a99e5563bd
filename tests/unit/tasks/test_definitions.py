"""Tasks, tags, groups and YAML files: every member, with its settings, or a refusal that names what cannot be run."""

from __future__ import annotations

import textwrap
from dataclasses import replace

import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind

from a2sf.errors import ConfigError
from a2sf.tasks import definitions
from a2sf.tasks.definitions import definition, resolve


@pytest.fixture(scope="module")
def manager():
    """lm-eval's own, which reads all definitions for seconds."""
    return TaskManager()


@pytest.fixture(scope="module")
def index(manager):
    """As lm-eval reads it."""
    return manager.task_index


def written(name, index, inner=()):
    """The names of a group's tasks, read off its YAML by hand; None for a member without a name."""
    entry = index[name]
    if entry.kind is Kind.TAG:
        return sorted(entry.tags)
    if entry.kind is not Kind.GROUP:
        return [name]
    return of_members(name, entry.cfg["task"], index)


def of_members(group, members, index):
    found = []
    for member in members:
        if isinstance(member, str):
            found += written(member, index)
        elif "group" in member and member["group"] not in index:
            found += of_members(f"{group}::{member['group']}", member["task"], index)
        elif "group" in member:
            found += written(member["group"], index)
        elif "task" not in member:
            found.append(None)
        elif member["task"] in index:
            found += written(member["task"], index)
        else:
            found.append(f"{group}::{member['task']}")
    return found


@pytest.mark.full
def test_every_group_and_tag_of_lm_eval_has_all_its_members(index, monkeypatch):
    assert definitions.index() == {name: replace(entry, cfg=None) for name, entry in index.items()}
    monkeypatch.setattr(definitions, "index", lambda: index)  # which need not read each member's file again
    groups = [n for n, e in index.items() if e.kind in (Kind.GROUP, Kind.TAG)]
    assert len(groups) > 1000
    for name in groups:
        expected = written(name, index)
        if None in expected:
            with pytest.raises(ConfigError, match="which have no name"):
                resolve(name)
            continue
        found = resolve(name)
        assert {d.entry.name.partition("#")[0] for d in found} == set(expected), name
        assert len({(d.ref, d.shots) for d in found}) == len(found), name


@pytest.mark.full
@pytest.mark.parametrize("name", ["blimp_nl", "mmlu_generative", "mmlusr", "tmlu", "multimedqa"])
def test_the_members_are_those_that_lm_eval_loads(name, manager, monkeypatch):
    made = []

    class Recorded:
        def __init__(self, config):
            made.append(config["task"])
            self.task_name = config["task"]

    monkeypatch.setattr("lm_eval.tasks._factory.ConfigurableTask", Recorded)
    manager.load(name)
    assert sorted(d.entry.name for d in resolve(name)) == sorted(set(made))


def test_settings_of_members_are_kept():
    members = {d.ref: d for d in resolve("openllm")}
    assert len(members) == 64
    arc = members["openllm::arc_challenge"]
    assert (arc.shots, arc.settings) == (25, {"fewshot_split": "train"})
    assert arc.config["fewshot_split"] == "train"
    assert {members[f"mmlu_{s}"].shots for s in ("anatomy", "astronomy")} == {5}
    assert members["gsm8k"].shots == 5
    assert [d.shots for r, d in members.items() if r.startswith("truthfulqa")] == [0, 0, 0]
    again = definition("openllm::arc_challenge")  # as a worker finds it
    assert again == arc
    assert again.digest() != definition("arc_challenge").digest() is None


def test_a_group_of_nameless_members_is_refused_and_says_which():
    with pytest.raises(ConfigError, match=r"tasks=t0_eval .*7 of its 10 members.*winogrande winogrande_xl"):
        resolve("t0_eval")


@pytest.mark.parametrize(
    "name", ["nonsuch_task", "openllm::nonsuch", "/nowhere/x.yaml", "a/b/c", "piqa.yaml", "", "(", "*"]
)
def test_what_is_not_there_is_one_sentence(name):
    with pytest.raises(ConfigError, match="tasks="):
        resolve(name)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "utils.py").write_text("def text(doc):\n    return 'Q: ' + doc['goal']\n")
    (tmp_path / "mine.yaml").write_text(
        textwrap.dedent(
            """
            task: mine
            dataset_path: json
            dataset_kwargs: {data_files: {validation: x.jsonl}}
            output_type: multiple_choice
            validation_split: validation
            doc_to_text: !function utils.text
            doc_to_target: label
            doc_to_choice: "{{[sol1, sol2]}}"
            """
        )
    )
    (tmp_path / "ours.yaml").write_text(
        textwrap.dedent(
            """
            group: ours
            task:
              - task: copa
                num_fewshot: 1
              - {task: copa, doc_to_text: "{{premise}}"}
              - {task: copa, doc_to_text: "{{premise}}?"}
              - task: inline
                dataset_path: json
                doc_to_text: !function utils.text
            """
        )
    )
    return tmp_path


def test_a_users_own_yaml(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (mine,) = resolve("mine.yaml")
    assert (mine.name, mine.ref) == ("mine", str(folder / "mine.yaml"))  # a worker may run elsewhere
    assert mine.resolved()["doc_to_text"]({"goal": "g"}) == "Q: g"
    before = mine.digest()
    (folder / "utils.py").write_text("def text(doc):\n    return doc['goal']\n")
    assert mine.digest() != before


def test_a_task_is_another_one_when_a_file_that_its_functions_import_changes(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "utils.py").write_text("from words_of_mine import END\n\ndef text(doc):\n    return doc['goal'] + END\n")
    (mine,) = resolve(str(folder / "mine.yaml"))
    alone = mine.digest()
    (folder / "words_of_mine.py").write_text("END = '?'\n")
    before = mine.digest()
    (folder / "words_of_mine.py").write_text("END = '!'\n")
    assert len({alone, before, mine.digest()}) == 3


def test_one_task_twice_in_a_group_is_two(folder):
    found = resolve(str(folder / "ours.yaml"))
    assert [(d.name, d.shots) for d in found] == [
        ("copa", 1),
        ("ours::copa", None),
        ("ours::copa#2", None),
        ("ours::inline", None),
    ]
    assert len({d.digest() for d in found}) == 4
    for d in found:
        definitions._resolved.cache_clear()
        assert definition(d.ref).config["doc_to_text"] == d.config["doc_to_text"]
    assert found[-1].resolved()["doc_to_text"]({"goal": "g"}) == "Q: g"


@pytest.mark.parametrize("text", ["task: [1", "hello: 1", "group: g\ntask: []", "task: [a, b]", "just text", ""])
def test_a_broken_yaml_is_one_sentence(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml") as raised:
        resolve(str(tmp_path / "x.yaml"))
    assert "\n" not in str(raised.value)


def test_a_member_that_is_not_there_is_named(tmp_path):
    (tmp_path / "g.yaml").write_text("group: g\ntask: [piqa, winogrand]\n")
    with pytest.raises(ConfigError, match=r"its member winogrand is not a task \(did you mean winogrande"):
        resolve(str(tmp_path / "g.yaml"))
