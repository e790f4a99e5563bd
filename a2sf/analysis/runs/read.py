"""Reads runs: cells and sweeps of this harness, lm-eval's results with logged samples, inspect_ai's logs."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from a2sf.analysis.results.documents import documents_of
from a2sf.analysis.results.labels import budget_label, factor_label
from a2sf.analysis.runs.inspect_logs import runs_of_logs
from a2sf.analysis.runs.lm_eval_samples import run_of_samples, runs_of_directory
from a2sf.analysis.runs.run import Document, Run, TaskRun, texts_to_match
from a2sf.errors import ConfigError, UserError, first_line
from a2sf.store.archive import is_archive, read_sweep
from a2sf.store.runs import StoredCell, finished_cells, is_cell, read_cell, schedule_of

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
                return runs_of_logs(path, logs, cluster)
            if runs := runs_of_directory(path, cluster):
                return runs
            raise UserError(f"{path} holds no results with documents; {ALLOWED}.")
        if path.suffix == ".jsonl":
            return [run_of_samples(path, cluster)]
        if is_archive(path):
            return _of_ours(read_sweep(path), path)
        if path.suffix in (".eval", ".json"):
            return runs_of_logs(path, [path], cluster)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {first_line(error)}); {ALLOWED}.") from error
    raise UserError(f"{path} is none of the results that can be compared; {ALLOWED}.")


def cluster_notes(runs: Sequence[Run], name: str) -> list[str]:
    """What is to be said of the field that dependent documents share: tasks of which no document has it.

    Raises:
        ConfigError: if no document of any run has it.
    """
    tasks = {t: [d for r in runs if t in r.tasks for d in r.tasks[t].documents] for r in runs for t in r.tasks}
    without = [t for t, documents in tasks.items() if all(d.cluster is None for d in documents)]
    if len(without) == len(tasks):
        raise ConfigError(
            "--cluster",
            name,
            "no document has this field (lm-eval: of the document; inspect_ai: of the sample's metadata; cells of a2sf have "
            "what data.cluster named)",
        )
    return [f"No document of {t} has the field {name}, so that they count singly." for t in without]


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
        named = [n for n in varied if n != "schedule" or cell["policy"] != "full"]  # which evicts nothing
        parts += [f"{_setting(stored, n)}{'-shot' if n == 'shots' else ''}" for n in named]
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
            {t: TaskRun(t, tuple(_our_documents(c)), _our_settings(c)) for t, c in tasks.items()},
            model=names[label][1],
            system=names[label][0],
        )
        for label, tasks in ordered
    ]


def _setting(stored: StoredCell, name: str) -> Any:
    return schedule_of(stored.cell) or "step" if name == "schedule" else stored.cell.get(name)


def _our_settings(stored: StoredCell) -> dict[str, Any]:
    version = stored.cell.get("identity", {}).get("task_version")
    known = {"shots": stored.cell.get("shots"), "task version": version}
    return {name: value for name, value in known.items() if value is not None}


def _our_documents(stored: StoredCell) -> Iterator[Document]:
    frame = documents_of(stored)
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
