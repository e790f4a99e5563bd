"""Names of folders and runs that are safe for any model, task or sweep; and distinct names of models."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LONGEST_PART = 48
"""Characters of one part of a cell's name, which has up to eight; file systems allow 255 bytes with temporary endings."""
DIGEST = 8
ID_DIGITS = 16
"""Number of hex digits of a cell's hash at the end of its name."""
EARLIER_DIGITS = 8
"""Their number before version 0.2.0; such results are still found and reused."""


def safe(text: str, longest: int = LONGEST_PART) -> str:
    """`text` as part of a file's name: ASCII letters, digits and `._+=,-`; a hash of `text` is added if that changes it.

    Different texts have different names, except with the probability that 32 bits of SHA-256 are equal.
    """
    plain = re.sub(r"[^A-Za-z0-9._+=,-]+", "-", text)
    # "__" separates the parts of a cell's name; a leading dot hides a file
    plain = re.sub(r"_{2,}", "_", plain).lstrip(".")
    if plain and plain == text and len(plain) <= longest:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST]
    return f"{plain[: longest - DIGEST - 1].strip('-')}-{digest}".lstrip("-")


@dataclass(frozen=True)
class Named:
    """A model in results: its name, its path, and the fingerprint of its weights (None: not known)."""

    name: str
    path: str
    weights: str | None

    @classmethod
    def of(cls, name: str, path: str, weights: str | None, adapter: Mapping[str, Any] | None) -> Named:
        """A model; with an adapter (its `path` and `weights`) it is a different model than without."""
        if not adapter:
            return cls(name, path, weights)
        both = hashlib.sha256(f"{weights}+{adapter['weights']}".encode()).hexdigest()[:16]
        return cls(name, f"{path}+{adapter['path']}", both)


def distinct(models: Iterable[Named]) -> dict[Named, str]:
    """A name for each model: equal for the same weights at the same path, different for any others.

    Models with the same name get as much of their paths as distinguishes them; those that have the same path, too, get the
    beginning of their fingerprints.
    """
    of: dict[tuple[str, str | None], str] = {}
    given = sorted(set(models), key=lambda m: (len(m.name), m.name))
    for model in given:
        of.setdefault((model.path, model.weights), model.name)  # one model under two names: the shorter
    sharing: dict[str, list[tuple[str, str | None]]] = {}
    for place, name in of.items():
        sharing.setdefault(name, []).append(place)
    for name, places in sharing.items():
        paths = {path for path, _ in places}
        for path, weights in places:
            label = name
            if len(paths) > 1:
                tail = _tail(path, paths - {path})
                label = tail if tail.rpartition("/")[2] == name else f"{name} ({tail})"
            if len({w for p, w in places if p == path}) > 1:
                label = f"{label} #{(weights or 'unknown')[:DIGEST]}"
            of[path, weights] = label
    return {m: of[m.path, m.weights] for m in given}


def _tail(path: str, others: Iterable[str]) -> str:
    """The shortest end of `path`, as complete parts, that is not the end of another path."""
    parts = path.rstrip("/").split("/")
    ends = {other.rstrip("/") for other in others}
    for n in range(1, len(parts)):
        tail = "/".join(parts[-n:])
        if not any(end == tail or end.endswith(f"/{tail}") for end in ends):
            return tail
    return path
