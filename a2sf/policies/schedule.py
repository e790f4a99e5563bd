"""When tokens are evicted: after every token, every so many tokens, or once after the prompt."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from a2sf.errors import ConfigError
from a2sf.policies.base import WHEN, Policy

THEN = ("keep", "step")
AT = ("prompt", "context")


@dataclass(frozen=True)
class Schedule:
    """When tokens are evicted (docs/semantics.md).

    Attributes:
        when: `step`: after every token, as soon as more than `C` are cached. `every`: once `C + every` are cached, down to
            `C`. `prompt`: once after the prompt's last token, down to `C`.
        every: tokens between two evictions, at least 1; for `every`.
        then: after the prompt's cut, `keep` everything or go on `step` by step; for `prompt`.
        at: whether the cut comes after the whole `prompt`, or after the `context` that it begins with and before the
            question, which is then not known when tokens go; for `prompt`.

    Raises:
        ConfigError: if a value is not allowed.
    """

    when: str = "step"
    every: int = 1
    then: str = "keep"
    at: str = "prompt"

    def __post_init__(self) -> None:
        if self.when not in WHEN:
            raise ConfigError("schedule.when", self.when, f"give one of {', '.join(WHEN)}")
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ConfigError("schedule.every", self.every, "give a whole number of tokens, at least 1")
        if self.then not in THEN:
            raise ConfigError("schedule.then", self.then, f"give one of {', '.join(THEN)}")
        if self.at not in AT:
            raise ConfigError("schedule.at", self.at, f"give one of {', '.join(AT)}")

    @property
    def spare(self) -> int:
        """Tokens that may be cached beyond the budget between two steps, outside of a prompt."""
        return self.every - 1 if self.when == "every" else 0

    @property
    def name(self) -> str:
        """How results name it: step, every4, prompt, prompt-step; context, context-step for a cut after the context."""
        if self.when == "every":
            return f"every{self.every}"
        where = "context" if self.before_question else self.when
        return f"{where}-step" if self.prompt and self.then == "step" else where

    @property
    def settings(self) -> dict[str, Any]:
        """Its fields as plain data, without what came later and is not made use of."""
        fields = dataclasses.asdict(self)
        return fields if self.before_question else {k: v for k, v in fields.items() if k != "at"}

    @property
    def before_question(self) -> bool:
        """Whether the cut comes after the context, before the question."""
        return self.prompt and self.at == "context"

    @staticmethod
    def named(name: str) -> Schedule:
        """The schedule of a `name`; `prompt-keep` is `prompt`, too.

        Raises:
            ConfigError: if there is none.
        """
        if (every := re.fullmatch(r"every(\d+)", name)) is not None:
            return Schedule("every", every=int(every[1]))
        cuts = [Schedule("prompt", then=then, at=at) for at in AT for then in THEN]
        known = {s.name: s for s in (STEP, *cuts)}
        known["prompt-keep"] = known["prompt"]
        if name not in known:
            raise ConfigError("schedule", name, f"give one of {', '.join(known)}, or every4 for every 4 tokens")
        return known[name]

    @property
    def prompt(self) -> bool:
        """Whether nothing is evicted while the prompt is read."""
        return self.when == "prompt"


STEP = Schedule()


def schedule_for(policy: Policy, schedule: Schedule | None) -> Schedule:
    """`schedule` if `policy` knows it; None stands for `step`, or for the only one that it knows.

    Raises:
        ConfigError: if it does not know it.
    """
    if schedule is None:
        return STEP if "step" in policy.schedules else Schedule(policy.schedules[0])
    if schedule.when not in policy.schedules:
        known = " and ".join(policy.schedules)
        raise ConfigError("schedule.when", schedule.when, f"the policy {policy.name} knows {known} alone")
    return schedule


def nondefault_schedule(policy: Policy, schedule: Schedule | None) -> Schedule | None:
    """`schedule`, or None if it is the default of `policy` or comes to the same: one cell has one schedule.

    Raises:
        ConfigError: if the policy does not support it.
    """
    if schedule is None:
        return None
    schedule = schedule_for(policy, schedule)
    plain = schedule_for(policy, None)
    same = schedule.when == "every" and schedule.every == 1 and plain == STEP
    return None if same or not policy.evicts or schedule.name == plain.name else Schedule.named(schedule.name)
