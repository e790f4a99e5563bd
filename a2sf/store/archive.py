"""A sweep as one file: all results, per-document rows, provenance and configurations.

    x.a2sf.zip   cells.json          per cell: name, result (without checksums), configuration, columns of its documents
                 documents.parquet   the documents of all cells, with a column for the cell
                 results.csv         for a reader without this package
                 groups.json         the tasks of the sweep's groups
                 traces/<cell>.npz   recorded evictions, if there are any
                 README.md           if the sweep's directory has one

The archive's comment is the SHA-256 of all bytes before it. Texts that several cells share are stored once, so an archive
has about a twentieth of the directory's size.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from a2sf import atomic
from a2sf.errors import UserError
from a2sf.store.aggregates import TaskGroup, groups_from_json
from a2sf.store.runs import (
    CONFIG,
    DOCUMENTS,
    GROUPS,
    TABLE,
    TRACES,
    CorruptCell,
    StoredCell,
    finished_cells,
    id_of,
    load_sweep,
    read_groups,
    table_of,
    write_cell,
    write_groups,
    write_table,
)

SUFFIX = ".a2sf.zip"
CELLS, README = "cells.json", "README.md"
OWNER = "cell"
"""Column of `documents.parquet`: the position of the row's cell in `cells.json`."""
DIGEST_BYTES = 64


def is_archive(path: Path) -> bool:
    return path.name.endswith(SUFFIX) and path.is_file()


def place_of(path: Path) -> Path:
    """The default directory of an archive's sweep: next to it, with its name."""
    return path.with_name(path.name.removesuffix(SUFFIX))


def pack(directory: Path, target: Path | None = None, *, traces: bool = True) -> Path:
    """Write a sweep's finished cells to one archive, atomically.

    Args:
        target: the archive's file; by default next to the directory, with its name.
        traces: whether recorded evictions are included; those of long texts are far larger than all results.

    Raises:
        UserError: if there is nothing to pack, or a cell is damaged.
    """
    cells = load_sweep(directory)
    target = target or directory.with_name(directory.name + SUFFIX)
    if not target.name.endswith(SUFFIX):
        target = target.with_name(target.name + SUFFIX)
    tables, about = [], []
    for i, stored in enumerate(cells):
        table = pq.read_table(io.BytesIO((stored.path / DOCUMENTS).read_bytes())).replace_schema_metadata(None)
        result = {k: v for k, v in stored.result.items() if k != "checksums"}
        config = (stored.path / CONFIG).read_text(encoding="utf-8")
        about.append({"name": stored.path.name, "result": result, "config": config, "columns": table.column_names})
        tables.append(table.append_column(OWNER, pa.array([i] * len(table), pa.int32())))
    # rows of one document next to each other, so that compression finds their equal texts
    together = pa.concat_tables(tables, promote_options="permissive").sort_by(
        [("doc_hash", "ascending"), (OWNER, "ascending")]
    )
    rows = io.BytesIO()
    pq.write_table(together, rows, compression="zstd", row_group_size=max(1, len(together)))

    with atomic.placed(target) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(CELLS, json.dumps(about, sort_keys=True, allow_nan=False))
            archive.writestr(DOCUMENTS, rows.getvalue())
            archive.writestr(TABLE, table_of(cells, read_groups(directory)).to_csv(index=False))
            if (directory / GROUPS).is_file():
                archive.write(directory / GROUPS, GROUPS)
            for stored in cells if traces else ():
                if (recorded := stored.path / TRACES).is_file():
                    archive.write(recorded, f"traces/{stored.path.name}.npz")
            if (directory / README).is_file():
                archive.write(directory / README, README)
            archive.comment = b"0" * DIGEST_BYTES
        with temporary.open("r+b") as file:
            digest = hashlib.sha256(file.read()[:-DIGEST_BYTES]).hexdigest()
            file.seek(-DIGEST_BYTES, os.SEEK_END)
            file.write(digest.encode())
    return target


