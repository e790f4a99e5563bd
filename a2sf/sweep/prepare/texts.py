"""Which documents share a text (`data.cluster`): checked before cells are computed, and added to finished cells."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from a2sf.errors import ConfigError, UserError, counted, nearest
from a2sf.store.runs import CONFIG, TRACES, StoredCell, read_cell, rewrite_cell
from a2sf.sweep.cell import Cell
from a2sf.tasks import shared_texts
from a2sf.tasks.spec import TaskSpec, provenance


class Fields(NamedTuple):
    """What is known of a task's documents: their fields, and the one whose text several documents share."""

    of_document: list[str]
    shared: str | None


Known: TypeAlias = Mapping[tuple[TaskSpec, int], Fields]
"""Of tasks with their seeds that have been made, so that none is made again for it."""


def check_field(cells: Sequence[Cell]) -> Known:
    """Refuse a field in `data.cluster` that no task has, if the documents of all tasks are on this machine.

    Returns:
        What was found, for `record_texts`.

    Raises:
        ConfigError: with the fields of a task's documents.
    """
    specs = _specs(cells)
    if not all(spec.here for spec, _ in specs):
        return {}
    known = {(spec, seed): fields for spec, seed in specs if (fields := _fields(spec, seed)) is not None}
    _without(cells, known)
    return known


def record_texts(
    cells: Sequence[Cell], done: Collection[str], directory: Path, known: Known | None = None
) -> list[str]:
    """Check the field that `data.cluster` names, and add each document's text to finished cells that do not have it.

    Args:
        cells: all cells of a sweep, with their documents downloaded.
        done: names of the cells that are finished, in `directory`.
        known: what `check_field` found.

    Returns:
        What the user should know, one sentence each.

    Raises:
        ConfigError: if no task has such a field.
    """
    known, notes = dict(known or {}), []
    for spec, seed in _specs(cells):
        if (spec, seed) not in known and (found := _fields(spec, seed)) is not None:
            known[spec, seed] = found
    known = {key: known[key] for key in _specs(cells) if key in known}
    noted, unknown = 0, 0
    for (spec, seed), (_, field) in known.items():
        of_task = [c for c in cells if c.name in done and (c.spec, c.seed) == (spec, seed)] if field else []
        stored = [
            s for c in of_task if (s := read_cell(directory / c.name)).result["documents"].get("cluster") != field
        ]
        if not stored or field is None or (built := _built(spec, seed)) is None:
            continue
        for one in stored:
            noted, unknown = (noted + 1, unknown) if _note(one, built, field) else (noted, unknown + 1)
    cluster, without = next((c.data.cluster for c in cells if c.data.cluster), None), _without(cells, known)
    if without:
        notes.append(
            f"data.cluster={cluster}: the documents of {', '.join(without)} have no such field; each counts as a text."
        )
    if noted:
        notes.append(f"Which documents share a text ({cluster}) is now recorded in {counted(noted, 'finished cell')}.")
    if unknown:
        left = counted(unknown, "finished cell")
        notes.append(f"Which documents share a text is not recorded in {left}, because the documents have changed.")
    return notes


def _specs(cells: Sequence[Cell]) -> list[tuple[TaskSpec, int]]:
    return sorted({(c.spec, c.seed) for c in cells if c.data.cluster}, key=str)


def _built(spec: TaskSpec, seed: int) -> Any:
    """The task with its documents; None: they cannot be loaded, which is reported where they are downloaded."""
    try:
        return spec.build(seed)
    except UserError:
        return None


def _fields(spec: TaskSpec, seed: int) -> Fields | None:
    """What is known of a task's documents; None: they cannot be loaded."""
    if (built := _built(spec, seed)) is None:
        return None
    return Fields(shared_texts.fields(built), shared_texts.field_of(built, spec.data.cluster))


def _without(cells: Sequence[Cell], known: Known) -> list[str]:
    """The names of the tasks without the field in `data.cluster`.

    Raises:
        ConfigError: if no task has it.
    """
    without = {spec.name: has for (spec, _), (has, _) in known.items() if str(spec.data.cluster) not in has}
    if without and len(without) == len({spec.name for spec, _ in _specs(cells)}):
        cluster = next(c.data.cluster for c in cells if c.data.cluster)
        task, has = next(iter(without.items()))
        hint = nearest(str(cluster), has)
        raise ConfigError("data.cluster", cluster, f"the documents of {task} have the fields {', '.join(has)}{hint}")
    return list(without)


def _note(stored: StoredCell, task: Any, field: str) -> bool:
    """Add the texts to a finished cell; False if the task's documents are not those of the cell."""
    keys = dict(enumerate(shared_texts.key_of(d, field) for d in task.eval_docs))
    if stored.result["documents"]["fingerprint"] != provenance(task)["fingerprint"]:
        return False
    documents = stored.documents.copy()
    documents[shared_texts.COLUMN] = documents["doc_id"].map(keys)
    result = {k: v for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
    result["documents"] |= {"cluster": field, "clusters": int(documents[shared_texts.COLUMN].nunique())}
    traces = stored.path / TRACES
    more = {TRACES: traces.read_bytes()} if traces.is_file() else {}
    rewrite_cell(stored.path, result, documents, (stored.path / CONFIG).read_text(encoding="utf-8"), more)
    return True
