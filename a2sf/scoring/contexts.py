"""Where in a prompt the context ends that several questions share: `schedule.at=context` evicts after it.

A task says which field of its documents is that context (`shared_context` in its metadata); the prompt contains it
unchanged. Text before it (examples, the head of a chat template) belongs to the context.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import takewhile
from typing import Any

from a2sf.errors import UserError


class Contexts:
    """Finds the ends of contexts.

    Args:
        field: of the documents.
        encode: a prompt -> its tokens, as the model reads them.
    """

    def __init__(self, field: str, encode: Callable[[str], list[int]]) -> None:
        self.field = field
        self._encode = lru_cache(maxsize=64)(encode)  # the questions of a context come together
        self._known: dict[str, int] = {}

    def tokens(self, prompt: str, document: Any) -> int:
        """How many of a prompt's first tokens belong to the context; a token that crosses its end belongs to the question.

        Raises:
            UserError: if the document has no such context, or the prompt does not hold it, or nothing comes after it.
        """
        if prompt not in self._known:
            found = document.get(self.field) if isinstance(document, dict) else None
            context = found if isinstance(found, str) else ""
            at = prompt.rfind(context) if context else -1
            if at < 0:
                raise UserError(
                    f"schedule.at=context cuts after a document's field {self.field!r}, and a prompt does not hold that text"
                )
            alone, full = self._encode(prompt[: at + len(context)]), self._encode(prompt)
            n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone, full, strict=False)))
            if not 0 < n < len(full):
                raise UserError("schedule.at=context needs a question after the context, and a prompt has none")
            self._known[prompt] = n
        return self._known[prompt]
