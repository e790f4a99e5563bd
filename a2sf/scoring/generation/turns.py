"""The turns of a conversation as a model reads them: a question after the tokens of the answer before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TurnQuestion:
    """A question that is read after an answer.

    Attributes:
        text: with what a chat template puts before and after it.
        tokens: of the text by itself; at least one.
        closes: whether its first token is a special one, with which a chat template ends the answer before it.
    """

    text: str
    tokens: tuple[int, ...]
    closes: bool = False

    def after(self, answer: Sequence[int]) -> tuple[int, ...]:
        """The tokens that are read after an answer's own.

        Where the model itself wrote the token with which the template ends an answer, it is not read a second time.
        """
        written = self.closes and len(answer) > 0 and answer[-1] == self.tokens[0]
        return self.tokens[1:] if written else self.tokens


def in_order(tokens: Sequence[int], lengths: Sequence[int], later: Sequence[TurnQuestion]) -> list[int]:
    """All tokens that follow a first question, as they were read: answers, and between them questions.

    Args:
        tokens: of all answers, one after the other.
        lengths: how many of them each answer has.
        later: the questions after the first, one fewer than `lengths`.
    """
    found, at = list(tokens[: lengths[0]]), lengths[0]
    for question, length in zip(later, lengths[1:], strict=True):
        found += question.after(found)
        found += tokens[at : at + length]
        at += length
    return found


def places(tokens: Sequence[int], lengths: Sequence[int], later: Sequence[TurnQuestion]) -> list[int]:
    """How many of the tokens that follow a first question come before each answer; arguments as of `in_order`."""
    found, read, at = [0], lengths[0], lengths[0]
    for question, length in zip(later, lengths[1:], strict=True):
        read += len(question.after(tokens[:at]))
        found.append(read)
        read, at = read + length, at + length
    return found
