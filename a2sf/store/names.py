"""Names: of folders and runs, safe whatever a model, task or sweep is called; of models, told apart where they end alike."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LONGEST_PART = 48
"""Of a cell's name, which has up to eight parts; file systems allow 255 bytes, and temporary names add some."""
DIGEST = 8
ID_DIGITS = 16
"""Hex digits of a cell's hash at the end of its name."""
EARLIER_DIGITS = 8
"""How many there were in names before 0.2.0; such results are still found and reused."""


def safe(text: str, longest: int = LONGEST_PART) -> str:
    """`text` as part of a file's name: ASCII letters, digits and `._+=,-`; what is changed or cut gets a hash of the whole.

    Two different texts never come to the same name but where 32 bits of SHA-256 do.
    """
    plain = re.sub(r"[^A-Za-z0-9._+=,-]+", "-", text)
    # "__" is what separates the parts of a cell's name; a leading dot hides a file
    plain = re.sub(r"_{2,}", "_", plain).lstrip(".")
    if plain and plain == text and len(plain) <= longest:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST]
    return f"{plain[: longest - DIGEST - 1].strip('-')}-{digest}".lstrip("-")


@dataclass(frozen=True)
class Named:
    """A model as results know it: the name it was given, where it was, and what its weights are (None: not known)."""

    name: str
    path: str
    weights: str | None

    @classmethod
    def of(cls, name: str, path: str, weights: str | None, adapter: Mapping[str, Any] | None) -> Named:
        """A model with an adapter (its `path` and `weights`), which is another one than without."""
        if not adapter:
            return cls(name, path, weights)
        both = hashlib.sha256(f"{weights}+{adapter['weights']}".encode()).hexdigest()[:16]
        return cls(name, f"{path}+{adapter['path']}", both)


def distinct(models: Iterable[Named]) -> dict[Named, str]:
    """A name for each model, the same for the same weights at the same place, another for any other.

    Models that share a name get as much of their paths as tells them apart, and those that share a path, too, the
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
            told = name
            if len(paths) > 1:
                tail = _tail(path, paths - {path})
                told = tail if tail.rpartition("/")[2] == name else f"{name} ({tail})"
            if len({w for p, w in places if p == path}) > 1:
                told = f"{told} #{(weights or 'unknown')[:DIGEST]}"
            of[path, weights] = told
    return {m: of[m.path, m.weights] for m in given}


def _tail(path: str, others: Iterable[str]) -> str:
    """The shortest end of `path`, in whole parts, that no other path ends with."""
    parts = path.rstrip("/").split("/")
    ends = {other.rstrip("/") for other in others}
    for n in range(1, len(parts)):
        tail = "/".join(parts[-n:])
        if not any(end == tail or end.endswith(f"/{tail}") for end in ends):
            return tail
    return path
