"""What a calibration has computed so far, on disk after every passage, so that the same command goes on from there."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from a2sf.experiments.runs import write_atomically


class Partial:
    """Sums over passages, by name.

    Args:
        folder: where the file lies.
        about: all that the numbers depend on; another calibration has another file.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.file = folder / f"{key}.json"
        self._known: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # a file that cannot be read is begun anew
            self._known = json.loads(self.file.read_text())
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> list[Any]:
        """What `add` was given under that name, as arrays, in order."""
        return [np.asarray(x) for x in self._known.get(name, [])]

    def add(self, name: str, values: np.ndarray | float) -> None:
        """Keep the next passage's numbers; they come back exactly as they are."""
        self._known.setdefault(name, []).append(np.asarray(values).tolist())
        write_atomically(self.file, json.dumps(self._known))
