"""What `model.path` may name, with one spelling for each."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from huggingface_hub import constants
from huggingface_hub.errors import HfUriError, HFValidationError
from huggingface_hub.utils import parse_hf_uri, validate_repo_id

from a2sf.errors import ConfigError, nearest

PACKAGE = "pkg://"
GGUF = ".gguf"
KEY = "model.path"
ALLOWED = "give a hub id (owner/name), a directory, a .gguf file, owner/name/file.gguf or a page of the hub"


@dataclass(frozen=True)
class ResolvedPath:
    """What a path names.

    Attributes:
        kind: package (a file in an installed package), file, directory or hub.
        path: its name in results; a local path is absolute.
        revision: branch, tag or commit on the hub; main elsewhere.
        repo, file: on the hub: `owner/name`, and the GGUF file in it ("": a whole checkpoint).
    """

    kind: str
    path: str
    revision: str = "main"
    repo: str = ""
    file: str = ""


def understand(path: str, revision: str = "main") -> ResolvedPath:
    """The source that a path and revision name; what is on the disk comes before what is on the hub.

    Raises:
        ConfigError: if it can name nothing.
    """
    text, revision = str(path).strip(), str(revision or "main").strip()
    if not text:
        raise ConfigError(KEY, "''", ALLOWED)
    if text.startswith(PACKAGE):
        return ResolvedPath("package", text)
    if "://" in text or _host(text):
        return _from_url(text, revision)
    here = os.path.expanduser(text)
    if os.path.isdir(here):
        return ResolvedPath("directory", os.path.abspath(here))
    if os.path.isfile(here):
        if not _is_gguf(here):
            raise ConfigError(KEY, path, "it is a file; give the directory that holds it, or a .gguf file")
        return ResolvedPath("file", os.path.abspath(here))
    if here.startswith((os.sep, f".{os.sep}", f"..{os.sep}", "~")) or here in (".", ".."):
        raise ConfigError(KEY, path, f"there is no such {'file' if _is_gguf(here) else 'directory'}{_beside(here)}")
    return _on_hub(text.strip("/"), revision, path)


def _on_hub(text: str, revision: str, path: str) -> ResolvedPath:
    owner, _, rest = text.partition("/")
    name, _, file = rest.partition("/")
    if _is_gguf(text) and not file:
        raise ConfigError(KEY, path, f"there is no such file{_beside(text)}; one on the hub is owner/name/file.gguf")
    if file and not _is_gguf(file):
        raise ConfigError(
            KEY, path, f"there is no such directory{_beside(text)}, and a hub id has one slash (owner/name)"
        )
    repo = f"{owner}/{name}" if name else owner
    try:
        validate_repo_id(repo)
    except HFValidationError:
        why = f"there is no such directory{_beside(text)}, and the hub has no such names; {ALLOWED}"
        raise ConfigError(KEY, path, why) from None
    return ResolvedPath("hub", f"{repo}/{file}" if file else repo, revision, repo, file)


def _from_url(text: str, revision: str) -> ResolvedPath:
    try:
        found = parse_hf_uri(text, endpoint=constants.ENDPOINT)
    except HfUriError:
        raise ConfigError(
            KEY, text, f"that is no page of a model on the hub ({constants.ENDPOINT}); {ALLOWED}"
        ) from None
    if found.type != "model":
        raise ConfigError(KEY, text, f"that is a {found.type}, not a model; {ALLOWED}")
    if found.path_in_repo and not _is_gguf(found.path_in_repo):
        why = f"of a repository's parts only a .gguf file can be loaded; give {found.id}"
        raise ConfigError(KEY, text, why)
    if found.revision and revision not in ("main", found.revision):
        raise ConfigError(
            "model.revision", revision, f"the link in model.path names {found.revision}; give one of the two"
        )
    return _on_hub("/".join(filter(None, [found.id, found.path_in_repo])), found.revision or revision, text)


def _host(text: str) -> bool:
    """Whether a link was pasted without its https://."""
    endpoint = re.sub("^https?://", "", constants.ENDPOINT)
    return text.lower().startswith(tuple(f"{host}/" for host in (*constants.HF_URL_HOSTS, endpoint)))


def _is_gguf(path: str) -> bool:
    return path.lower().endswith(GGUF)


def _beside(path: str) -> str:
    """What the folder has that a path's last part may have meant, as the end of a sentence."""
    folder, name = os.path.split(path.rstrip(os.sep))
    try:
        return nearest(name, [n for n in os.listdir(folder or ".") if not n.startswith(".")])
    except OSError:
        return ""
