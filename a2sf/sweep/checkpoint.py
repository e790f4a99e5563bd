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

from a2sf import atomic
from a2sf.scoring.systems import Answer, Member
from a2sf.store.names import EARLIER_DIGITS
from a2sf.sweep.cell import Cell

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
        "cell": _plain(cell.identity),
        "documents": documents,
        "answers": {h: list(a) for h, a in member.answers.items()},
        "seconds": member.seconds,
        "share": member.share,
        "ran": sorted(member.ran),
        "counts": {name: getattr(member.counts, name) for name in COUNTED},
    }
    write_in(_files(directory, cell)[0], json.dumps({"checksum": _checksum(body), **body}))


def write_in(file: Path, text: str) -> None:
    """Write a file of the folder, which another process may just have removed since it was empty.

    Raises:
        OSError: if the disk refuses.
    """
    for last in (False, True):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            return atomic.write(file, text)
        except FileNotFoundError:
            if last:
                raise


def restore(directory: Path, cell: Cell, documents: str, member: Member) -> None:
    """Give a member what was kept for a cell, if anything was, of the same documents."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        here, earlier = _files(directory, cell)
        file = here if here.exists() else earlier
        body = json.loads(file.read_text(encoding="utf-8"))
        checksum = body.pop("checksum")
        known = _plain(cell.identity), cell.id[:EARLIER_DIGITS]
        if checksum != _checksum(body) or body["cell"] not in known or body["documents"] != documents:
            return
        member.answers = {h: Answer(*a) for h, a in body["answers"].items()}
        member.seconds = body["seconds"]
        member.ran = set(body["ran"])
        for name in COUNTED:
            setattr(member.counts, name, body["counts"][name])


def share_of(directory: Path, cell: Cell) -> float:
    """How much of a cell's work is done by what was kept for it; nought where nothing was."""
    for file in _files(directory, cell):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return float(json.loads(file.read_text(encoding="utf-8"))["share"])
    return 0.0


def remove(directory: Path, cell: Cell) -> None:
    """Forget what was kept, now that the cell is finished."""
    with suppress(OSError):
        for file in _files(directory, cell):
            # also of a process that was killed while it wrote
            for left in [file, *file.parent.glob(f".{file.name}.*")]:
                left.unlink(missing_ok=True)
        (directory / FOLDER).rmdir()  # where it was the last


def _files(directory: Path, cell: Cell) -> list[Path]:
    """Where a cell's answers are, and where they were when names had fewer digits."""
    earlier = cell.tail.removesuffix(cell.id) + cell.id[:EARLIER_DIGITS]
    return [directory / FOLDER / f"{tail}.json" for tail in (cell.tail, earlier)]


def _plain(identity: dict[str, Any]) -> Any:
    return json.loads(json.dumps(identity))


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
