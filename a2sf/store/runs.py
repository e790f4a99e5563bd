"""The directories of runs: a cell's result is written once, atomically, and checked when it is read.

    runs/<sweep>/<cell>/config.yaml         the cell's resolved config
                        result.json         metrics, timings, provenance, checksums; written last
                        documents.parquet   one row per document: log-likelihoods, choices, metrics
                        traces.npz          recorded evictions, if there are any
    runs/<sweep>/results.csv                one row per cell and metric, and per score of a group
                 groups.json                the tasks of the sweep's groups

A cell's directory is made under a temporary name and renamed, so a directory with its final name is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from a2sf import atomic
from a2sf.errors import UserError
from a2sf.store.aggregates import LM_EVAL_STDERR, OPTIONS, TaskGroup, aggregates, groups_from_json, groups_to_json
from a2sf.store.names import ID_DIGITS, Named, distinct

SCHEMA_VERSION = 1
RESULT, DOCUMENTS, CONFIG, TABLE = "result.json", "documents.parquet", "config.yaml", "results.csv"
REPLACED = ".old"
"""Ending of a directory whose cell is being replaced."""
TRACES, GROUPS = "traces.npz", "groups.json"
COMPUTED_WITH = ("torch", "transformers")
"""Libraries whose versions can change a number but are not part of a cell's identity."""
IDENTIFYING = ["model", "policy", "budget_ratio", "forgetting_factor", "shots", "task"]
LEADING_COLUMNS = [*IDENTIFYING, "metric", "value", LM_EVAL_STDERR, "n"]


class DiskError(UserError):
    """Results cannot be written; the sweep stops, because it could not save anything."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report an error of the disk in this block as one sentence about `path`.

    Raises:
        DiskError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path} cannot be written ({error.strerror or error})") from error


class CorruptCell(UserError):
    """The files of a cell are not those that were written."""


@dataclass(frozen=True)
class StoredCell:
    """One finished cell on disk.

    Attributes:
        path: its directory.
        result: `result.json` as written (see docs/results.md for every key).
    """

    path: Path
    result: dict[str, Any]

    @property
    def cell(self) -> dict[str, Any]:
        """The cell's settings: model, policy, budget, forgetting_factor, task, shots, limit, ..."""
        return self.result["cell"]

    @property
    def model(self) -> Named:
        """The model: its name, path, and fingerprint or commit."""
        cell = self.cell
        identity = cell.get("identity", {})
        path = cell.get("model_path") or cell["model"]
        return Named.of(cell["model"], path, identity.get("weights"), identity.get("adapter"))

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """metric name -> {value, stderr, n, higher_is_better}; the standard error is lm-eval's."""
        return self.result["metrics"]

    @property
    def notes(self) -> list[dict[str, Any]]:
        """Notes about its numbers: the `text`, and for a library's warning how many `times` it occurred."""
        return list(self.result.get("notes") or [])

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that computed it, as far as they are stored."""
        return (self.result.get("provenance") or {}).get("versions") or {}

    @property
    def pruned_share(self) -> float | None:
        """Share of the scored tokens that saw a pruned cache; None: not stored, or no token was scored."""
        scored = self.result.get("scored") or {}
        return scored["pruned"] / scored["tokens"] if scored.get("tokens") else None

    @property
    def stopped(self) -> str | None:
        """The number of scored documents (`84 of 200`) if early stopping ended the cell; None: all were scored."""
        until = self.result.get("until") or {}
        return f"{until['seen']} of {until['of']}" if until.get("seen", 0) < until.get("of", 0) else None

    @cached_property
    def documents(self) -> pd.DataFrame:
        """One row per document, in the order of doc_id.

        Raises:
            UserError: if the per-document file is missing or cannot be read.
        """
        file = self.path / DOCUMENTS
        try:
            with file.open("rb") as stream:  # pyarrow fails at a path that is not in the locale's encoding
                documents = pd.read_parquet(stream)
        except Exception as error:  # pyarrow raises several kinds
            raise UserError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
        if {"gold", "choices"} <= set(documents.columns):
            # earlier versions stored a label beyond the choices as it stood: no choice is right
            beyond = documents["gold"] >= documents["choices"].map(len)
            documents["gold"] = documents["gold"].mask(beyond, -1)
        return documents

    def open_traces(self) -> BinaryIO | None:
        """The file that `a2sf.engine.trace.load` reads; None: no evictions were recorded."""
        file = self.path / TRACES
        return file.open("rb") if file.is_file() else None


def write_cell(
    path: Path, result: dict[str, Any], documents: pd.DataFrame, config: str, more: Mapping[str, bytes] | None = None
) -> StoredCell:
    """Write a finished cell to `path`; an existing result is not changed.

    Args:
        more: further files, by name.

    Raises:
        OSError: if the disk is full or cannot be written; then nothing is left behind.
        UserError: if another cell's result is at `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic.placed(path) as temporary:
            _write_files(temporary, result, documents, config, more or {})
    except OSError:
        if not (path / RESULT).exists():  # else another process finished the same cell first
            raise
        existing, cell = read_cell(path).cell, result["cell"]
        if id_of(existing) != id_of(cell):
            raise UserError(f"{path} holds the result of another cell; move it elsewhere") from None
    return read_cell(path)


