"""A record of what a tracker has logged, so that nothing is logged twice when a sweep is started again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Marks:
    """A file with a line per logged run: its name and a hash of its contents. Several processes may write to it.

    Args:
        file: in the directory of the logs, so that both are deleted together.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._read = -1
        self._known: set[str] = set()

    def has(self, name: str, digest: str) -> bool:
        """Whether this run was logged with these contents."""
        try:
            size = self.file.stat().st_size
            if size != self._read:
                self._known = set(self.file.read_text(encoding="utf-8").splitlines())
                self._read = size
        except OSError:  # the file does not exist
            self._read, self._known = -1, set()
        return _line(name, digest) in self._known

    def add(self, name: str, digest: str) -> None:
        """Record that a run was logged.

        Raises:
            OSError: if the disk is full or cannot be written.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{_line(name, digest)}\n")


def _line(name: str, digest: str) -> str:
    return json.dumps([name, digest])


def digest_of(contents: Mapping[str, Any] | str) -> str:
    """A hash of a result, or of a table as text."""
    text = contents if isinstance(contents, str) else json.dumps(contents, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
