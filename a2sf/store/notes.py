"""Notes in the results of finished cells: each note once, with the cells that have it."""

from __future__ import annotations

from collections.abc import Iterable

from a2sf.store.runs import StoredCell

HALF = ("bfloat16", "float16")
"""The dtypes in which rounding can change an answer."""


def notes_of(cells: Iterable[StoredCell]) -> list[str]:
    """The different notes of some results (`notes` in `result.json`), with the number of cells."""
    names: dict[str, list[str]] = {}
    times: dict[str, int] = {}
    for stored in cells:
        for note in stored.notes:
            text = note["text"]
            names.setdefault(text, []).append(stored.path.name)
            times[text] = times.get(text, 0) + note.get("times", 0)
    return [f"{text} {_where(names[text], times[text])}" for text in names]


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