def rewrite_cell(
    path: Path, result: dict[str, Any], documents: pd.DataFrame, config: str, more: Mapping[str, bytes]
) -> StoredCell:
    """Replace a finished cell by one with more entries; arguments and errors as `write_cell`.

    The new files are complete before the old ones are renamed. If the process is killed just after that, `recover_cells`
    undoes it.
    """
    previous = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{REPLACED}")
    try:
        with atomic.placed(path) as temporary:
            _write_files(temporary, result, documents, config, more)
            path.rename(previous)
    except BaseException:
        if previous.exists() and not path.exists():
            previous.rename(path)
        raise
    shutil.rmtree(previous)
    return read_cell(path)


def recover_cells(directory: Path) -> None:
    """Give cells their names back that a killed process had renamed to replace them (`rewrite_cell`)."""
    for previous in sorted(directory.glob(f".*{REPLACED}")):
        path = directory / previous.name.removeprefix(".").removesuffix(REPLACED).rpartition(".")[0]
        if path.exists():
            shutil.rmtree(previous)
        else:
            atomic.rename(previous, path)


def _write_files(
    directory: Path, result: dict[str, Any], documents: pd.DataFrame, config: str, more: Mapping[str, bytes]
) -> None:
    """Make a cell's directory with its files, `result.json` last."""
    directory.mkdir()
    with (directory / DOCUMENTS).open("wb") as stream:  # pyarrow reads a path in the locale's encoding
        documents.to_parquet(stream, index=False)
    (directory / CONFIG).write_text(config, encoding="utf-8")
    for name, content in more.items():
        (directory / name).write_bytes(content)
    checksums = {name: _sha256(directory / name) for name in (DOCUMENTS, CONFIG, *more)}
    body = {"schema_version": SCHEMA_VERSION, **result, "checksums": checksums}
    body["checksums"][RESULT] = _digest(body)
    text = json.dumps(body, indent=2, sort_keys=True, allow_nan=False) + "\n"
    (directory / RESULT).write_text(text, encoding="utf-8")


def link_cell(source: Path, path: Path) -> None:
    """Add a finished cell of another sweep at `path`, with hard links if the file system supports them."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def copy(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)

    try:
        with atomic.placed(path) as temporary:
            shutil.copytree(source, temporary, copy_function=copy)
    except OSError:
        if not is_cell(path):  # else another process was first
            raise


def read_cell(path: Path) -> StoredCell:
    """The cell stored at `path`, checked against its checksums.

    Raises:
        CorruptCell: if a file is missing, truncated or altered.
    """
    try:
        body = json.loads((path / RESULT).read_text(encoding="utf-8"))
        stated = dict(body["checksums"])
        of_result = stated.pop(RESULT)
        good = _digest({**body, "checksums": stated}) == of_result
        good = good and all(_sha256(path / name) == checksum for name, checksum in stated.items())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCell(f"{path} is not a complete result ({type(error).__name__}: {error})") from error
    if not good:
        raise CorruptCell(f"{path} is not what was written (its checksum differs)")
    return StoredCell(path, body)


def set_aside(path: Path, why: str = "corrupt") -> Path:
    """Rename a corrupt cell, or one with the name of another; returns its new path."""
    target = path.with_name(f".{path.name}.{why}-{uuid.uuid4().hex[:6]}")
    atomic.rename(path, target)
    return target


def is_cell(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".") and (path / RESULT).exists()


def name_of(path: Path) -> str:
    """The last part of a path as text, independent of the locale's encoding."""
    return os.fsencode(path.name).decode("utf-8", "replace")


def tail_of(path: Path) -> str:
    """The end of the name of a cell's directory, which identifies the cell (`Cell.tail`)."""
    return "__".join(path.name.rsplit("__", 2)[1:])


def finished_cells(directory: Path) -> list[StoredCell]:
    """The finished cells of a sweep so far, in the order of their names; empty if there is no such directory.

    Raises:
        CorruptCell: if a cell is damaged.
    """
    return [read_cell(p) for p in sorted(directory.iterdir()) if is_cell(p)] if directory.is_dir() else []


def load_sweep(directory: Path) -> list[StoredCell]:
    """All finished cells of a sweep's directory, in the order of their names.

    Raises:
        UserError: if the directory does not exist or holds no finished cell.
        CorruptCell: if a cell is damaged.
    """
    if not directory.is_dir():
        raise UserError(
            f"{directory} is not a directory; give a sweep's directory under runs/, or an archive of a2sf pack"
        )
    cells = finished_cells(directory)
    if not cells:
        raise UserError(f"{directory} holds no finished cell; run `a2sf run` with that sweep first")
    return cells


