"""What tests run in another process, where the address of the hub is set before the libraries are imported."""

from __future__ import annotations

import io
import runpy
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

SCRIPTS = Path(__file__).parents[2] / "scripts"


class Done(NamedTuple):
    code: int
    out: str
    err: str


def evaluate(*arguments: str) -> Done:
    """`python scripts/evaluate.py ...` in this process, whose imports are behind it."""
    out, err = io.StringIO(), io.StringIO()
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    sys.argv = [str(SCRIPTS / "evaluate.py"), *arguments]
    code = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def load(path: str, **more: object) -> str:
    """`ok`, the fingerprint and the format of a model that was pinned, fetched and loaded; or the sentence."""
    from a2sf.app import process
    from a2sf.errors import UserError
    from a2sf.hf import loading

    process.quiet()
    try:
        spec, note = loading.pin(loading.ModelSpec(path, device="cpu", **more))  # type: ignore[arg-type]
        for download in loading.prepare(spec):
            download.run()
        loaded = loading.load(spec)
    except UserError as error:
        return str(error)
    return " ".join(filter(None, ["ok", loaded.fingerprint, loaded.format, note]))


def prepare(path: str) -> None:
    """Check a model as far as it goes without its weights."""
    from a2sf.hf import loading

    loading.prepare(loading.pin(loading.ModelSpec(path, device="cpu"))[0])


def interrupted(path: str) -> list[str]:
    """What is in the cache after a download that was interrupted."""
    from a2sf.errors import UserError
    from a2sf.hf import loading

    (download,) = loading.prepare(loading.pin(loading.ModelSpec(path, device="cpu"))[0])
    stop = threading.Event()
    stop.set()
    with suppress(UserError):
        download.run(stop)
    return [f.name for f in download.snapshot.folder.iterdir()]


def gates(name: str, revision: str = "main", fetch: bool = False) -> dict[str, Any] | str:
    """What identifies gates of the hub, and the scores of a token where they are fetched; or the sentence."""
    import torch

    from a2sf import KVzap
    from a2sf.errors import UserError

    try:
        policy = KVzap(gates=name, revision=revision)
        found = {**policy.stored_settings()["gates"], "revision": policy.revision}
        if fetch:
            policy.fetch()
            assert policy.found is not None
            ones = torch.ones(1, policy.found.sizes.hidden)
            found["scores"] = policy.found.scores(0, ones).tolist()
    except UserError as error:
        return str(error)
    return found
