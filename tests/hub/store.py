"""Repositories on disk, as commits that branches and tags name.

A repository is a directory `root/<models|datasets>/<owner>/<name>/` with `refs.json` (branch or tag -> commit),
`settings.json` (gated, …) and one directory of files per commit.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGE = 10 * 2**20
LFS_SUFFIXES = {".safetensors", ".bin", ".parquet", ".gguf", ".arrow", ".h5"}


class Refused(Exception):
    """To answer with an error; `code` is the header X-Error-Code, by which clients tell errors of one status apart."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Repository:
    """`kind` is models or datasets, `name` is `owner/name`."""

    root: Path
    kind: str
    name: str

    @property
    def path(self) -> Path:
        return self.root / self.kind / self.name

    @property
    def refs(self) -> dict[str, str]:
        return self._json("refs.json")

    @property
    def settings(self) -> dict[str, Any]:
        return self._json("settings.json")

    def exists(self) -> bool:
        return (self.path / "refs.json").is_file()

    def commit(self, files: Mapping[str, Path | bytes | str], ref: str | None = "main") -> str:
        """Make a commit of exactly these files (name -> a file, or its contents) and let `ref` name it; gives its hash."""
        digest = hashlib.sha1(f"{self.kind}/{self.name}/{len(list(self.path.glob('*')))}".encode())
        target = self.path / digest.hexdigest()
        for name, content in files.items():
            file = target / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                file.symlink_to(content.resolve())
            else:
                file.write_bytes(content.encode() if isinstance(content, str) else content)
        if ref is not None:
            self.move(ref, target.name)
        return target.name

    def commit_folder(self, folder: Path, ref: str | None = "main") -> str:
        """`commit` of a folder's files."""
        return self.commit({f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}, ref)

    def move(self, ref: str, commit: str) -> None:
        """Let a branch or tag name a commit."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "refs.json").write_text(json.dumps(self.refs | {ref: commit}))

    def forget(self, commit: str) -> None:
        """Remove a commit, as a force-push does."""
        shutil.rmtree(self.path / commit)

    def set(self, **settings: Any) -> None:
        """`gated=True`: files only for those who have access, which is nobody."""
        (self.path / "settings.json").write_text(json.dumps(self.settings | settings))

    def resolve(self, revision: str) -> str:
        commit = self.refs.get(revision, revision)
        if not re.fullmatch("[0-9a-f]{40}", commit) or not (self.path / commit).is_dir():
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def files(self, commit: str, under: str = "") -> list[str]:
        base = self.path / commit
        found = (p.relative_to(base).as_posix() for p in sorted(base.rglob("*")) if p.is_file())
        return [f for f in found if not under or f == under or f.startswith(f"{under}/")]

    def file(self, commit: str, name: str) -> Path:
        file = self.path / commit / name
        if not file.is_file():
            raise Refused(404, "EntryNotFound", "Entry not found")
        return file

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        return json.loads(file.read_text()) if file.is_file() else {}


@dataclass
class Store:
    """All repositories under one directory, and what their files hash to."""

    root: Path
    by_sha256: dict[str, Path] = field(default_factory=dict)
    _known: dict[tuple[Any, ...], tuple[str, str]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def model(self, name: str) -> Repository:
        return Repository(self.root, "models", name)

    def dataset(self, name: str) -> Repository:
        return Repository(self.root, "datasets", name)

    def digests(self, file: Path) -> tuple[str, str]:
        """SHA-256 and git's blob SHA-1 of a file, each computed once."""
        stat = file.stat()
        key = (file.resolve(), stat.st_size, stat.st_mtime_ns)
        with self._lock:
            if key not in self._known:
                content = file.read_bytes()
                blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content)
                self._known[key] = hashlib.sha256(content).hexdigest(), blob.hexdigest()
            self.by_sha256[self._known[key][0]] = file
            return self._known[key]


def is_lfs(file: Path) -> bool:
    return file.suffix in LFS_SUFFIXES or file.stat().st_size >= LARGE