def _ratio(cell: dict[str, Any]) -> Any:
    """The ratio of a cell's budget; NaN instead of None, so that the column holds numbers."""
    if not cell["budget"]:
        return math.nan if cell.get("policy_evicts") else 1.0
    ratio = cell["budget"]["ratio"]
    return math.nan if ratio is None else _plain(ratio)


def results_frame(cells: Iterable[StoredCell]) -> pd.DataFrame:
    """One row per cell and metric, `LEADING_COLUMNS` first."""
    rows = []
    cells = list(cells)
    names = distinct(c.model for c in cells)
    for stored in cells:
        cell, result, versions = stored.cell, stored.result, stored.versions
        budget = cell["budget"]
        common = {
            "model": names[stored.model],
            "policy": cell["policy"],
            "budget_ratio": _ratio(cell),
            "forgetting_factor": _plain(cell["forgetting_factor"]),
            "shots": cell["shots"],
            "task": cell["task"],
        }
        more = {
            "model_path": stored.model.path,
            "weights": stored.model.weights,
            "budget_tokens": _plain(budget["tokens"]) if budget else None,
            "budget_base": budget["base"] if budget else None,
            "schedule": schedule_of(cell),
            **{key: _option(cell, key) for key in OPTIONS},
            "policy_settings": json.dumps(cell["policy_settings"], sort_keys=True),
            "limit": cell["limit"],
            "stopped": stored.stopped,
            "seed": cell["seed"],
            "dtype": cell["dtype"],
            "split": result["documents"]["split"],
            "fewshot_split": result["documents"].get("fewshot_split"),
            "data": result["documents"].get("content") or result["documents"].get("fingerprint"),
            "task_version": result["documents"]["task_version"],
            "definition": cell.get("identity", {}).get("definition"),
            "data_settings": json.dumps(cell["data"], sort_keys=True) if cell.get("data") else None,
            "device": cell.get("identity", {}).get("device"),
            **{name: versions.get(name) for name in COMPUTED_WITH},
            "seconds": result["timing"]["seconds"],
            "tokens_per_second": result["timing"]["tokens_per_second"],
            "cell": name_of(stored.path),
        }
        for metric, m in stored.metrics.items():
            scores = {"metric": metric, "value": m["value"], LM_EVAL_STDERR: m["stderr"], "n": m["n"]}
            rows.append(common | scores | more)
    return pd.DataFrame(rows, columns=None if rows else LEADING_COLUMNS)


def as_stored(value: Any) -> Any:
    """A value as it is read back from a JSON file: tuples are lists."""
    return json.loads(json.dumps(value))


def id_of(cell: dict[str, Any]) -> str:
    """The `Cell.id` of a `cell` entry, computed from its identity; the stored id if it has no identity."""
    if "identity" not in cell:
        return str(cell.get("id"))
    return hashlib.sha256(json.dumps(cell["identity"], sort_keys=True).encode()).hexdigest()[:ID_DIGITS]


def settings_of(cell: dict[str, Any]) -> dict[str, Any]:
    """The settings of a `cell` entry, without what identifies its weights and documents."""
    plain = {"schedule": "step"}  # older cells have no schedule
    return plain | {k: v for k, v in cell.items() if k not in ("id", "name", "identity")}


def schedule_of(cell: dict[str, Any]) -> str:
    """The schedule of a `cell` entry in tables: "" for step by step."""
    name = str(cell.get("schedule") or "step")
    return "" if name == "step" else name


def _option(cell: dict[str, Any], key: str) -> Any:
    value = cell.get("options", {}).get(key)
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | bool) else value


def table_of(cells: Iterable[StoredCell], groups: Sequence[TaskGroup]) -> pd.DataFrame:
    """`results_frame` and a row for each group's score, with the number of its tasks in the column `members`."""
    table = results_frame(cells)
    made, _ = aggregates(table, groups)
    return pd.concat([table, made], ignore_index=True) if len(made) else table


def write_groups(directory: Path, groups: Sequence[TaskGroup]) -> None:
    """Store groups in a sweep's directory; a group replaces an earlier one with the same name and shots."""
    if groups:
        known = {(g.name, tuple(m.shots for m in g.members)): g for g in [*read_groups(directory), *groups]}
        directory.mkdir(parents=True, exist_ok=True)
        atomic.write(directory / GROUPS, groups_to_json(known.values()))


def read_groups(directory: Path) -> list[TaskGroup]:
    """The groups that a sweep's directory stores."""
    file = directory / GROUPS
    return groups_from_json(file.read_text(encoding="utf-8")) if file.is_file() else []


def write_table(directory: Path, cells: Iterable[StoredCell]) -> Path:
    """Write `results.csv` of a sweep, atomically."""
    target = directory / TABLE
    atomic.write(target, table_of(cells, read_groups(directory)).to_csv(index=False))
    return target


def _plain(value: Any) -> Any:
    return "/".join(str(v) for v in value) if isinstance(value, list | tuple) else value


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
