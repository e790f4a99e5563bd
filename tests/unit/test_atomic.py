"""A file written completely is on the disk, with its entry in the directory, before anybody learns that it exists."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from a2sf import atomic, disk_cache
from a2sf.store import runs
from a2sf.store.archive import pack
from a2sf.sweep import answer_store
from tests.sweep_fixture import Plan, write_sweep


@pytest.fixture
def disk(monkeypatch):
    """What was flushed and renamed, in that order: ("flush", path) and ("rename", target)."""
    events: list[tuple[str, Path]] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def flushed(number: int) -> None:
        events.append(("flush", Path(os.readlink(f"/proc/self/fd/{number}"))))
        fsync(number)

    def renamed(how):
        def noted(self: Path, target: Path) -> Path:
            events.append(("rename", Path(target)))
            return how(self, target)

        return noted

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed(replace))
    monkeypatch.setattr(Path, "rename", renamed(rename))
    return events


def check(events: list[tuple[str, Path]], target: Path) -> None:
    at = events.index(("rename", target))
    assert any(kind == "flush" and path.name.startswith(".") for kind, path in events[:at])  # the contents first
    assert ("flush", target.parent.resolve()) in events[at:]


def test_a_file(disk, tmp_path):
    atomic.write(tmp_path / "a.txt", "é")
    assert (tmp_path / "a.txt").read_bytes() == "é".encode()
    check(disk, tmp_path / "a.txt")


def test_a_cell_a_link_to_it_a_table_and_an_archive(disk, tmp_path):
    (stored, *_) = write_sweep(tmp_path / "s", Plan(documents={"piqa": 3}, policies=("full", "h2o")))
    check(disk, stored.path)
    flushed = {path.name for kind, path in disk if kind == "flush"}
    assert {"documents.parquet", "config.yaml", "result.json"} <= flushed
    check(disk, tmp_path / "s" / "results.csv")
    runs.link_cell(stored.path, tmp_path / "t" / "linked")
    check(disk, tmp_path / "t" / "linked")
    check(disk, pack(tmp_path / "s"))
    aside = runs.set_aside(tmp_path / "t" / "linked")
    assert disk[-1] == ("flush", aside.parent)


def test_answers_of_unfinished_cells_and_digests(disk, tmp_path, monkeypatch):
    monkeypatch.setenv("A2SF_CACHE", str(tmp_path / "cache"))
    answer_store.write_in(tmp_path / ".checkpoints" / "x.json", "{}")
    check(disk, tmp_path / ".checkpoints" / "x.json")
    (tmp_path / "weights").write_bytes(b"1")
    disk_cache.digest(tmp_path / "weights")
    (known,) = (tmp_path / "cache" / "digests").iterdir()
    check(disk, known)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_nothing_is_left_of_what_fails(make, tmp_path):
    def failing() -> None:
        with atomic.placed(tmp_path / "x") as temporary:
            make(temporary)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_flush_directories_is_no_failure_and_a_broken_disk_is(tmp_path, monkeypatch):
    flush = os.fsync

    def only_files(number: int, error: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(error, os.strerror(error))
        flush(number)

    monkeypatch.setattr(os, "fsync", lambda n: only_files(n, 22))
    atomic.write(tmp_path / "a", "b")
    monkeypatch.setattr(os, "fsync", lambda n: only_files(n, 5))
    with pytest.raises(OSError, match="Input/output"):
        atomic.write(tmp_path / "a", "c")


def test_a_file_that_is_replaced_by_one_of_the_same_size_and_date_has_another_digest(tmp_path, monkeypatch):
    monkeypatch.setenv("A2SF_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"before")
    before, stat = disk_cache.digest(file), file.stat()
    assert disk_cache.digest(file) == before
    # another file under its name, as `cp -p` and `mv` make it
    other = tmp_path / "other"
    other.write_bytes(b"after!")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)
    moved = disk_cache.digest(file)
    assert moved != before
    # the same file written over, with its date put back
    file.write_bytes(b"third!")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert disk_cache.digest(file) not in (before, moved)
