"""Models that think before they answer: where the thinking of a text ends, and what the answer is.

lm-eval's `think_end_token` is the token that ends the thinking. What comes before its last occurrence was thought, and what
comes after it is the answer. Thinking begins with a text such as `<think>`, which the model writes or the prompt ends with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from a2sf.errors import ConfigError


@dataclass(frozen=True)
class Thinking:
    """How a model's thinking is recognised.

    Attributes:
        end: the tokens that end it.
        opening: the text that begins it; None: a text begins with thinking.
        ending: the text of `end`.
        by_text: whether that text ends thinking in any tokens, as lm-eval has it where it is given as text.
    """

    end: tuple[int, ...]
    opening: str | None
    ending: str
    by_text: bool = False

    @classmethod
    def of(cls, given: Any, tokenizer: Any, enabled: bool | None = None) -> Thinking | None:
        """What lm-eval's `think_end_token` means to a tokenizer; None: nothing is given, so that no thinking is looked for.

        Args:
            given: a token as text or number.
            enabled: lm-eval's `enable_thinking`.

        Raises:
            ConfigError: if the tokenizer has no such token, or thinking is enabled and nothing ends it.
        """
        if given is None or given == "":
            if enabled:
                raise ConfigError(
                    "enable_thinking", "true", "give think_end_token as well, the token that ends the thinking"
                )
            return None
        end = _tokens_of(given, tokenizer)
        ending = str(tokenizer.decode(list(end)))
        # </think> ends what <think> begins, [/THINK] what [THINK] begins
        return cls(end, ending.replace("/", "", 1) if "/" in ending else None, ending, not str(given).isdecimal())

    def ends_at(self, tokens: Sequence[int]) -> int:
        """How many of the generated tokens were thought, with those that end it; 0: the thinking did not end."""
        n = len(self.end)
        found = (i for i in range(len(tokens), n - 1, -1) if tuple(tokens[i - n : i]) == self.end)
        return next(found, 0)

    def ended_by(self, tokens: Sequence[int], tail: str) -> bool:
        """Whether thinking ends with the last of some tokens, whose last ones are the text `tail`."""
        return tuple(tokens[-len(self.end) :]) == self.end or (self.by_text and self.ending in tail)

    def is_open(self, before: str) -> bool:
        """Whether a text continues to think, where `before` is the prompt and what has been generated, as text."""
        if self.opening is None:
            return self.ending not in before
        return before.rfind(self.opening) > before.rfind(self.ending)


def _tokens_of(given: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens of lm-eval's `think_end_token`."""
    text = str(given)
    if text.isdecimal():
        if int(text) >= len(tokenizer):
            raise ConfigError("think_end_token", given, f"the tokenizer has {len(tokenizer)} tokens, counted from 0")
        return (int(text),)
    made = tuple(tokenizer.encode(text, add_special_tokens=False))
    added = set(tokenizer.get_added_vocab().values())
    # several tokens, such as <|channel|>final<|message|>, must begin with one that ordinary text does not have
    if not made or (len(made) > 1 and made[0] not in added) or made == (tokenizer.unk_token_id,):
        raise ConfigError(
            "think_end_token",
            repr(given),
            "the tokenizer has no such token; give the one that ends the model's thinking",
        )
    return made
