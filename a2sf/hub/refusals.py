"""An error of the hub as one sentence that says what to do: for models and for documents.

An error is recognised by its type, its status and its causes, never by its first line: libraries wrap errors in errors.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants, get_token
from huggingface_hub import errors as hub

from a2sf.errors import ConfigError, UserError, first_line

HTTP_LIBRARIES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp"}
BROKEN = {"RemoteProtocolError", "ReadError", "ChunkedEncodingError", "ClientPayloadError"}
CACHED_SHOWN = 5
FIRST_LOOK = "model=smollm2-135m data=bundle"


@dataclass(frozen=True)
class Wanted:
    """What was requested of the hub, and by which key of the configuration.

    Attributes:
        repo: `owner/name`.
        kind: model or dataset.
        key, value: what the user set; `value` None: the repository.
        revision_key: what sets the revision.
    """

    repo: str
    kind: str = "model"
    revision: str = "main"
    key: str = "model.path"
    value: str | None = None
    revision_key: str = "model.revision"

    @property
    def page(self) -> str:
        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"


class HubError(ConfigError):
    """The hub, or the way to it, did not give what a key names. The message says why and what to do."""

    def __init__(self, key: str, value: object, why: str) -> None:
        self.key, self.value, self.allowed = key, value, why
        UserError.__init__(self, f"{key}={value} cannot be loaded: {why}.")


class NotOnHub(HubError):
    """The hub has no repository of that name, or does not show it."""


class Unreachable(HubError):
    """The hub cannot be reached, or does not answer as it should; it may work at another time."""


def refusal(error: BaseException, wanted: Wanted) -> ConfigError:
    """The sentence for an error of huggingface_hub, transformers, datasets or the libraries that they use."""
    for cause in chain(error):
        if isinstance(cause, ConfigError):
            return cause
    value = wanted.value or wanted.repo
    for find in (_refused, _unwritable, _answered, _no_way):
        for cause in chain(error):
            if (found := find(cause, wanted)) is not None:
                kind, why = found
                if kind is _Revision:
                    return HubError(wanted.revision_key, wanted.revision, why)
                return kind(wanted.key, value, why)
    return HubError(wanted.key, value, f"{type(error).__name__}: {first_line(error)}")


def unfetched(error: BaseException) -> str | None:
    """What a library could not fetch and why, as the beginning of a sentence; None for an error that is not about that."""
    for cause in chain(error):
        module, name = type(cause).__module__.partition(".")[0], type(cause).__name__
        of_hub = module in {*HTTP_LIBRARIES, "huggingface_hub"} or name == "DatasetNotFoundError"
        named = re.search(r"'([\w.-]+/[\w.-]+)'", str(cause))
        if of_hub or (named and isinstance(cause, ConnectionError | TimeoutError)):
            what = f"{named[1]} cannot be fetched" if named else "a file cannot be fetched"
            offline = "HF_HUB_OFFLINE is set, and it is not in the cache"
            return f"{what} from the hub ({offline if constants.is_offline_mode() else first_line(cause)})"
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def cached_repositories(kind: str = "model") -> list[str]:
    """The repositories of which something is in the hub's cache folder."""
    found = sorted(Path(constants.HF_HUB_CACHE).glob(f"{kind}s--*/snapshots"))
    return [f.parent.name.removeprefix(f"{kind}s--").replace("--", "/") for f in found]


class _Revision(HubError):
    pass


_Found = tuple[type[HubError], str] | None


