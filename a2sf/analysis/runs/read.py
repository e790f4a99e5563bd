"""Reads runs: cells and sweeps of this harness, lm-eval's results with logged samples, inspect_ai's logs."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from a2sf.analysis.results.labels import budget_label, factor_label
from a2sf.analysis.runs.run import Document, Run, TaskRun, texts_to_match
from a2sf.errors import UserError, first_line
from a2sf.store.archive import is_archive, read_sweep
from a2sf.store.runs import StoredCell, finished_cells, is_cell, read_cell, schedule_of

SAMPLES = re.compile(r"samples_(?P<task>.+)_(?P<time>\d{4}-\d{2}-\d{2}T[\d.:-]+)\.jsonl")
"""lm-eval's file of one task's documents (`--log_samples --output_path`)."""
GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
"""inspect_ai's grades: correct, partly correct, incorrect, no answer."""
ALLOWED = (
    "give a cell or sweep of a2sf (a directory or .a2sf.zip), the output directory of lm-eval with logged samples "
    "(--output_path with --log_samples) or one of its samples_*.jsonl, or a log of inspect_ai (.eval or .json)"
)


def read_runs(path: Path, cluster: str | None = None) -> list[Run]:
    """The runs in a file or directory: several for a sweep with several systems.

    Args:
        cluster: the field of the documents whose value dependent documents share (lm-eval: of the document; inspect_ai: of
            the sample's metadata).

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; {ALLOWED}.")
    try:
        if path.is_dir():
            if is_cell(path):
                return _of_ours([read_cell(path)], path)
            if cells := finished_cells(path):
                return _of_ours(cells, path)
            if logs := sorted(path.rglob("*.eval")):
                return [_of_inspect(log, cluster) for log in logs]
            return [_of_lm_eval(path, _newest(path), cluster)]
        if path.suffix == ".jsonl":
            return [_of_lm_eval(path, {_task_of(path): path}, cluster)]
        if is_archive(path):
            return _of_ours(read_sweep(path), path)
        if path.suffix in (".eval", ".json"):
            return [_of_inspect(path, cluster)]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {first_line(error)}); {ALLOWED}.") from error
    raise UserError(f"{path} is none of the results that can be compared; {ALLOWED}.")


def _of_ours(cells: Sequence[StoredCell], path: Path) -> list[Run]:
    """One run for each system: policy and settings, budget, schedule, model and shots."""
    systems: dict[str, dict[str, StoredCell]] = {}
    names: dict[str, tuple[str, str]] = {}  # label -> system and model
    varied = [n for n in ("schedule", "shots") if len({str(_setting(c, n)) for c in cells}) > 1]
    several = len({str(c.cell["model"]) for c in cells}) > 1
    for stored in cells:
        cell = stored.cell
        parts = [cell["policy_label"]]
        if cell["budget"]:
            written = {k: "/".join(map(str, v)) if isinstance(v, list) else v for k, v in cell["budget"].items()}
            parts.append(budget_label(False, written.get("ratio"), written.get("tokens"), written.get("base"))[0])
        factor = cell.get("forgetting_factor")
        if factor is not None:
            parts.append(f"a={factor_label('/'.join(map(str, factor)) if isinstance(factor, list) else factor)}")
        parts += [f"{_setting(stored, n)}{'-shot' if n == 'shots' else ''}" for n in varied]
        system, model = " ".join(parts), str(cell["model"])
        label = f"{system} {model}" if several else system
        names[label] = system, model
        tasks = systems.setdefault(label, {})
        other = tasks.setdefault(cell["task"], stored)
        if other.cell.get("identity") != cell.get("identity"):
            raise UserError(
                f"{path} has several cells of one policy, budget and task, such as {other.path.name} and "
                f"{stored.path.name}; give the directories of cells instead."
            )
        if stored.result["documents"]["n"] > other.result["documents"]["n"]:
            tasks[cell["task"]] = stored
    # the full cache first, as the reference
    ordered = sorted(systems.items(), key=lambda item: next(iter(item[1].values())).cell["policy"] != "full")
    return [
        Run(
            label,
            str(path),
            {t: TaskRun(t, tuple(_our_documents(c))) for t, c in tasks.items()},
            model=names[label][1],
            system=names[label][0],
        )
        for label, tasks in ordered
    ]


def _setting(stored: StoredCell, name: str) -> Any:
    return schedule_of(stored.cell) or "step" if name == "schedule" else stored.cell.get(name)


def _our_documents(stored: StoredCell) -> Iterator[Document]:
    frame = stored.documents
    metrics = [c for c in map(str, frame) if c.startswith("metric/")]
    for row in frame.to_dict("records"):
        yield Document(
            hash=str(row["doc_hash"]),
            texts=texts_to_match([row.get("context")]),
            cluster=str(row["cluster"]) if isinstance(row.get("cluster"), str) else None,
            values={
                m.removeprefix("metric/"): _values({str(k): v for k, v in row.items()}, m)
                for m in metrics
                if row[m] == row[m]
            },
        )


def _values(row: Mapping[str, Any], column: str) -> list[float]:
    """A document's value of a metric, or that of each of several answers."""
    drawn = row.get(f"draws/{column}")
    return [float(row[column])] if drawn is None else [float(v) for v in drawn]