@dataclass(frozen=True)
class ArchivedCell(StoredCell):
    """A cell that is read from an archive; `path` is its place if the archive is unpacked.

    Attributes:
        config: its `config.yaml`.
        columns: of its documents.
        number: its position in the archive.
    """

    config: str = ""
    columns: tuple[str, ...] = ()
    number: int = 0
    archive: _Archive | None = field(default=None, repr=False, compare=False)

    @cached_property
    def documents(self) -> pd.DataFrame:
        """One row per document, in the order of doc_id."""
        assert self.archive is not None
        return self.archive.documents(self.number, list(self.columns))

    def open_traces(self) -> io.BytesIO | None:
        assert self.archive is not None
        return self.archive.member(f"traces/{self.path.name}.npz")


class _Archive:
    """An archive with a valid checksum; its documents are read on first use."""

    def __init__(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
        if hashlib.sha256(content[:-DIGEST_BYTES]).hexdigest().encode() != content[-DIGEST_BYTES:]:
            raise CorruptCell(f"{path} is not the archive that was packed (its checksum differs); get another copy")
        self.zip = zipfile.ZipFile(io.BytesIO(content))

    def member(self, name: str) -> io.BytesIO | None:
        return io.BytesIO(self.zip.read(name)) if name in self.zip.namelist() else None

    @cached_property
    def _rows(self) -> dict[int, pa.Table]:
        table = pq.read_table(io.BytesIO(self.zip.read(DOCUMENTS))).sort_by(
            [(OWNER, "ascending"), ("doc_id", "ascending")]
        )
        counts = table.column(OWNER).value_counts().to_pylist()
        found, start = {}, 0
        for number, n in sorted((c["values"], c["counts"]) for c in counts):
            found[number] = table.slice(start, n)
            start += n
        return found

    def documents(self, number: int, columns: list[str]) -> pd.DataFrame:
        return self._rows[number].select(columns).to_pandas()


def read_archive(path: Path) -> list[ArchivedCell]:
    """The cells of an archive, in the order of their names. It is not unpacked.

    Raises:
        CorruptCell: if its checksum is wrong.
        UserError: if it cannot be read.
    """
    archive = _Archive(path)
    place = place_of(path)
    about: list[dict[str, Any]] = json.loads(archive.zip.read(CELLS))
    return [
        ArchivedCell(place / a["name"], a["result"], a["config"], tuple(a["columns"]), i, archive)
        for i, a in enumerate(about)
    ]


def read_sweep(path: Path | str) -> Sequence[StoredCell]:
    """The finished cells of a sweep's directory or of an archive.

    Raises:
        UserError: as `load_sweep` and `read_archive`.
    """
    path = Path(path)
    return read_archive(path) if is_archive(path) else load_sweep(path)


def groups_of(path: Path) -> list[TaskGroup]:
    """The groups of a sweep's directory or of an archive.

    Raises:
        CorruptCell, UserError: as `read_archive`.
    """
    if not is_archive(path):
        return read_groups(path)
    stored = _Archive(path).member(GROUPS)
    return groups_from_json(stored.getvalue().decode()) if stored else []


def unpack(path: Path, directory: Path) -> list[StoredCell]:
    """Write an archive's cells to a sweep's directory, so that `a2sf run` can resume it; existing cells are not changed.

    Returns:
        The cells that were written.

    Raises:
        CorruptCell: if the archive's checksum is wrong, or an existing cell is damaged.
        UserError: as `read_archive`; or if an existing cell has the name of another cell of the archive.
        OSError: if the disk is full or cannot be written.
    """
    written = []
    cells = read_archive(path)
    existing = {s.path.name: _key(s) for s in finished_cells(directory)}
    for cell in cells:
        if existing.get(cell.path.name, _key(cell)) != _key(cell):
            path_of_other = directory / cell.path.name
            raise UserError(f"{path_of_other} is not the archive's cell of that name; give another directory")
    known = set(existing.values())
    for cell in cells:
        target = directory / cell.path.name
        if _key(cell) in known:
            continue
        traces = cell.open_traces()
        more = {TRACES: traces.getvalue()} if traces else {}
        written.append(write_cell(target, cell.result, cell.documents, cell.config, more))
    write_groups(directory, groups_of(path))
    note = _Archive(path).member(README)
    if note is not None and not (directory / README).exists():
        (directory / README).write_bytes(note.getvalue())
    write_table(directory, load_sweep(directory))
    return written


def _key(stored: StoredCell) -> str:
    """A text that is equal for results of the same cell, even if the names of their directories differ."""
    return json.dumps([id_of(stored.cell), stored.cell.get("limit"), stored.cell.get("until")], sort_keys=True)
