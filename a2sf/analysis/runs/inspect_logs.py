"""inspect_ai's logs: `.eval` (a zip archive with a header and a file for each sample and epoch) and `.json`."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from a2sf.analysis.runs.run import Document, Run, TaskRun, field_of, number_of, texts_to_match
from a2sf.errors import UserError

GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
"""Grades: correct, partly correct, incorrect, no answer."""
ZSTANDARD = 93
"""The zip method of inspect_ai's present versions, which Python's zipfile reads from 3.14 on."""
LOCAL_HEADER, LENGTHS = 30, 26
"""Bytes of a member's header before its name, and where in it the lengths of the name and of the extra field are."""


def runs_of_logs(path: Path, logs: Sequence[Path], cluster: str | None = None) -> list[Run]:
    """The runs of a log, or of a directory of logs.

    The logs of one model, each of another task (as `inspect eval-set` writes them), are one run. Where a model has several
    logs of a task, each log of it is a run.
    """
    read = [_read(log, cluster) for log in logs]
    by_model: dict[str | None, list[tuple[Run, TaskRun]]] = {}
    for model, run, task in read:
        by_model.setdefault(model, []).append((run, task))
    if len(read) == 1 and path.is_dir():
        return [replace(read[0][1], label=path.name)]
    if len(read) == 1 or any(len({t.task for _, t in of}) < len(of) for of in by_model.values()):
        return [run for _, run, _ in read]
    runs = []
    for model, of_model in by_model.items():
        label = path.name if len(by_model) == 1 else str(model)
        notes = tuple(note for run, _ in of_model for note in run.notes)
        runs.append(Run(label, str(path), {t.task: t for _, t in of_model}, notes=notes))
    return runs


def _read(path: Path, cluster: str | None) -> tuple[str | None, Run, TaskRun]:
    """A log's model, its run, and the only task of that."""
    header, samples = _of_zip(path) if zipfile.is_zipfile(path) else _of_json(path)
    documents: dict[str, Document] = {}
    unscored = 0
    for sample in samples:
        scores = {
            n: v
            for n, s in (sample.get("scores") or {}).items()
            for n, v in _values(n, s.get("value"))
            if v is not None
        }
        if not scores:
            unscored += 1
            continue
        document = documents.setdefault(
            str(sample["id"]),
            Document(
                id=str(sample["id"]),
                texts=texts_to_match(_question(sample["input"])),
                cluster=field_of(sample.get("metadata"), cluster),
            ),
        )
        for name, value in scores.items():
            document.values.setdefault(name, []).append(value)
    notes = []
    if unscored:
        notes.append(
            f"{path.stem}: {unscored} of {len(samples)} samples have no score that is a number, and are left out."
        )
    if (status := header.get("status", "success")) != "success":
        notes.append(f"{path.stem}: the status of this log is {status}, so that samples may be missing.")
    task = TaskRun(str(header["eval"]["task"]).rpartition("/")[2], tuple(documents.values()))
    return header["eval"].get("model"), Run(path.stem, str(path), {task.task: task}, notes=tuple(notes)), task


def _of_zip(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("samples/") and n.endswith(".json"))
        header = "header.json" if "header.json" in archive.namelist() else "_journal/start.json"
        return json.loads(_member(archive, header)), [json.loads(_member(archive, n)) for n in names]


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The content of a member, also where it is compressed by Zstandard."""
    info = archive.getinfo(name)
    if info.compress_type != ZSTANDARD:
        return archive.read(name)
    file = archive.fp
    assert file is not None
    file.seek(info.header_offset)
    start = file.read(LOCAL_HEADER)
    file.seek(sum(struct.unpack("<HH", start[LENGTHS:])), 1)
    with pa.CompressedInputStream(pa.BufferReader(file.read(info.compress_size)), "zstd") as stream:
        return bytes(stream.read())


def _of_json(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    log = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(log, dict) or "samples" not in log:
        raise UserError(
            f"{path} holds no documents; of lm-eval's results give the directory, with the samples of --log_samples."
        )
    return log, log["samples"]


def _question(given: Any) -> list[Any]:
    """The texts of a sample's input: a text, or the messages of a conversation, which may have several parts."""
    if not isinstance(given, list):
        return [given]
    contents = [m.get("content") for m in given if m.get("role") == "user"]
    return [t for c in contents for t in ([p.get("text") for p in c] if isinstance(c, list) else [c])]


def _values(name: str, value: Any) -> Iterable[tuple[str, float | None]]:
    """A score's numbers: one, or one for each key of a scorer that gives several."""
    if isinstance(value, Mapping):
        return [(f"{name}/{key}", _grade(v)) for key, v in value.items()]
    return [(name, _grade(value))]


def _grade(value: Any) -> float | None:
    return GRADES[value] if isinstance(value, str) and value in GRADES else number_of(value)
