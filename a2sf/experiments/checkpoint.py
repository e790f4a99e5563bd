"""Answers of unfinished cells, kept in the sweep's folder until the cell is finished.

    runs/<sweep>/.checkpoints/<end of the cell's name>.json   what is known of a cell that was interrupted

Written whole or not at all, with a checksum; a file that is not what was written counts for nothing.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from a2sf.evaluation.members import Answer, Member
from a2sf.experiments.cell import Cell
from a2sf.experiments.runs import write_atomically

FOLDER = ".checkpoints"
COUNTED = ("computed", "needed", "together", "scored")


def write(directory: Path, cell: Cell, documents: str, member: Member) -> None:
    """Keep what a member has computed for a cell.

    Args:
        documents: their fingerprint.

    Raises:
        OSError: if the disk refuses.
    """
    body = {
        "cell": cell.id,
        "documents": documents,
        "answers": {h: list(a) for h, a in member.answers.items()},
        "seconds": member.seconds,
        "ran": sorted(member.ran),
        "counts": {name: getattr(member.counts, name) for name in COUNTED},
    }
    write_in(_file(directory, cell), json.dumps({"checksum": _checksum(body), **body}))


def write_in(file: Path, text: str) -> None:
    """Write a file of the folder, which another process may just have removed since it was empty.

    Raises:
        OSError: if the disk refuses.
    """
    for last in (False, True):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            return write_atomically(file, text)
        except FileNotFoundError:
            if last:
                raise


def restore(directory: Path, cell: Cell, documents: str, member: Member) -> None:
    """Give a member what was kept for a cell, if anything was, of the same documents."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        body = json.loads(_file(directory, cell).read_text(encoding="utf-8"))
        checksum = body.pop("checksum")
        if checksum != _checksum(body) or (body["cell"], body["documents"]) != (cell.id, documents):
            return
        member.answers = {h: Answer(*a) for h, a in body["answers"].items()}
        member.seconds = body["seconds"]
        member.ran = set(body["ran"])
        for name in COUNTED:
            setattr(member.counts, name, body["counts"][name])


def remove(directory: Path, cell: Cell) -> None:
    """Forget what was kept, now that the cell is finished."""
    file = _file(directory, cell)
    with suppress(OSError):
        for left in [file, *file.parent.glob(f".{file.name}.*")]:  # also of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        file.parent.rmdir()  # where it was the last


def _file(directory: Path, cell: Cell) -> Path:
    return directory / FOLDER / f"{cell.tail}.json"


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
