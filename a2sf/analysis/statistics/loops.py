"""Texts that end in a loop: the same phrase again and again."""

from __future__ import annotations

import re

REPEATS, PHRASE = 3, 2
LONG_WORD = 40
"""A run of letters or digits that is longer counts as so many single characters."""
PIECES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w|[^\w\s]")
WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]")


def ends_in_loop(text: str) -> bool:
    """Whether a text ends with a phrase of at least two words that it says at least three times in a row.

    Source: Holtzman et al. (2020), "The curious case of neural text degeneration", figure 9: "A phrase (minimum length 2) is
    considered a repetition when it repeats at least three times at the end of the generation". Their phrases are of tokens;
    here they are of words, so that models with different tokenizers are judged equally: runs of letters and digits, single
    characters of Chinese, Japanese and Korean, and punctuation marks.
    """
    pieces: list[str] = []
    for word in WORDS.findall(text):
        pieces += PIECES.findall(word) if len(word) > LONG_WORD else [word]
    return any(_repeats(pieces, n) for n in range(PHRASE, len(pieces) // REPEATS + 1))


def _repeats(pieces: list[str], n: int) -> bool:
    """Whether the last n pieces come `REPEATS` times in a row at the end."""
    if any(pieces[-1] != pieces[-1 - n * times] for times in range(1, REPEATS)):
        return False  # most of all n, at once
    end = pieces[-n * REPEATS :]
    return end[n:] == end[:-n]
