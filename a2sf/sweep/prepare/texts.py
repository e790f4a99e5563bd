"""Which documents share a text (`data.cluster`): checked before cells are computed, and added to finished cells."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from a2sf.errors import ConfigError, UserError, counted, nearest
from a2sf.store.runs import CONFIG, TRACES, StoredCell, read_cell, rewrite_cell
from a2sf.sweep.cell import Cell
from a2sf.tasks import shared_texts
from a2sf.tasks.spec import provenance


def check_field(cells: Sequence[Cell]) -> None:
    """Refuse a field in `data.cluster` that no task has, if the documents of all tasks are on this machine.

    Raises:
        ConfigError: with the fields of a task's documents.
    """
    specs = {(c.spec, c.seed) for c in cells if c.data.cluster}
    if all(spec.here for spec, _ in specs):
        record_texts(cells, (), Path())


def record_texts(cells: Sequence[Cell], done: Collection[str], directory: Path) -> list[str]:
    """Check the field that `data.cluster` names, and add each document's text to finished cells that do not have it.

    Args:
        cells: all cells of a sweep, with their documents downloaded.
        done: names of the cells that are finished, in `directory`.

    Returns:
        What the user should know, one sentence each.

    Raises:
        ConfigError: if no task has such a field.
    """
    specs = sorted({(c.spec, c.seed) for c in cells if c.data.cluster}, key=str)
    without: dict[str, list[str]] = {}
    notes, noted, unknown = [], 0, 0
    for spec, seed in specs:
        try:
            built = spec.build(seed)
        except UserError:
            continue  # reported already, when its documents were downloaded
        if str(spec.data.cluster) not in (has := shared_texts.fields(built)):
            without[spec.name] = has
        field = shared_texts.field_of(built, spec.data.cluster)
        for cell in cells:
            if field and cell.name in done and (cell.spec, cell.seed) == (spec, seed):
                stored = read_cell(directory / cell.name)
                if stored.result["documents"].get("cluster") != field:
                    noted, unknown = (noted + 1, unknown) if _note(stored, built, field) else (noted, unknown + 1)
    cluster = next((c.data.cluster for c in cells if c.data.cluster), None)
    if without and len(without) == len({spec.name for spec, _ in specs}):
        task, has = next(iter(without.items()))
        hint = nearest(str(cluster), has)
        raise ConfigError("data.cluster", cluster, f"the documents of {task} have the fields {', '.join(has)}{hint}")
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
