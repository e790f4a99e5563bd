"""A group of cells that is interrupted between two passes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from a2sf.sweep.answer_store import AnswerStore
from a2sf.sweep.cell import Cell
from a2sf.sweep.runner import Runner


def interrupted(
    runner: Runner, cells: Sequence[Cell], passes: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, dict[str, list[Any]]]:
    """Run a group until so many passes are done; by the end of a cell's name, the answers that are on disk then."""
    left = [passes]

    def stop(self: AnswerStore) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(AnswerStore, "save_due", stop)
        with pytest.raises(KeyboardInterrupt):
            runner.run(cells)
    return {f.stem: json.loads(f.read_text())["answers"] for f in (runner.directory / ".checkpoints").glob("*.json")}
