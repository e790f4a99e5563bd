"""lm-eval's results with logged samples: `samples_<task>_<time>.jsonl`, one line for each document and filter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from a2sf.analysis.results.documents import is_mean
from a2sf.analysis.runs.run import Document, Run, TaskRun, field_of, number_of, texts_to_match

SAMPLES = re.compile(r"samples_(?P<task>.+)_(?P<time>\d{4}-\d{2}-\d{2}T[\d.:-]+)\.jsonl")
"""lm-eval's file of one task's documents (`--log_samples --output_path`)."""
NOT_METRICS = ("doc_id",)
"""Numbers of a sample that are no metrics, where it does not name its metrics (older versions of lm-eval)."""

PARTS = ("perplexity",)
"""Metrics of lm-eval with a number for each document of which the score is not the mean."""


def runs_of_directory(path: Path, cluster: str | None = None) -> list[Run]:
    """The runs below an output directory: one for each folder with samples (lm-eval makes one for each model).

    Of several files of a task in one folder the newest counts, which a note says.
    """
    folders: dict[Path, dict[str, list[tuple[str, Path]]]] = {}
    for file in path.rglob("samples_*.jsonl"):
        if match := SAMPLES.fullmatch(file.name):
            folders.setdefault(file.parent, {}).setdefault(match["task"], []).append((match["time"], file))
    runs = []
    for folder, tasks in sorted(folders.items()):
        label = path.name if len(folders) == 1 else folder.relative_to(path).as_posix()
        newest = {task: max(files)[1] for task, files in sorted(tasks.items())}
        older = [task for task, files in tasks.items() if len(files) > 1]
        notes = [f"{label}: {t} has {len(tasks[t])} files; the newest, {newest[t].name}, is compared." for t in older]
        runs.append(_run(label, folder if len(folders) > 1 else path, newest, cluster, tuple(notes)))
    return runs


def run_of_samples(path: Path, cluster: str | None = None) -> Run:
    """The run of one file of samples."""
    match = SAMPLES.fullmatch(path.name)
    return _run(path.name, path, {match["task"] if match else path.stem.removeprefix("samples_"): path}, cluster)


def _run(label: str, source: Path, files: Mapping[str, Path], cluster: str | None, notes: tuple[str, ...] = ()) -> Run:
    tasks = {}
    for task, file in files.items():
        results = _results(file)
        documents = _documents(file, cluster)
        _drop_parts(documents, results.get("results", {}).get(task, {}))
        tasks[task] = TaskRun(task, documents, _settings(task, results))
    return Run(label, str(source), tasks, notes=notes)


def _results(samples: Path) -> dict[str, Any]:
    """The results that lm-eval writes beside its samples, if they are there."""
    match = SAMPLES.fullmatch(samples.name)
    file = samples.with_name(f"results_{match['time']}.json") if match else samples
    if match is None or not file.exists():
        return {}
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return results


def _drop_parts(documents: Iterable[Document], scores: Mapping[str, Any]) -> None:
    """Leave out numbers of which a task's score is not the mean, as of perplexity, whose numbers are log-likelihoods.

    Args:
        scores: by metric and filter, as lm-eval's results have them; empty if they are not there.
    """
    documents = list(documents)
    for metric in {m for d in documents for m in d.values}:
        values = [v for d in documents for v in d.values.get(metric, ())]
        name, _, filtered = metric.partition(",")
        score = (
            number_of(scores.get(f"{name},{filtered or 'none'}"))
            if all(metric in d.values for d in documents)
            else None
        )
        if name in PARTS or not is_mean(values, score):
            for document in documents:
                document.values.pop(metric, None)


def _settings(task: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Shots and version of a task, from lm-eval's results."""
    known = {"shots": results.get("n-shot", {}).get(task), "task version": results.get("versions", {}).get(task)}
    return {name: value for name, value in known.items() if value is not None}


def _documents(file: Path, cluster: str | None) -> tuple[Document, ...]:
    found: dict[Any, Document] = {}
    # not splitlines: lm-eval writes line separators of Unicode inside of texts as they are
    for line in filter(str.strip, file.read_text(encoding="utf-8").split("\n")):
        sample = json.loads(line)
        document = found.setdefault(
            sample["doc_id"],
            Document(hash=sample["doc_hash"], texts=_texts(sample), cluster=field_of(sample["doc"], cluster)),
        )
        end = "" if sample.get("filter", "none") == "none" else f",{sample['filter']}"
        for metric in _metrics(sample):
            if (value := number_of(sample.get(metric))) is not None:
                document.values.setdefault(f"{metric}{end}", []).append(value)
    return tuple(found.values())


def _metrics(sample: Mapping[str, Any]) -> Iterable[str]:
    return sample.get("metrics") or [
        k for k, v in sample.items() if isinstance(v, int | float) and k not in NOT_METRICS
    ]


def _texts(sample: Mapping[str, Any]) -> frozenset[str]:
    """The prompt, and the fields of the document but for its answer."""
    document, first = sample["doc"], sample["arguments"]
    while isinstance(first, Mapping | list) and first:  # {"gen_args_0": {"arg_0": prompt, ...}}, or lists
        first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
    fields = document.values() if isinstance(document, Mapping) else [document]
    return texts_to_match([first, *(v for v in fields if v != sample.get("target"))])