def _refused(error: BaseException, wanted: Wanted) -> _Found:
    """What the hub says of the repository, whatever the status."""
    if isinstance(error, hub.GatedRepoError):
        if get_token():
            return HubError, f"your account has no access to it; ask for it at {wanted.page}, then start again"
        return HubError, (
            f"its authors grant access on request: ask for access at {wanted.page}, then log in (`hf auth login`, or set "
            "HF_TOKEN)"
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return _Revision, f"{wanted.repo} has no such branch, tag or commit; {wanted.page}/tree/main lists them"
    if isinstance(error, hub.RepositoryNotFoundError):
        login = (
            "your account does not see it" if get_token() else "it is private (then `hf auth login`, or set HF_TOKEN)"
        )
        here = "it is not on this disk, and " if wanted.kind == "model" else ""
        return NotOnHub, f"{here}the hub ({constants.ENDPOINT}) has no {wanted.kind} of that name, or {login}"
    if isinstance(error, hub.DisabledRepoError):
        return HubError, f"the hub has disabled it ({wanted.page})"
    if isinstance(error, hub.HFValidationError):
        return HubError, f"that is no name the hub can have ({first_line(error)})"
    return None


def _unwritable(error: BaseException, wanted: Wanted) -> _Found:
    if not isinstance(error, OSError) or error.errno is None:
        return None
    where = error.filename or constants.HF_HUB_CACHE
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT):
        return HubError, (
            f"the hub's cache folder cannot be written ({where}: {error.strerror}); set HF_HOME to a folder that can"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            HubError,
            f"the disk of the hub's cache folder is full ({where}); make room, or set HF_HOME to another disk",
        )
    return None


def _answered(error: BaseException, wanted: Wanted) -> _Found:
    """An answer with a status that says something."""
    if isinstance(error, hub.FileMetadataError):
        return HubError, f"what answers at {constants.ENDPOINT} is not a hub; check HF_ENDPOINT and the proxy"
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "status", None)
    if not isinstance(status, int):
        return None
    host = urlsplit(constants.ENDPOINT).hostname
    if status == 401:
        why = "does not accept your token (401); log in again" if get_token() else "asks who you are (401); log in"
        return HubError, f"{host} {why} (`hf auth login`, or set HF_TOKEN)"
    if status == 403:
        return HubError, f"{host} forbids it (403); check at {wanted.page} what your account or token may read"
    if status == 429:
        seconds = response.headers.get("Retry-After") if response is not None else None
        when = f"in {seconds} s" if seconds else "in a few minutes"
        login = "" if get_token() else ", or log in (`hf auth login`), which allows more"
        return Unreachable, f"{host} has had too many requests from here (429); start again {when}{login}"
    if status >= 500:
        return Unreachable, f"{host} has a problem of its own ({status}); try again later, what is cached stays"
    if status == 404:
        return HubError, f"{wanted.repo} does not have this file ({first_line(error)})"
    return HubError, f"{host} refused it ({status}: {first_line(error)})"


def _no_way(error: BaseException, wanted: Wanted) -> _Found:
    """No answer at all."""
    host = urlsplit(constants.ENDPOINT).hostname
    name = type(error).__name__
    of_http = type(error).__module__.partition(".")[0] in HTTP_LIBRARIES
    part = "holds only a part of" if wanted.repo in cached_repositories(wanted.kind) else "does not hold"
    lacks = f"{part} {wanted.repo}" + (
        ", nor is there a folder of that name" if (wanted.key, wanted.kind) == ("model.path", "model") else ""
    )
    if constants.is_offline_mode() and isinstance(error, OFFLINE):
        why = f"HF_HUB_OFFLINE is set, and the hub's cache {lacks}; unset it to download"
        return Unreachable, why + _what_there_is(wanted)
    if of_http and name == "ProxyError":
        return Unreachable, f"the proxy on the way to {host} refuses ({first_line(error)}); check HTTPS_PROXY"
    broke = isinstance(error, OSError) and "Consistency check failed" in str(error)
    if broke or (of_http and name in BROKEN):
        why = f"the line to {host} broke ({first_line(error)}); start again, complete files are not downloaded again"
        return Unreachable, why
    if of_http or isinstance(error, ConnectionError | TimeoutError):
        why = f"{host} cannot be reached ({name}: {first_line(error)}), and the hub's cache {lacks}; check the network"
        return Unreachable, why + _what_there_is(wanted)
    return None


OFFLINE = (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, hub.RevisionResolutionError)


def _what_there_is(wanted: Wanted) -> str:
    if wanted.key.startswith("policy."):  # no other model's file would do
        return ""
    cached = cached_repositories(wanted.kind)
    more = f" and {len(cached) - CACHED_SHOWN} more" if len(cached) > CACHED_SHOWN else ""
    held = f", take what is cached ({', '.join(cached[:CACHED_SHOWN])}{more})" if cached else ""
    if wanted.kind == "dataset":
        return f"{held}, or give data=bundle for tasks that the data wheel holds, which needs no network"
    return f"{held}, or for a first look {FIRST_LOOK}, which need no network"
