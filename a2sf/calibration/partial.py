"""What a calibration has computed so far, on disk after every passage, so that the same command goes on from there."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from a2sf import atomic


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
            self._known = json.loads(self.file.read_text(encoding="utf-8"))
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> tuple[int, np.ndarray]:
        """How often `add` was called under that name, and the sum of what it was given."""
        count, total = self._known.get(name, (0, 0.0))
        return count, np.asarray(total)

    def add(self, name: str, values: np.ndarray | float) -> None:
        """Add the next passage's numbers; the sum comes back exactly as it is."""
        count, total = self.get(name)
        self._known[name] = (count + 1, (total + values).tolist())
        atomic.write(self.file, json.dumps(self._known))
