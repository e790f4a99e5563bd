"""The cache directory (`A2SF_CACHE`, default ~/.cache/a2sf): what is stored between runs and can always be made again."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from a2sf import atomic


def cache_directory() -> Path:
    """Where this package stores files between runs."""
    given = os.environ.get("A2SF_CACHE")
    return Path(given) if given is not None else Path.home() / ".cache" / "a2sf"


def stamp(file: Path) -> tuple[int, ...]:
    """What changes with a file's contents: also where it is replaced by another one of the same size and date."""
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def digest(file: Path) -> str:
    """SHA-256 of a file's contents, remembered by its path and `stamp`.

    Raises:
        OSError: if it cannot be read, also where its digest is remembered.
    """
    with file.open("rb") as stream:
        place = _place(file)  # before it is read: it may change meanwhile
        if (known := _remembered(place)) is not None:
            return known
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(place, found)
    except OSError:
        pass  # only a shortcut
    return found


def _place(file: Path) -> Path:
    key = hashlib.sha256("\0".join(map(str, (file.resolve(), *stamp(file)))).encode()).hexdigest()
    return cache_directory() / "digests" / key[:32]


def _remembered(place: Path) -> str | None:
    with suppress(OSError, ValueError):  # none, or another user's in a shared cache
        text = place.read_text(encoding="utf-8")
        return text if len(text) == 64 else None
    return None
