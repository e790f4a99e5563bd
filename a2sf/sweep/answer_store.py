"""The answers of a group's cells: in memory, and on disk until each cell's result is written.

    runs/<sweep>/.checkpoints/<end of the cell's name>.json   the answers of an unfinished cell

A file is written whole or not at all, with a checksum; a damaged file is ignored.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from a2sf import atomic
from a2sf.hf.warned import Warned
from a2sf.scoring.systems import Answer, Answers
from a2sf.store.names import EARLIER_DIGITS
from a2sf.store.runs import StoredCell, as_stored, writing
from a2sf.sweep.cell import Cell

FOLDER = ".checkpoints"
COUNTS = ("computed", "needed", "together", "scored")


class AnswerStore:
    """Answers by cell.

    Args:
        directory: of the sweep.
        documents: fingerprint of the group's documents; answers to other documents are not used.
        seconds: after so much time `save_due` writes.
    """

    def __init__(self, directory: Path, documents: str, seconds: float) -> None:
        self.directory, self.documents, self.seconds = directory, documents, seconds
        self._cells: dict[str, Cell] = {}
        self._answers: dict[str, Answers] = {}
        self._saved = time.monotonic()

    def add(self, cell: Cell, answers: Answers, finished: StoredCell | None, keys: Collection[str]) -> None:
        """Add a cell, with its known answers: from a result with fewer documents, and from an interrupted run.

        Args:
            keys: the keys of the requests that need an answer.
        """
        self._cells[cell.name], self._answers[cell.name] = cell, answers
        answers.progress.requests = len(keys)
        answers.known = {k: a for k, a in known_answers(finished, self.documents).items() if k in keys}
        self._restore(cell, answers)
        answers.computed = {k: a for k, a in answers.computed.items() if k in keys and k not in answers.known}

    def __getitem__(self, name: str) -> Answers:
        return self._answers[name]

    @property
    def all(self) -> dict[str, Answers]:
        """By a cell's name; those that are finished are left out."""
        return dict(self._answers)

    @property
    def finished(self) -> list[str]:
        """Names of the cells that need no more computation: every request has an answer, or the cell failed."""
        return [name for name, a in self._answers.items() if a.complete or a.error is not None]

    def save_due(self) -> None:
        """Write the answers of unfinished cells, if they were last written at least `seconds` ago.

        Raises:
            DiskError: if the disk refuses.
        """
        if time.monotonic() - self._saved >= self.seconds:
            self.save(self._answers)
            self._saved = time.monotonic()

    def save(self, names: Iterable[str]) -> None:
        """Write the answers of some cells.

        Raises:
            DiskError: if the disk refuses.
        """
        with writing(self.directory):
            for name in names:
                if self._answers[name].computed:
                    self._write(self._cells[name], self._answers[name])

    def finish(self, name: str) -> None:
        """Forget a cell, whose result is written."""
        remove(self.directory, self._cells[name])
        del self._answers[name]

    def drop(self, name: str) -> None:
        """Forget a cell that failed; its answers on disk stay."""
        del self._answers[name]

    def _write(self, cell: Cell, answers: Answers) -> None:
        body = {
            "cell": as_stored(cell.identity),
            "documents": self.documents,
            "answers": {key: list(a) for key, a in answers.computed.items()},
            "seconds": answers.progress.seconds,
            "share": answers.share,
            "ran": sorted(answers.ran),
            "warned": answers.warned.notes,
            "counts": {name: getattr(answers.counts, name) for name in COUNTS},
        }
        write_in(_files(self.directory, cell)[0], json.dumps({"checksum": _checksum(body), **body}))

    def _restore(self, cell: Cell, answers: Answers) -> None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            here, earlier = _files(self.directory, cell)
            file = here if here.exists() else earlier
            body = json.loads(file.read_text(encoding="utf-8"))
            checksum = body.pop("checksum")
            identities = as_stored(cell.identity), cell.id[:EARLIER_DIGITS]
            if checksum != _checksum(body) or body["cell"] not in identities or body["documents"] != self.documents:
                return
            answers.computed = {key: Answer(*a) for key, a in body["answers"].items()}
            answers.progress.seconds = body["seconds"]
            answers.ran = set(body["ran"])
            answers.warned = Warned.of(body.get("warned", ()))
            for name in COUNTS:
                setattr(answers.counts, name, body["counts"][name])


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


