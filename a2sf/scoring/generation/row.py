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
from a2sf.scoring.generation.turns import TurnQuestion
from a2sf.scoring.passes.sequences import ScoredSequence
from a2sf.scoring.systems import Answers


@dataclass(eq=False)
class Row:
    """A text of one system, or its answers in a conversation.

    The tokens of a later question are read one by one, as generated ones are, into the cache that the turns before it left;
    what the model predicts after them is not used, but for the last one's.

    Attributes:
        answers: of the system.
        request: its place among the requests.
        sequence: the prompt, as the system reads it.
        limit: how many tokens an answer has at most.
        ends: what ends it.
        prompt: the prompt as text, of a conversation up to the first answer.
        draw: the text's key and a seed, of which its random numbers are made (`generator`); None: tokens are not drawn.
        later: the questions after the first.
        tokens: those generated so far, of a conversation in its present turn.
        finish: why it ended; None: it has not.
        before: what a conversation's earlier turns added to the prompt, with the present question.
        done: of each earlier turn its tokens, and why it ended.
        unread: tokens that are to be read next, in this order; none: the next token is to be predicted.
        read: how many tokens have been read after the prompt.
        cached: tokens cached at its end, mean over the layers and heads where a threshold decides it; None: numbers say it.
    """

    answers: Answers
    request: int
    sequence: ScoredSequence
    limit: int
    ends: Ends
    prompt: str
    draw: tuple[str, int] | None = None
    later: Sequence[TurnQuestion] = ()
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    before: list[int] = field(default_factory=list)
    done: list[tuple[list[int], str]] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    read: int = 0
    cached: float | None = None
    generator: np.random.Generator | None = None
    _thinks: bool = False
    _answer: int = 0  # the token that the answer, or what may be one, begins with

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin anew."""
        self.before, self.done, self.unread, self.read = [], [], [], 0
        self.generator = None if self.draw is None else generator_for(*self.draw)
        self._begin(self.prompt)

    def _begin(self, question: str) -> None:
        """Begin the answer to a question."""
        thinking = self.ends.thinking
        self.tokens, self.finish, self._answer = [], None, 0
        self._thinks = thinking is not None and thinking.is_open(question)

    @property
    def text(self) -> tuple[int, ...]:
        """All tokens so far, those of the prompt included."""
        return (*self.sequence.read, *self.before, *self.tokens)

    @property
    def answer_start(self) -> int:
        """How many tokens come before the present answer."""
        return len(self.sequence.read) + len(self.before)

    @property
    def follow(self) -> int:
        """How many tokens may follow the prompt."""
        return self.limit * (1 + len(self.later)) + sum(len(q.tokens) for q in self.later)

    @property
    def next(self) -> tuple[int, int]:
        """The token that is to be read next, and its position."""
        return self.unread[0], len(self.sequence.read) + self.read

    def advance(self) -> None:
        """Note that the next token has been read."""
        del self.unread[0]
        self.read += 1

    def take(self, token: int) -> None:
        """Add a token, and find out whether it ends the text (`finish`); where a question follows, it is read next."""
        self.tokens.append(token)
        self.unread.append(token)
        if self.ends.thinking is not None:
            self._think()
        if token in self.ends.eos:
            self.finish = EOS
        elif self._stopped():
            self.finish = STOP
        elif len(self.tokens) == self.limit:
            self.finish = LENGTH
        if self.finish is not None and len(self.done) < len(self.later):
            self._ask(self.later[len(self.done)])

    def _ask(self, question: TurnQuestion) -> None:
        """Go on to the next turn."""
        assert self.finish is not None
        self.done.append((self.tokens, self.finish))
        read_next = question.after(self.tokens)
        self.before += [*self.tokens, *read_next]
        self.unread += read_next
        self._begin(question.text)

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
        total = len(self.sequence.read) + self.follow
        schedule, found = self.sequence.schedule, 0
        for k in self.sequence.retention:
            if k.budget >= UNLIMITED or k.rule.full_heads or k.rule.threshold is not None:
                found += total
            else:
                later = self.follow if schedule.prompt and schedule.then == "keep" else schedule.spare
                found += min(total, k.after(total).budget + later)
        return found
