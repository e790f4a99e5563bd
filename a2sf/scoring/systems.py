"""The ways of scoring that are computed together, and what a model answers as.

A member is one way (a policy, a budget, a schedule) of scoring the requests that all members of a group are asked. A lone
model is a group of one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from a2sf.engine.trace import Trace
from a2sf.hf.attention import global_layers
from a2sf.hf.loading import kv_heads_of
from a2sf.hf.settings import check_settings, retention_of
from a2sf.policies.base import Policy, Retention
from a2sf.policies.budget import Budget
from a2sf.policies.schedule import Schedule, schedule_for
from a2sf.scoring.counts import Counts
from a2sf.tasks.warned import Warned


class Answer(NamedTuple):
    """A log-likelihood (or a text), whether greedy decoding would have said it, tokens of context and continuation.

    `ended`: whether a text was ended by a stop sequence, and not by the limit of its tokens; None where that is not known.
    """

    value: Any
    greedy: bool
    context: int
    continuation: int
    ended: bool | None = None


@dataclass
class Member:
    """One way of scoring, and what came of it.

    Attributes:
        known: answers of an earlier result, by `request_hash`.
        answers: those computed in this group.
        asked: how many requests there are, where that is known by now.
        planned, read: tokens of the requests that had no answer when they were asked, and of those that have one by now.
        new: how many requests had no answer.
        seconds: time that was spent on it, its share where several were computed together.
        ran: which implementations of the recursion did so (`a2sf.engine.kernels.noting`).
        error: why it cannot go on; the others of its group do.
    """

    policy: Policy
    budget: Budget | None
    schedule: Schedule
    counts: Counts
    known: dict[str, Answer] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: int = 0
    planned: int = 0
    read: int = 0
    new: int = 0
    seconds: float = 0.0
    ran: set[str] = field(default_factory=set)
    error: Exception | None = None

    @property
    def share(self) -> float:
        """How much of the work on its requests is done, by tokens where these are counted; nought while none is known."""
        if not self.asked:
            return 0.0
        if not self.planned:
            return min(1.0, (len(self.known) + len(self.answers)) / self.asked)
        return 1 - self.new / self.asked * (1 - self.read / self.planned)

    def answer(self, request: str) -> Answer | None:
        """The answer to a request, by its hash."""
        found = self.known.get(request)
        return self.answers.get(request) if found is None else found


class Members:
    """What a `PrunedLM` answers as: one member by itself, or one of a group.

    Attributes:
        member: who is answered.
        group: all that are computed together; empty: the member alone.
        lengths: by `request_hash`, tokens of context and continuation of what was answered.
        unread: by `request_hash`, tokens at a prompt's beginning that were not read, since all together were too many.
        ended: by `request_hash`, as in `Answer`.
        warned: what libraries warned of while the model was loaded.
        traces: of the member's first documents.
    """

    model: Any
    member: Member
    group: Sequence[Member] = ()
    after_pass: Callable[[], None] | None = None
    due: Callable[[int], int] | None = None
    lengths: dict[str, tuple[int, int]]
    unread: dict[str, int]
    ended: dict[str, bool | None]
    warned: Warned | None = None
    aside: Callable[[], AbstractContextManager[Any]] = nullcontext
    traces: list[Trace]
    _documents: dict[str, tuple[str, int]]

    @property
    def layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def kv_heads(self) -> int | None:
        """KV heads of each layer; None where the config does not tell one number."""
        return kv_heads_of(self.model.config)

    @property
    def policy(self) -> Policy:
        return self.member.policy

    @property
    def budget(self) -> Budget | None:
        return self.member.budget

    @property
    def schedule(self) -> Schedule:
        return self.member.schedule

    @property
    def counts(self) -> Counts:
        """What was read since `use`."""
        return self.member.counts

    @property
    def known(self) -> dict[str, Answer]:
        """Answers of an earlier result, by `request_hash`; what they answer is not computed again."""
        return self.member.known

    @known.setter
    def known(self, answers: dict[str, Any]) -> None:
        self.member.known = {h: Answer(*a) for h, a in answers.items()}

    def use(self, policy: Policy, budget: Budget | None, schedule: Schedule | None = None) -> None:
        """Score with `policy` at `budget` from now on (None: for a policy that ignores budgets); counts start anew.

        Args:
            schedule: when tokens are evicted; None: as the policy does without being told.

        Raises:
            ConfigError: if a setting does not fit the model, the budget is too small for the policy, or the policy does not
                know the schedule.
        """
        self.group = ()
        self.take(self.as_member(policy, budget, schedule))

    def as_member(self, policy: Policy, budget: Budget | None, schedule: Schedule | None = None) -> Member:
        """One way of scoring with this model; arguments and errors as in `use`."""
        check_settings(policy, budget, self.layers, schedule=schedule)
        policy.check(self.layers, self.kv_heads)
        schedule = schedule_for(policy, schedule)
        return Member(policy, budget, schedule, Counts(schedule, self.kv_heads, global_layers(self.model.config)))

    def take(self, member: Member) -> None:
        """Answer as `member` from now on."""
        self.member = member
        self.lengths, self.unread, self.ended = {}, {}, {}
        self._documents = {}  # task and document of each request, by its strings or tokens
        self.traces = []

    @contextmanager
    def together(
        self,
        members: Sequence[Member],
        after_pass: Callable[[], None] | None = None,
        due: Callable[[int], int] | None = None,
        aside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Iterator[None]:
        """Compute what one of `members` is asked for all of them, and answer the others from that.

        Args:
            after_pass: called after each pass; the members hold the answers so far.
            due: when a document is visited, the smallest first; None: those with the longest requests first.
            aside: entered around what is computed for all members, rather than for the one that asks.
        """
        before, self.group, self.after_pass, self.due = self.member, members, after_pass, due
        self.aside = aside
        self._joined: dict[tuple[str, str], bool] = {}
        try:
            yield
        finally:
            self.group, self.after_pass, self.due = (), None, None
            self.aside = nullcontext
            self._joined = {}
            self.take(before)

    def retention(self, total: int, context: int, member: Member | None = None) -> tuple[Retention, ...]:
        """What each layer keeps of a request of `total` tokens read, `context` of them its context."""
        member = member or self.member
        return retention_of(member.policy, member.budget, total, context, self.layers, member.schedule)


def document_of(request: Any) -> tuple[str, int]:
    """Task and document of one of lm-eval's requests; document -1 where it has none."""
    number = getattr(request, "document", request.doc_id)  # where lm-eval counts chosen documents from nought
    return str(request.task_name), -1 if number is None else int(number)


def request_hash(arguments: tuple[Any, ...]) -> str:
    """Identifies a request by its strings, and the settings of its generation."""
    strings = [a if isinstance(a, str) else json.dumps(a, sort_keys=True, default=str) for a in arguments]
    return hashlib.sha256("\0".join(strings).encode()).hexdigest()[:16]