def share_of(directory: Path, cell: Cell) -> float:
    """How much of a cell's work is done, from 0 to 1, by the answers on disk."""
    for file in _files(directory, cell):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return float(json.loads(file.read_text(encoding="utf-8"))["share"])
    return 0.0


def remove(directory: Path, cell: Cell) -> None:
    """Remove the answers of a cell whose result is written."""
    with suppress(OSError):
        for file in _files(directory, cell):
            # also of a process that was killed while it wrote
            for left in [file, *file.parent.glob(f".{file.name}.*")]:
                left.unlink(missing_ok=True)
        (directory / FOLDER).rmdir()  # where it was the last


def _files(directory: Path, cell: Cell) -> list[Path]:
    """The file of a cell's answers, and its name in versions whose names had fewer digits."""
    earlier = cell.tail.removesuffix(cell.id) + cell.id[:EARLIER_DIGITS]
    return [directory / FOLDER / f"{tail}.json" for tail in (cell.tail, earlier)]


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def known_answers(stored: StoredCell | None, documents: str) -> dict[str, Answer]:
    """By a request's key, the answers in a finished result of the same documents."""
    if stored is None or stored.result["documents"]["fingerprint"] != documents:
        return {}
    known: dict[str, Answer] = {}
    if "target" in stored.documents:
        return _known_texts(stored.documents)
    columns = ["request_hashes", "loglikelihoods", "is_greedy", "context_tokens", "continuation_tokens"]
    for prefix in ("", "more/"):
        if f"{prefix}{columns[0]}" in stored.documents:
            for row in stored.documents[[f"{prefix}{c}" for c in columns]].itertuples(index=False):
                known.update({h: Answer(float(x), bool(g), int(c), int(n)) for h, x, g, c, n in zip(*row, strict=True)})
            if f"{prefix}cached_tokens" in stored.documents:
                counted = stored.documents[[f"{prefix}{columns[0]}", f"{prefix}cached_tokens"]]
                for keys, cached in counted.itertuples(index=False):
                    for key, n in zip(keys, cached, strict=True):
                        known[key] = known[key]._replace(cached=None if n is None else [float(x) for x in n])
    return known


def _known_texts(documents: pd.DataFrame) -> dict[str, Answer]:
    """The same of a task that generates text; nothing where the texts were not stored."""
    if "generated" not in documents:
        return {}
    known: dict[str, Answer] = {}
    columns = ["generated", "ended", "finish", "tokens", "thinking", "thinking_tokens"]
    columns += ["turns"] if "turns" in documents else []
    several = [f"draws/{c}" for c in columns]
    for row in documents.to_dict("records"):
        keys, lengths = row["request_hashes"], zip(row["context_tokens"], row["continuation_tokens"], strict=True)
        of_draws = zip(*(row[c] for c in several), strict=True) if len(keys) > 1 else [[row.get(c) for c in columns]]
        held = dict(zip(keys, row.get("cached_tokens", [None] * len(keys)), strict=True))
        for key, (context, length), (text, ended, finish, tokens, thinking, thought, *turns) in zip(
            keys, lengths, of_draws, strict=True
        ):
            known[key] = Answer(
                text,
                False,
                int(context),
                int(length),
                None if pd.isna(ended) else bool(ended),  # older results do not say
                finish or None,
                None if tokens is None else [int(t) for t in tokens],
                thinking or "",
                int(thought or 0),
                None if (n := held[key]) is None else [float(x) for x in n],
                [int(n) for n in turns[0]] if turns else None,
            )
    return known
