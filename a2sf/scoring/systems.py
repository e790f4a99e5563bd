"""Systems, which are compared (a policy, a budget and a schedule), and their answers to requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from a2sf.hf.settings import RetentionKey, retention_of
from a2sf.hf.warned import Warned
from a2sf.policies.base import Policy, Retention
from a2sf.policies.budget import Budget
from a2sf.policies.prepared import Prepared
from a2sf.policies.schedule import Schedule
from a2sf.scoring.counts import Counts


@dataclass(frozen=True)
class System:
    """One way of pruning the cache.

    Attributes:
        budget: None for a policy that ignores budgets.
        schedule: when tokens are evicted.
        acts: on which of the model's layers the policy acts; None: on all.
    """

    policy: Policy
    budget: Budget | None
    schedule: Schedule
    acts: tuple[bool, ...] | None = None
    _known: dict[RetentionKey, tuple[Retention, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def retention(
        self, total: int, context: int, layers: int, prepared: Prepared | None = None
    ) -> tuple[Retention, ...]:
        """What each of `layers` layers retains of a sequence of `total` tokens whose prompt has `context`.

        Args:
            prepared: what the policy prepared for the prompt, if it does.

        Raises:
            UserError: if the policy protects more tokens than the budget holds.
        """
        # a policy's own code makes a rule for each layer, and many requests have the same numbers
        return retention_of(
            self.policy, self.budget, total, context, layers, self.schedule, prepared, self.acts, self._known
        )

    def cuts_by_prompt(self, retention: Sequence[Retention], cut: int, total: int) -> bool:
        """Whether what is retained of `total` tokens depends on what the policy finds in the `cut` first ones.

        Args:
            retention: what each layer retains if the policy finds nothing.
        """
        # where tokens are evicted after the cut too, a prompt that fits is ranked later
        least = cut if self.schedule.then == "keep" else total
        return self.policy.prepares and any(k.budget < least for k in retention)


class Answer(NamedTuple):
    """The answer of a model to one request.

    Attributes:
        value: the log-likelihood, or the text.
        greedy: whether greedy decoding would have produced the continuation.
        context, continuation: how many tokens these have.
        ended: whether a text was ended by a stop sequence, and not by the limit of its tokens; None: not known.
        finish: why a text ended: `eos` (the model's end of a text), `stop` (a stop sequence), `length` (the limit of
            tokens), or `thinking` (before its thinking did, so that there is no answer); None: not known.
        tokens: the tokens that were generated, with those of thinking and of the stop sequence; None: not known.
        thinking: what was thought before the answer, which is not part of `value`.
        thinking_tokens: how many of `tokens` that took, with the token that ends it.
        cached: of each window of the request, tokens cached at its end, mean over the layers and heads that a threshold acts
            on; None: numbers say it.
        turns: of a conversation, how many of `tokens` each answer has; None: there is one answer. `value` has all answers
            (`a2sf.tasks.turns.joined`), and `finish` is that of the first answer that was cut off, else of the last.
    """

    value: Any
    greedy: bool
    context: int
    continuation: int
    ended: bool | None = None
    finish: str | None = None
    tokens: list[int] | None = None
    thinking: str = ""
    thinking_tokens: int = 0
    cached: list[float] | None = None
    turns: list[int] | None = None


@dataclass
class SystemProgress:
    """How much of a system's work is done, and the time that it took.

    Attributes:
        seconds: time that was spent; where systems are computed together, this system's share.
        requests: how many requests there are; 0: not known yet.
        answered: how many of them had an answer when scoring began.
        pending: how many had none then.
        tokens: how many tokens have to be read for the pending ones; 0: not counted.
        read: how many of these have been read.
    """

    seconds: float = 0.0
    requests: int = 0
    answered: int = 0
    pending: int = 0
    tokens: int = 0
    read: int = 0

    def share(self, answered: int) -> float:
        """How much of the work is done, from 0 to 1: by tokens where these are counted, else by requests.

        Args:
            answered: how many requests have an answer now.
        """
        if not self.requests:
            return 0.0
        if not self.tokens:
            return min(1.0, answered / self.requests)
        return min(1.0, (self.answered + self.pending * self.read / self.tokens) / self.requests)


@dataclass
class Answers:
    """The answers of one system to a task's requests.

    Attributes:
        counts: what the requests took to read and to cache.
        known: answers of an earlier result, by a request's key (`Requests.keys`).
        computed: answers that were computed now; it has no key of `known`.
        progress: how much is done, and the time that it took.
        ran: which implementations of the engine ran (`a2sf.engine.kernels.backends_run`).
        warned: what libraries warned of while what this system needs was computed.
        error: why this system cannot be computed; the other systems of the group continue.
    """

    system: System
    counts: Counts
    known: dict[str, Answer] = field(default_factory=dict)
    computed: dict[str, Answer] = field(default_factory=dict)
    progress: SystemProgress = field(default_factory=SystemProgress)
    ran: set[str] = field(default_factory=set)
    warned: Warned = field(default_factory=Warned)
    error: Exception | None = None

    def answer(self, key: str) -> Answer | None:
        """The answer to a request, by its key; None: there is none yet."""
        found = self.known.get(key)
        return self.computed.get(key) if found is None else found

    def missing(self, keys: Sequence[str]) -> list[str]:
        """The keys that have no answer, each once."""
        return [k for k in dict.fromkeys(keys) if self.answer(k) is None]

    @property
    def answered(self) -> int:
        """How many requests have an answer."""
        return len(self.known) + len(self.computed)

    @property
    def complete(self) -> bool:
        """Whether each request has an answer."""
        return 0 < self.progress.requests <= self.answered

    @property
    def share(self) -> float:
        """How much of the work is done, from 0 to 1."""
        return self.progress.share(self.answered)

    def begin(self, pending: int, requests: int, tokens: int = 0) -> None:
        """Note what is to be done: `pending` of `requests` have no answer, and take `tokens` to read."""
        requests = max(self.progress.requests, requests)
        answered = min(requests - pending, self.answered)
        self.progress = SystemProgress(self.progress.seconds, requests, answered, pending, tokens)
