"""The cache directory (`A2SF_CACHE`, default ~/.cache/a2sf): what is kept between runs and can always be made anew."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_directory() -> Path:
    """What this package keeps between runs."""
    return Path(os.environ.get("A2SF_CACHE", Path.home() / ".cache" / "a2sf"))


def digest(file: Path) -> str:
    """SHA-256 of a file's contents, remembered by path, size and time of change."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    known = cache_directory() / "digests" / key[:32]
    if known.exists() and len(text := known.read_text(encoding="utf-8")) == 64:
        return text
    with file.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        temporary = known.with_name(f"{known.name}.{os.getpid()}")
        temporary.write_text(found, encoding="utf-8")
        temporary.replace(known)
    except OSError:
        pass  # only a shortcut
    return found
