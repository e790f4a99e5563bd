"""A text that is being generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from torch import Tensor

from a2sf.policies.base import UNLIMITED
from a2sf.scoring.generation.ends import EOS, LENGTH, STOP, Ends
from a2sf.scoring.generation.sampling import generator_for
from a2sf.scoring.passes.sequences import ScoredSequence
from a2sf.scoring.systems import Answers


@dataclass(eq=False)
class Row:
    """A text of one system.

    Attributes:
        answers: of the system.
        request: its place among the requests.
        sequence: the prompt, as the system reads it.
        limit: how many tokens are generated at most.
        ends: what ends it.
        prompt: the prompt as text.
        draw: the text's key and a seed, of which its random numbers are made (`generator`); None: tokens are not drawn.
        tokens: those generated so far.
        finish: why it ended; None: it has not.
        cached: tokens cached at its end, mean over the layers and heads where a threshold decides it; None: numbers say it.
    """

    answers: Answers
    request: int
    sequence: ScoredSequence
    limit: int
    ends: Ends
    prompt: str
    draw: tuple[str, int] | None = None
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    cached: float | None = None
    generator: np.random.Generator | None = None
    _thinks: bool = False
    _answer: int = 0  # the token that the answer, or what may be one, begins with

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin anew."""
        thinking = self.ends.thinking
        self.tokens, self.finish, self._answer = [], None, 0
        self.generator = None if self.draw is None else generator_for(*self.draw)
        self._thinks = thinking is not None and thinking.is_open(self.prompt)

    def take(self, token: int) -> None:
        """Add a token, and find out whether it ends the text (`finish`)."""
        self.tokens.append(token)
        if self.ends.thinking is not None:
            self._think()
        if token in self.ends.eos:
            self.finish = EOS
        elif self._stopped():
            self.finish = STOP
        elif len(self.tokens) == self.limit:
            self.finish = LENGTH

    def _think(self) -> None:
        thinking = self.ends.thinking
        assert thinking is not None
        tail = self.ends.tail(self.tokens, self._answer)
        if thinking.ended_by(self.tokens, tail):
            self._thinks, self._answer = False, len(self.tokens)
        elif not self._thinks and thinking.opening is not None:
            self._thinks = thinking.opening in tail

    def _stopped(self) -> bool:
        """Whether the last tokens hold a stop sequence; what is thought may hold any."""
        if self._thinks or not self.ends.stop:
            return False
        text = self.ends.tail(self.tokens, self._answer)
        if self._answer and len(self.tokens) - self._answer <= self.ends.look_back:
            text = text.lstrip()  # blank lines between thinking and answer are not part of the answer
        return any(stop in text for stop in self.ends.stop)

    def note_cached(self, counts: Sequence[Tensor]) -> None:
        """Note how many tokens are cached at its end, of each layer and KV head.

        Args:
            counts: [K] of each layer that a threshold acts on.
        """
        self.cached = fmean(float(n.double().mean()) for n in counts) if counts else None

    @property
    def held(self) -> int:
        """Tokens of all layers together that the cache holds at most once the prompt is read."""
        total = len(self.sequence.read) + self.limit
        schedule, found = self.sequence.schedule, 0
        for k in self.sequence.retention:
            if k.budget >= UNLIMITED or k.rule.full_heads or k.rule.threshold is not None:
                found += total
            else:
                later = self.limit if schedule.prompt and schedule.then == "keep" else schedule.spare
                found += min(total, k.budget + later)
        return found
