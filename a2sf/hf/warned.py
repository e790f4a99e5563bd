"""Warnings of libraries: counted, and to which system of a shared forward pass they belong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

LONGEST = 300


@dataclass
class Warned:
    """Different messages, and how often each occurred.

    Messages that differ only in digits count as one; the first of them is shown.
    """

    _texts: dict[str, str] = field(default_factory=dict)
    _times: dict[str, int] = field(default_factory=dict)

    def add(self, source: str, message: str) -> None:
        """Count a message of the library or warning category `source`; an empty one is left out."""
        line = next((stripped for part in message.splitlines() if (stripped := part.strip(" ,"))), "")
        if line:
            self._count(f"{source} warns: {line[:LONGEST]}", 1)

    def update(self, other: Warned) -> None:
        """Count the messages of `other`, too."""
        for key, text in other._texts.items():
            self._count(text, other._times[key])

    def _count(self, text: str, times: int) -> None:
        key = re.sub(r"\d+", "0", text)
        self._texts.setdefault(key, text)
        self._times[key] = self._times.get(key, 0) + times

    @classmethod
    def of(cls, notes: Iterable[dict[str, Any]]) -> Warned:
        """The warnings that `notes` lists, in the form of `result.json`."""
        made = cls()
        for note in notes:
            made._count(note["text"], note["times"])
        return made

    @property
    def notes(self) -> list[dict[str, Any]]:
        """As in `result.json`: the `text`, and how many `times` it occurred."""
        return [{"text": text, "times": self._times[key]} for key, text in self._texts.items()]


_cause: ContextVar[Warned | None] = ContextVar("cause", default=None)


@contextmanager
def caused_by(warned: Warned | None) -> Iterator[None]:
    """Warnings inside the block are counted in `warned` only: those of one policy in a forward pass that several share.

    Args:
        warned: None changes nothing.

    Without `a2sf.tasks.warned.collected` around it nothing is counted, and warnings are shown as usual.
    """
    token = _cause.set(_cause.get() if warned is None else warned)
    try:
        yield
    finally:
        _cause.reset(token)


def cause(otherwise: Warned) -> Warned:
    """What counts a warning that is raised now: the argument of the innermost `caused_by`, else `otherwise`."""
    found = _cause.get()
    return otherwise if found is None else found
