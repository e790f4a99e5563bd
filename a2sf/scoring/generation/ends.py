"""Where a generated text ends, and what of it is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lm_eval.models.utils import postprocess_generated_text

from a2sf.scoring.generation.thinking import Thinking

EOS, STOP, LENGTH, THINKING = "eos", "stop", "length", "thinking"
"""Why a text ended: the model's end of a text, a stop sequence, the limit of tokens; or before its thinking did."""
BEYOND = 2
"""Tokens looked at beyond those of a stop sequence, which may be written in other tokens; as lm-eval has it."""


@dataclass(frozen=True)
class Text:
    """A finished text.

    Attributes:
        value: the answer, without what was thought and without the stop sequence.
        finish: why it ended.
        thinking: what was thought.
        thinking_tokens: how many tokens that took, with those that end it.
    """

    value: str
    finish: str
    thinking: str = ""
    thinking_tokens: int = 0


@dataclass(frozen=True)
class Ends:
    """What ends a text.

    Attributes:
        lm: decodes tokens as lm-eval does.
        stop: stop sequences.
        eos: tokens that end a text.
        thinking: how thinking is recognised; None: it is not looked for.
    """

    lm: Any
    stop: Sequence[str]
    eos: frozenset[int]
    thinking: Thinking | None = None

    @cached_property
    def look_back(self) -> int:
        """How many of the last tokens are looked at for a stop sequence."""
        encode = self.lm.tokenizer.encode
        return BEYOND + max((len(encode(s, add_special_tokens=False)) for s in self.stop), default=0)

    def tail(self, tokens: Sequence[int], first: int = 0) -> str:
        """The last tokens from number `first` on, as text."""
        return str(
            self.lm.tok_decode(list(tokens[max(first, len(tokens) - self.look_back) :]), skip_special_tokens=False)
        )

    def finished(self, prompt: str, tokens: Sequence[int], finish: str) -> Text:
        """A text of which all tokens are known, and why it ended."""
        thinking, whole = self.thinking, list(tokens)
        if thinking is not None:
            if (at := thinking.ends_at(whole)) > 0:
                answer, thought = whole[at:], whole[: at - len(thinking.end)]
                return Text(self._answer(answer, begins=True), finish, self.lm.tok_decode(thought).strip(), at)
            if thinking.is_open(prompt + self.lm.tok_decode(whole, skip_special_tokens=False)):
                return Text("", THINKING, self.lm.tok_decode(whole).strip(), len(whole))
        return Text(self._answer(whole), finish)

    def _answer(self, tokens: list[int], begins: bool = False) -> str:
        text = self.lm.tok_decode(tokens)
        return str(postprocess_generated_text(text.lstrip() if begins else text, list(self.stop), None))
