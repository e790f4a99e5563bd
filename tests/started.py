"""The command, scripts and functions in processes of their own, whose imports are behind them.

A start of the command imports for seconds what the last start imported. Here it is a fork of a process that has imported
it already, under the very environment that the start is to have; the script is run as `python X.py ...` runs it, with
its own output, and ends as a process does. Its imports' own faults are seen where the command is started anew: the first
sweep in test_evaluate, the workers of launchers, the wheel.

`python -m tests.started FD` (or this file, where the repository is not to be seen) is the process at the root. It imports
what reads no variable of the environment; of it are forked those that import the rest, one per environment, and of these
the starts.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SECONDS = 400
CALL = "a function"
KEPT = 2
"""Environments at a time."""

FIRST = [
    "torch.distributed.tensor",
    "torch.export",
    "matplotlib.pyplot",
    "pyarrow.dataset",
    "a2sf.analysis.statistics.paired",
    "a2sf.engine.kernels.cpu",
    "hydra._internal.hydra",
]
THEN = [
    "a2sf.app.compute",
    "a2sf.app.outcome",
    "a2sf.commands.run",
    "a2sf.commands.tables",
    "a2sf.sweep.config.settings",
    "a2sf.sweep.planning.estimate",
    "a2sf.sweep.group",
    "a2sf.sweep.prepare",
    "a2sf.sweep.runner",
    "a2sf.report.output",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "transformers.models.llama.modeling_llama",
]
READ_THE_ENVIRONMENT = {"huggingface_hub", "datasets", "transformers", "lm_eval", "accelerate", "wandb", "rich.console"}
"""What reads the environment when it is imported, or may."""


class Start(NamedTuple):
    script: str
    """A file, `a2sf`, or `CALL`."""
    arguments: tuple[str, ...]
    environment: dict[str, str]
    folder: str
    """Where it runs."""
    directory: str
    """Where its output goes, the files `out` and `err`; for `CALL` also what is called, and what it gives."""


def started(
    script: str | Path,
    *arguments: object,
    environment: Mapping[str, str],
    folder: Path = ROOT,
    python: str = sys.executable,
) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT arguments...` in `folder`, with exactly these variables.

    Args:
        script: a file, a name in `scripts/`, or `a2sf`, the command.
        python: of another virtual environment, whose a2sf it is then.

    Raises:
        subprocess.TimeoutExpired: after `SECONDS`.
    """
    with TemporaryDirectory() as directory:
        file = "a2sf" if script == "a2sf" else str(ROOT / "scripts" / script)
        return _ran(Start(file, tuple(map(str, arguments)), dict(environment), str(folder), directory), python)


def called(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str], **more: Any) -> Any:
    """What a function gives in such a process. The function must be importable; all travels by pickle."""
    with TemporaryDirectory() as directory:
        (Path(directory) / "call").write_bytes(pickle.dumps((function, arguments, more)))
        done = _ran(Start(CALL, (), dict(environment), str(ROOT), directory), sys.executable)
        assert done.returncode == 0, done.stderr
        return pickle.loads((Path(directory) / "given").read_bytes())


def _ran(start: Start, python: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in start.environment.items() if not k.startswith("PYTEST_")}
    root = _root(python)
    root.send(tuple(start._replace(environment=variables)))  # the root may know this module by another name
    code = root.recv()
    if code is None:
        raise subprocess.TimeoutExpired([start.script, *start.arguments], SECONDS)
    out, err = ((Path(start.directory) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess([start.script, *start.arguments], code, out, err)


@cache
def _root(python: str) -> Connection:
    ours, theirs = socket.socketpair()
    ours_too = python == sys.executable
    command = [python, *(["-m", "tests.started"] if ours_too else [__file__]), str(theirs.fileno())]
    variables = {k: v for k, v in os.environ.items() if ours_too or not k.startswith("PYTHON")}
    process = subprocess.Popen(command, cwd=ROOT, env=variables, pass_fds=[theirs.fileno()])
    theirs.close()
    connection = Connection(ours.detach())

    def end() -> None:
        connection.close()
        process.wait()

    atexit.register(end)
    return connection


def _serve_root(parent: Connection) -> None:
    for module in FIRST:
        importlib.import_module(module)
    assert not READ_THE_ENVIRONMENT & sys.modules.keys(), sorted(READ_THE_ENVIRONMENT & sys.modules.keys())
    fork = get_context("fork")
    kept: dict[frozenset[tuple[str, str]], Connection] = {}
    while (start := _next(parent)) is not None:
        key = frozenset((k, v) for k, v in start.environment.items() if k != "PYTHONPATH")  # which no module reads
        if key not in kept:
            here, there = fork.Pipe()
            fork.Process(target=_serve, args=(there, start.environment, [parent, here, *kept.values()])).start()
            there.close()
            kept[key] = here
        kept[key] = kept.pop(key)  # the newest is last
        kept[key].send(tuple(start))
        parent.send(kept[key].recv())
        while len(kept) > KEPT:
            kept.pop(next(iter(kept))).close()
        fork.active_children()  # waits for those that have ended
    for connection in kept.values():
        connection.close()


def _next(parent: Connection) -> Start | None:
    try:
        return Start(*parent.recv())
    except EOFError:
        return None


def _serve(parent: Connection, environment: Mapping[str, str], others: Sequence[Connection]) -> None:
    for connection in others:  # else they would not be seen to end
        connection.close()
    os.environ.clear()
    os.environ.update(environment)
    for module in THEN:
        importlib.import_module(module)
    while (start := _next(parent)) is not None:
        process = get_context("fork").Process(target=_run, args=(start, parent))
        process.start()
        process.join(SECONDS)
        if late := process.exitcode is None:
            process.kill()
            process.join()
        parent.send(None if late else process.exitcode)


def _run(start: Start, parent: Connection) -> None:
    parent.close()
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(start.directory) / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    if threads := start.environment.get("OMP_NUM_THREADS"):  # the root may have been started with others
        import torch

        torch.set_num_threads(int(threads))
    os.environ.update(start.environment)
    os.chdir(start.folder)
    sys.argv = [start.script, *start.arguments]
    own = Path(sys.executable if start.script == "a2sf" else start.script).parent
    added = [p for p in start.environment.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
    sys.path[:1] = [str(own), *added]
    try:
        if start.script == CALL:
            function, arguments, more = pickle.loads((Path(start.directory) / "call").read_bytes())
            (Path(start.directory) / "given").write_bytes(pickle.dumps(function(*arguments, **more)))
        elif start.script == "a2sf":
            runpy.run_module("a2sf.cli", run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(start.script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a fork would leave them out


if __name__ == "__main__":
    if __spec__ is None:  # started as a file: the folder of tests is no place for modules
        sys.path[0] = str(Path(sys.executable).parent)
    _serve_root(Connection(int(sys.argv[1])))
