"""The server: enough of the hub's HTTP interface for huggingface_hub 2, transformers 5 and datasets 5.

Large files are redirected to a second port, as the real hub sends them to another host: huggingface_hub takes the commit
from the redirect's own headers only where it does not follow it, and it follows redirects that stay on the host.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.store import Refused, Repository, Store, is_lfs

CHUNK = 2**16
DATE = "2024-01-01T00:00:00.000Z"
API = re.compile(
    r"/api/(models|datasets)/(.+?)(?:/(revision|tree|paths-info|refs|commits|discussions)(?:/([^/]+)(?:/(.+))?)?)?"
)
FILE = re.compile(r"/(datasets/)?([^/]+(?:/[^/]+)?)/resolve/(refs/[^/]+/[^/]+|[^/]+)/(.+)")


@dataclass
class Rule:
    """A fault: what happens to requests whose path holds `path`.

    Attributes:
        path: a regular expression, searched in the unquoted path.
        method: only this one, or any.
        times: how often, None for always.
        status, code, headers: answer with this status, X-Error-Code and headers.
        stall: seconds before anything is answered.
        break_after: the connection is cut after so many bytes of the body.
        bytes_per_second: how fast the body comes.
        then: called before the answer, as for what happens on the hub meanwhile.
    """

    path: str
    method: str | None = None
    times: int | None = None
    status: int | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    stall: float = 0.0
    break_after: int | None = None
    bytes_per_second: float | None = None
    then: Callable[[], object] | None = None

    def takes(self, method: str, path: str) -> bool:
        if self.method not in (None, method) or not re.search(self.path, path) or self.times == 0:
            return False
        if self.times is not None:
            self.times -= 1
        return True


class Hub:
    """A store's repositories over HTTP, on threads of this process.

    with Hub(Store(folder)) as hub: subprocess.run(command, env=hub.environment(home))

    Attributes:
        rules: the faults, the first that takes a request decides; may be changed at any time.
        url: what HF_ENDPOINT should be.
    """

    def __init__(self, store: Store, port: int = 0) -> None:
        self.store = store
        self.rules: list[Rule] = []
        self._log: list[str] = []
        self._lock = threading.Lock()
        self._listeners = [_Listener(self, port), _Listener(self, 0)]
        self.url, self.files_url = (listener.url for listener in self._listeners)

    def __enter__(self) -> Hub:
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables to set before any library of the hub's is imported; `home` is its cache.

        Requests to other hosts come here as well, as to a proxy: it is logged as CONNECT and refused. Lines on
        the screen are wide enough for what tests look for.
        """
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HTTP_PROXY": self.url,
            "HTTPS_PROXY": self.url,
            "NO_PROXY": "127.0.0.1,localhost",
            "COLUMNS": "200",
        }

    def requests(self) -> list[str]:
        """`METHOD path -> status` of the requests since this was last called."""
        with self._lock:
            lines, self._log = self._log, []
        return lines

    def rule_for(self, method: str, path: str) -> Rule | None:
        with self._lock:
            return next((r for r in self.rules if r.takes(method, path)), None)

    def note(self, line: str) -> None:
        with self._lock:
            self._log.append(line)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub, self.url = hub, f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener
    rule: Rule | None
    extra: dict[str, str]

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def do_CONNECT(self) -> None:
        self.path, self.close_connection = f"/{self.path}", True
        self.rule, self.extra = None, {}
        self._send(502, b"", {})

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else b""
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        self.rule, self.extra = self.server.hub.rule_for(self.command, path), {}
        try:
            if self.rule is not None:
                time.sleep(self.rule.stall)
                if self.rule.then is not None:
                    self.rule.then()
                if self.rule.status is not None:
                    self.extra = self.rule.headers
                    raise Refused(self.rule.status, self.rule.code, "a failure by rule")
            if found := re.fullmatch(r"/files/([0-9a-f]{64})", path):
                return self._file(self.server.hub.store.by_sha256[found[1]], {})
            if path.startswith("/api/"):
                return self._api(url.path)
            self._resolve(path)
        except Refused as error:
            headers = {"X-Error-Message": error.message, **self.extra}
            if error.code:
                headers["X-Error-Code"] = error.code
            self._json({"error": error.message}, error.status, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _repository(self, kind: str, name: str) -> Repository:
        found = Repository(self.server.hub.store.root, kind, name)
        if not found.exists():  # without a token it could as well be private: 401 for both
            raise Refused(404 if "Authorization" in self.headers else 401, "RepoNotFound", "Repository not found")
        return found

    def _gate(self, repository: Repository, commit: str) -> None:
        if repository.settings.get("gated"):
            self.extra = {"X-Repo-Commit": commit}
            message = f"Access to {repository.kind[:-1]} {repository.name} is restricted."
            raise Refused(403 if "Authorization" in self.headers else 401, "GatedRepo", message)

    def _resolve(self, path: str) -> None:
        found = FILE.fullmatch(path)
        if not found:
            raise Refused(404, None, f"this hub has no {path}")
        repository = self._repository("datasets" if found[1] else "models", found[2])
        commit = repository.resolve(unquote(found[3]))
        self._gate(repository, commit)
        self.extra = {"X-Repo-Commit": commit}  # also of a file that is missing, which clients remember by commit
        file = repository.file(commit, found[4])
        sha256, sha1 = self.server.hub.store.digests(file)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if is_lfs(file):
            headers |= {"X-Linked-Size": str(file.stat().st_size), "X-Linked-Etag": f'"{sha256}"'}
            return self._send(302, b"", headers | {"Location": f"{self.server.hub.files_url}/files/{sha256}"})
        self._file(file, headers | {"ETag": f'"{sha1}"'})

    def _api(self, raw: str) -> None:
        found = API.fullmatch(raw)  # still quoted, so that a revision with slashes is one part
        if not found:
            status = 401 if raw.startswith("/api/whoami") else 404
            raise Refused(status, None, f"this hub has no {raw}")
        kind, name, what = found[1], unquote(found[2]), found[3] or "revision"
        revision, under = unquote(found[4] or "main"), unquote(found[5] or "").strip("/")
        repository = self._repository(kind, name)
        if what == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repository.refs.items()]
            return self._json({"branches": branches, "tags": [], "converts": [], "pullRequests": []})
        if what == "discussions":
            return self._json({"discussions": [], "count": 0, "start": 0})
        commit = repository.resolve(revision)
        if what == "revision":
            return self._json(self._info(repository, commit))
        if what == "commits":
            common = {"title": "commit", "message": "", "date": DATE, "authors": []}
            return self._json([{"id": commit, **common}])
        self._gate(repository, commit)
        if what == "paths-info":
            paths = parse_qs(self.body.decode()).get("paths") or json.loads(self.body or b"{}").get("paths", [])
            return self._json([e for p in paths if (e := self._entry(repository, commit, p.strip("/")))])
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        self._json(list(self._tree(repository, commit, under, recursive)))

    def _info(self, repository: Repository, commit: str) -> dict[str, Any]:
        files: list[dict[str, Any]] = [{"rfilename": f} for f in repository.files(commit)]
        if self.query.get("blobs", ["false"])[0].lower() in ("true", "1"):
            for entry in files:
                found = self._entry(repository, commit, entry["rfilename"]) or {}
                entry |= {"blobId": found["oid"], "size": found["size"]}
        gated = "manual" if repository.settings.get("gated") else False
        body = {"_id": commit[:24], "id": repository.name, "sha": commit, "private": False, "gated": gated}
        body |= {"disabled": False, "tags": [], "downloads": 1, "likes": 0, "lastModified": DATE, "createdAt": DATE}
        of_model = {"modelId": repository.name, "library_name": "transformers"} if repository.kind == "models" else {}
        return {**body, **of_model, "siblings": files}

    def _tree(self, repository: Repository, commit: str, under: str, recursive: bool) -> Iterator[dict[str, Any]]:
        files = repository.files(commit, under)
        if under and not files:
            raise Refused(404, "EntryNotFound", f"{under} does not exist on {commit}")
        start = len(under) + 1 if under else 0
        names: dict[str, None] = {}
        for name in files:
            parts = name[start:].split("/")
            for depth in range(1, (len(parts) if recursive else 1) + 1):
                names[name[:start] + "/".join(parts[:depth])] = None
        for name in names:
            if entry := self._entry(repository, commit, name):
                yield entry

    def _entry(self, repository: Repository, commit: str, name: str) -> dict[str, Any] | None:
        file = repository.path / commit / name
        if file.is_dir():
            return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
        if not file.is_file():
            return None
        sha256, sha1 = self.server.hub.store.digests(file)
        size = file.stat().st_size
        lfs = {"lfs": {"oid": sha256, "size": size, "pointerSize": 134}} if is_lfs(file) else {}
        return {"type": "file", "path": name, "oid": sha1, "size": size, **lfs}

    def _file(self, file: Path, headers: dict[str, str]) -> None:
        size = file.stat().st_size
        first, last, status = 0, size - 1, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last, status = int(found[1]), int(found[2] or size - 1), 206
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{size}"}
        left = last - first + 1
        self._head(status, headers | {"Content-Type": "application/octet-stream", "Content-Length": str(left)})
        if self.command == "HEAD":
            return
        rule = self.rule or Rule("")
        allowed = left if rule.break_after is None else min(left, rule.break_after)
        with file.open("rb") as stream:
            stream.seek(first)
            while allowed and (block := stream.read(min(CHUNK, allowed))):
                self.wfile.write(block)
                allowed, left = allowed - len(block), left - len(block)
                if rule.bytes_per_second:
                    time.sleep(len(block) / rule.bytes_per_second)
        if left:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, headers | {"Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        ranged = f" {self.headers['Range']}" if "Range" in self.headers else ""
        self.server.hub.note(f"{self.command} {unquote(self.path)}{ranged} -> {status}")
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
