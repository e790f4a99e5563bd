"""lm-eval's definitions by name, stored between starts: equal to what lm-eval reads, and read again after any change."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from lm_eval.tasks._index import TaskIndex

from a2sf.compat import lm_eval
from a2sf.compat.lm_eval import Kind, TaskReader
from a2sf.tasks.files import index as stored


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A small folder in the place of lm-eval's, and a function that gives the index as a new process has it.

    It also says how often lm-eval has read the folder.
    """
    folder, reads = tmp_path / "tasks", []
    (folder / "near" / "__pycache__").mkdir(parents=True)
    (folder / "near" / "_template").write_text("tag: seen\ndataset_path: json\n")
    (folder / "near" / "one.yaml").write_text("include: _template\ntask: one\ndoc_to_text: !function utils.text\n")
    (folder / "two.yaml").write_text("task: two\nclass: !function utils.Two\n")
    (folder / "both.yaml").write_text("group: both\ntask: [one, two]\n")

    def read():
        reads.append(1)
        return TaskIndex.build([folder])

    monkeypatch.setattr(stored, "TASKS_DIRECTORY", folder)
    monkeypatch.setattr(lm_eval, "index", read)
    monkeypatch.setenv("A2SF_CACHE", str(tmp_path / "cache"))
    return folder, lambda: (stored.index.__wrapped__(), len(reads))


def test_a_second_start_has_the_same_entries_and_reads_no_definition(start):
    folder, begin = start
    (first, _), (second, reads) = begin(), begin()
    assert (second, list(second), reads) == (first, list(first), 1)
    built = TaskIndex.build([folder])
    assert second == {name: replace(entry, cfg=None) for name, entry in built.items()}
    assert {e.kind for e in second.values()} == {Kind.TASK, Kind.PY_TASK, Kind.GROUP, Kind.TAG}
    assert second["seen"].tags == {"one"}
    for name in ("one", "two", "both"):
        assert TaskReader().config(second[name]) == TaskReader().config(built[name])


@pytest.mark.parametrize("change", ["template", "new file", "file gone", "code", "folder renamed"])
def test_it_is_read_again_after_a_change(start, change):
    folder, begin = start
    (folder / "near" / "utils.py").write_text("")
    begin()
    if change == "template":
        (folder / "near" / "_template").write_text("tag: also\ndataset_path: json\n")  # of the same size
    elif change == "new file":
        (folder / "three.yaml").write_text("task: three\n")
    elif change == "file gone":
        (folder / "two.yaml").unlink()
    elif change == "code":
        (folder / "near" / "utils.py").write_text("x = 1")
    else:
        (folder / "near").rename(folder / "far")
    found, reads = begin()
    assert reads == 2
    assert found == {name: replace(entry, cfg=None) for name, entry in TaskIndex.build([folder]).items()}


def test_compiled_code_is_no_change(start):
    folder, begin = start
    begin()
    (folder / "near" / "__pycache__" / "utils.pyc").touch()
    assert begin()[1] == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"state": "x"}', None, "not ours"])
def test_what_cannot_be_read_is_written_again(start, tmp_path, text):
    _, begin = start
    expected, _ = begin()
    (place,) = (tmp_path / "cache" / "tasks").iterdir()
    if text is None:
        text = json.dumps(json.loads(place.read_text()) | {"entries": [["one", "NO_KIND", None, []]]})
    place.write_text(text)
    assert begin() == (expected, 2)
    assert begin() == (expected, 2)


def test_it_works_where_nothing_can_be_written(start, tmp_path):
    _, begin = start
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert begin()[1] == 1
    assert set(begin()[0]) == {"one", "two", "both", "seen"}
