"""A sweep in a process that is there to be killed; what it computed and what it kept is noted as it happens.

Notes are lines of JSON: ["computed", time, cell, request hashes], ["kept", the same], ["done", time, cell].
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

PASS_SECONDS = 0.03
"""A pass takes at least so long, so that there is time to be killed in."""


def preload() -> list[str]:
    """Modules that a server of such processes loads once."""
    return ["tests.killed", "a2sf.app", "a2sf.sweep.runner", "a2sf.sweep.planning.estimate", "lm_eval.tasks"]


def run(arguments: list[str], notes: str) -> None:
    """The command `a2sf run`, noting in the file `notes`."""
    import torch

    from a2sf import cli
    from a2sf.sweep import runner as sweep
    from a2sf.sweep.answer_store import AnswerStore

    torch.set_num_threads(1)
    out = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def note(*what: object) -> None:
        os.write(out, (json.dumps(what) + "\n").encode())

    seen: dict[str, set[str]] = {}

    restore, write, keep = AnswerStore._restore, AnswerStore._write, sweep.write_cell

    def save_due(store) -> None:
        now = time.time()  # one for all of a pass
        for name, answers in store.all.items():
            known = seen.setdefault(name, set())
            note("computed", now, name, sorted(answers.computed.keys() - known))
            known |= answers.computed.keys()
        time.sleep(PASS_SECONDS)
        due(store)

    def restored(store, cell, answers) -> None:
        restore(store, cell, answers)
        seen[cell.name] = set(answers.computed)

    def written(store, cell, answers) -> None:
        write(store, cell, answers)
        note("kept", time.time(), cell.name, sorted(answers.computed))

    def kept(path: Path, *more, **settings):
        stored = keep(path, *more, **settings)
        note("done", time.time(), path.name)
        return stored

    AnswerStore._restore, AnswerStore._write, sweep.write_cell = restored, written, kept
    due, AnswerStore.save_due = AnswerStore.save_due, save_due
    cli.main(["run", *arguments])