def _task_of(path: Path) -> str:
    match = SAMPLES.fullmatch(path.name)
    return match["task"] if match else path.stem.removeprefix("samples_")


def _newest(directory: Path) -> dict[str, Path]:
    """lm-eval's samples below a directory, the newest of each task."""
    found: dict[str, tuple[str, Path]] = {}
    for path in directory.rglob("samples_*.jsonl"):
        if match := SAMPLES.fullmatch(path.name):
            found[match["task"]] = max(found.get(match["task"], ("", path)), (match["time"], path))
    if not found:
        raise UserError(f"{directory} holds no results with documents; {ALLOWED}.")
    return {task: path for task, (_, path) in sorted(found.items())}


def _of_lm_eval(path: Path, files: Mapping[str, Path], cluster: str | None) -> Run:
    tasks = {}
    for task, file in files.items():
        documents: dict[Any, Document] = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            document = documents.setdefault(
                sample["doc_id"],
                Document(hash=sample["doc_hash"], texts=_lm_eval_texts(sample), cluster=_field(sample["doc"], cluster)),
            )
            end = "" if sample.get("filter", "none") == "none" else f",{sample['filter']}"
            for metric in sample.get("metrics", ()):
                if (value := _number(sample.get(metric))) is not None:
                    document.values.setdefault(f"{metric}{end}", []).append(value)
        tasks[task] = TaskRun(task, tuple(documents.values()))
    return Run(path.name, str(path), tasks)


def _lm_eval_texts(sample: Mapping[str, Any]) -> frozenset[str]:
    """The prompt, and the fields of the document but for its answer."""
    document, first = sample["doc"], sample["arguments"]
    while isinstance(first, Mapping | list) and first:  # {"gen_args_0": {"arg_0": prompt, ...}}, or lists
        first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
    fields = document.values() if isinstance(document, Mapping) else [document]
    return texts_to_match([first, *(v for v in fields if v != sample.get("target"))])


def _of_inspect(path: Path, cluster: str | None) -> Run:
    header, samples = _inspect_zip(path) if zipfile.is_zipfile(path) else _inspect_json(path)
    task = str(header["eval"]["task"]).rpartition("/")[2]
    documents: dict[str, Document] = {}
    for sample in samples:
        scores = {n: v for n, s in (sample.get("scores") or {}).items() if (v := _grade(s.get("value"))) is not None}
        if not scores:
            continue  # it failed, and has no score
        document = documents.setdefault(
            str(sample["id"]),
            Document(
                id=str(sample["id"]),
                texts=texts_to_match(_question(sample["input"])),
                cluster=_field(sample.get("metadata"), cluster),
            ),
        )
        for name, value in scores.items():
            document.values.setdefault(name, []).append(value)
    return Run(path.stem, str(path), {task: TaskRun(task, tuple(documents.values()))})


def _inspect_zip(path: Path) -> tuple[dict[str, Any], Iterable[dict[str, Any]]]:
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("samples/") and n.endswith(".json"))
        header = json.loads(
            archive.read("header.json" if "header.json" in archive.namelist() else "_journal/start.json")
        )
        return header, [json.loads(archive.read(n)) for n in names]


def _inspect_json(path: Path) -> tuple[dict[str, Any], Iterable[dict[str, Any]]]:
    log = json.loads(path.read_text(encoding="utf-8"))
    return log, log["samples"]


def _question(given: Any) -> list[Any]:
    """The texts of a sample's input: a text, or the messages of a conversation."""
    return [m.get("content") for m in given if m.get("role") == "user"] if isinstance(given, list) else [given]


def _grade(value: Any) -> float | None:
    return GRADES[value] if isinstance(value, str) and value in GRADES else _number(value)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, bool | int | float) and value == value else None


def _field(document: Any, name: str | None) -> str | None:
    found = document.get(name) if name is not None and isinstance(document, Mapping) else None
    return None if found is None else json.dumps(found, sort_keys=True, default=str)
