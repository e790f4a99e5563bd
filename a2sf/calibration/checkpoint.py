"""The sums that a calibration has computed so far, written after every passage, so that a repeated command resumes."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from a2sf import atomic


class Checkpoint:
    """Sums over passages, by name, kept in a file.

    Args:
        folder: where the file is.
        about: everything that the numbers depend on, as JSON data; its hash is the name of the file.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.file = folder / f"{key}.json"
        self._known: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # an unreadable file is replaced
            self._known = json.loads(self.file.read_text(encoding="utf-8"))
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> tuple[int, np.ndarray]:
        """How many times `add` was called with that name, and the sum of its values."""
        count, total = self._known.get(name, (0, 0.0))
        return count, np.asarray(total)

    def add(self, name: str, values: np.ndarray | float) -> None:
        """Add the values of the next passage. The file holds every sum exactly."""
        count, total = self.get(name)
        self._known[name] = (count + 1, (total + values).tolist())
        atomic.write(self.file, json.dumps(self._known))
