"""Notes in the results of finished cells: each note once, with the cells that have it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from a2sf.store.runs import StoredCell

HALF = ("bfloat16", "float16")
"""The dtypes in which rounding can change an answer."""
COUNTED = re.compile(r"(?P<task>[^:]+): (?P<who>.+?): in (?P<n>\d+) of (?P<of>\d+) requests (?P<rest>.+)")
"""A note that counts the requests of a cell, as `Counts.unranked_note`."""


def notes_of(cells: Iterable[StoredCell]) -> list[str]:
    """The different notes of some results (`notes` in `result.json`), with the number of cells.

    Those that count requests and differ in nothing else than the task and the counts are one, with the sum.
    """
    said: dict[tuple[str, str], _Places] = {}
    for stored in cells:
        for note in stored.notes:
            found = COUNTED.fullmatch(note["text"])
            about = (found["who"], found["rest"]) if found else (note["text"], "")
            one = said.setdefault(about, _Places())
            one.names.append(stored.path.name)
            one.times += note.get("times", 0)
            if found:
                one.counts.append((found["task"], int(found["n"]), int(found["of"])))
    return [one.text(*about) for about, one in said.items()]


@dataclass
class _Places:
    """The cells that have a note.

    Attributes:
        names: the cells.
        times: how often, of a library's warning.
        counts: task, requests that it is about, and all requests, of a note that counts them.
    """

    names: list[str] = field(default_factory=list)
    times: int = 0
    counts: list[tuple[str, int, int]] = field(default_factory=list)

    def text(self, who: str, rest: str) -> str:
        """The note with its cells; `who` and `rest` as in `COUNTED`, or the whole text and "" where nothing is counted."""
        where = _where(self.names, self.times)
        if not self.counts:
            return f"{who} {where}"
        tasks = ", ".join(dict.fromkeys(task for task, _, _ in self.counts))
        about, requests = sum(n for _, n, _ in self.counts), sum(n for _, _, n in self.counts)
        return f"{tasks}: {who}: in {about} of {requests} requests {rest} {where}"


def rounding_note(cells: Iterable[StoredCell]) -> str | None:
    """A note where models were computed in less than float32; None where none was."""
    half = sorted({str(c.cell.get("dtype")) for c in cells} & set(HALF))
    if not half:
        return None
    return (
        f"In {' and '.join(half)}, a difference of about a point between two sweeps can be rounding, which another batch or "
        "number of threads changes (docs/faq.md)."
    )


def _where(names: list[str], times: int) -> str:
    often = f", {times:,} times" if times > 1 else ""
    return f"(In {names[0]}{often}.)" if len(names) == 1 else f"(In {len(names)} cells{often}, {names[0]} the first.)"
