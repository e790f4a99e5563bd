"""Requests to the hub at one commit: the list of a repository's files, and the files, through the hub's own cache.

A commit never changes, so what is in the cache is used without a request.
"""

from __future__ import annotations

import glob
import re
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import tqdm

from a2sf import atomic
from a2sf.errors import ConfigError, first_line
from a2sf.hub.refusals import HubError, Unreachable, Wanted, chain, refusal

COMMIT = re.compile("[0-9a-f]{40}")
_listed: dict[tuple[str, str, str], dict[str, int]] = {}
"""(kind, repository, commit) -> sizes, of what was requested in this process."""


def is_commit(revision: str) -> bool:
    return COMMIT.fullmatch(revision) is not None


def commit_of(wanted: Wanted) -> tuple[str, str | None]:
    """The commit that a revision is now, and a note for the user if that is only what the cache knows.

    Raises:
        ConfigError: if neither the hub nor the cache knows it.
    """
    if is_commit(wanted.revision):
        return wanted.revision, None
    try:
        return _ask(wanted), None
    except Exception as error:
        ref = _cache(wanted) / "refs" / wanted.revision
        known = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
        if not (_cache(wanted) / "snapshots" / known).is_dir() or not is_commit(known):
            raise refusal(error, wanted) from error
        return known, f"{wanted.repo}: {_why_not(error)}; what the cache has is used, commit {known[:12]}."


def _why_not(error: Exception) -> str:
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    root = list(chain(error))[-1]
    status = getattr(getattr(root, "response", None), "status_code", None)
    answer = f"status {status}" if status else f"{type(root).__name__}: {first_line(root)}"
    return f"the hub did not answer ({answer})"


def _ask(wanted: Wanted) -> str:
    """The commit from the hub; its files are recorded, and the commit for when the hub cannot be reached."""
    info: Any = HfApi().repo_info(
        wanted.repo,
        repo_type=wanted.kind,
        revision=wanted.revision,
        files_metadata=True,
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
    )
    assert info.sha is not None
    _listed[wanted.kind, wanted.repo, info.sha] = {f.rfilename: f.size or 0 for f in info.siblings or ()}
    if not is_commit(wanted.revision):
        ref = _cache(wanted) / "refs" / wanted.revision
        with suppress(OSError):  # only for later; a cache that cannot be written is reported when it is needed
            ref.parent.mkdir(parents=True, exist_ok=True)
            atomic.write(ref, info.sha)
    return info.sha


def _cache(wanted: Wanted) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=wanted.repo, repo_type=wanted.kind)


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at a commit; `wanted.revision` is that commit."""

    wanted: Wanted

    @property
    def folder(self) -> Path:
        return _cache(self.wanted) / "snapshots" / self.wanted.revision

    @cached_property
    def _listing(self) -> tuple[dict[str, int], ConfigError | None]:
        wanted = self.wanted
        with suppress(CachedRepoTreeNotFoundError):
            tree = get_cached_repo_tree(wanted.repo, repo_type=wanted.kind, revision=wanted.revision)
            return {f.path: f.size for f in tree}, None
        key = wanted.kind, wanted.repo, wanted.revision
        if key not in _listed:
            try:
                _ask(wanted)
            except Exception as error:
                refused = refusal(error, wanted)
                if not self.folder.is_dir():
                    raise refused from error
                files = (f for f in self.folder.rglob("*") if f.is_file())
                return {f.relative_to(self.folder).as_posix(): f.stat().st_size for f in files}, refused
        return _listed[key], None

    @property
    def sizes(self) -> dict[str, int]:
        """Every file's size in bytes. Without a way to the hub: of those that the cache holds.

        Raises:
            ConfigError: if there is no such repository or commit, or nothing is known of it.
        """
        return self._listing[0]

    @property
    def refused(self) -> ConfigError | None:
        """Why only what the cache holds is known; None if everything is."""
        return self._listing[1]

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those that are not in the cache yet."""
        return [n for n in names if not (self.folder / n).is_file()]

    def get(self, names: Iterable[str], stop: threading.Event | None = None) -> Path:
        """The snapshot's folder, with these files in it; what is there already is not requested again.

        Args:
            stop: set from elsewhere, ends a download after the piece that is arriving.

        Raises:
            ConfigError: if the hub does not give them.
        """
        if left := self.missing(names):
            wanted = self.wanted
            repo, kind, commit = wanted.repo, wanted.kind, wanted.revision
            try:
                if (kind, repo, commit) not in _listed:
                    _ask(wanted)  # else the library would try for a long time where there is no way to the hub
                snapshot_download(
                    repo,
                    repo_type=kind,
                    revision=commit,
                    allow_patterns=[glob.escape(n) for n in left],
                    tqdm_class=_until(stop) if stop else None,
                )
                if left := self.missing(left):  # it gives a folder that lacks them where the hub could not be reached
                    hf_hub_download(repo, left[0], repo_type=kind, revision=commit)
                    left = self.missing(left)
            except Exception as error:
                raise refusal(error, wanted) from error
            if left:
                raise HubError(wanted.key, wanted.value or wanted.repo, f"the hub did not give {left[0]}; start again")
        return self.folder


def arrived(wanted: Wanted) -> int:
    """Bytes of a repository in the cache, those of unfinished files included."""
    total = 0
    for file in (_cache(wanted) / "blobs").glob("*"):
        with suppress(OSError):  # it was finished and renamed meanwhile
            total += file.stat().st_size
    return total


class _Stopped(Exception):
    pass


def _until(stop: threading.Event) -> type[tqdm]:
    """A hidden progress bar: a download reports each piece to it, and it is the only way to end a download."""

    class Until(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise _Stopped
            return super().update(n)

    return Until


def snapshot(wanted: Wanted) -> Snapshot:
    """The files of a revision at its present commit."""
    commit, _ = commit_of(wanted)
    return Snapshot(replace(wanted, revision=commit))


__all__ = ["HubError", "Snapshot", "Unreachable", "Wanted", "commit_of", "is_commit", "refusal", "snapshot"]
