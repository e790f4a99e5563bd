"""lm-eval's tasks, groups and tags by name. lm-eval reads 14,000 files for them, for seconds; here they are stored."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from a2sf import atomic
from a2sf.compat import lm_eval
from a2sf.compat.lm_eval import TASKS_DIRECTORY, Entry, Kind
from a2sf.disk_cache import cache_directory, stamp


@cache
def index() -> dict[str, Entry]:
    """lm-eval's entries by name, each without its configuration, which is read from its file when it is needed.

    They are stored with the size and dates of each file beside the definitions: templates, and lm-eval's code that reads
    them. Where any of it differs, they are read again.
    """
    place = cache_directory() / "tasks" / f"{hashlib.sha256(bytes(TASKS_DIRECTORY)).hexdigest()[:16]}.json"
    state = _state(TASKS_DIRECTORY)
    if (stored := _stored(place, state)) is not None:
        return stored
    found = {name: replace(entry, cfg=None) for name, entry in lm_eval.index().items()}
    entries = [[name, e.kind.name, e.yaml_path and str(e.yaml_path), sorted(e.tags)] for name, e in found.items()]
    with suppress(OSError):  # only a shortcut
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(place, json.dumps({"state": state, "entries": entries}))
    return found


def _stored(place: Path, state: str) -> dict[str, Entry] | None:
    with suppress(OSError, ValueError, KeyError, TypeError):  # none, or not what we have written
        read: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        if read["state"] == state:
            return {
                name: Entry(name, Kind[kind], Path(file) if file else None, tags=set(tags))
                for name, kind, file, tags in read["entries"]
            }
    return None


def _state(folder: Path) -> str:
    """What changes with any file of a folder, except compiled code."""
    lines = sorted(f"{file} {stamp(file)}" for file in _files(folder))
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f != "__pycache__"]
        yield from (Path(parent, f) for f in files)
