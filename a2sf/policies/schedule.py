"""When tokens are evicted: after every token, after every n tokens, or once after the prompt."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from a2sf.errors import ConfigError
from a2sf.policies.base import WHEN, Policy

THEN = ("keep", "step", "every")
AT = ("prompt", "context")


@dataclass(frozen=True)
class Schedule:
    """When tokens are evicted (docs/semantics.md).

    Attributes:
        when: `step`: after every token, as soon as more than `C` tokens are cached. `every`: when `C + every` tokens are
            cached, down to `C`. `prompt`: once after the last token of the prompt, down to `C`.
        every: number of tokens between two evictions, at least 1; for `every`, and for `prompt` with `then="every"`.
        then: after the eviction, `keep` all further tokens, or evict after every token (`step`), or whenever `C + every`
            tokens are cached (`every`); for `prompt`.
        at: evict after the `prompt`; or after the `context` at its beginning, before the question, so that the question is
            unknown when tokens are chosen; for `prompt`.

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
        """How many tokens beyond the budget may be cached between two steps, except in a prompt."""
        return self.every - 1 if "every" in (self.when, self.then if self.prompt else None) else 0

    @property
    def after(self) -> Schedule:
        """When tokens are evicted once a prompt has been cut, if they are."""
        return Schedule("every", every=self.every) if self.spare else STEP

    @property
    def name(self) -> str:
        """The name in results: step, every4, prompt, prompt-step, prompt-every4; context… if `at` is `context`."""
        if self.when == "every":
            return f"every{self.every}"
        where = "context" if self.before_question else self.when
        if not self.prompt or self.then == "keep":
            return where
        return f"{where}-every{self.every}" if self.spare else f"{where}-step"

    @property
    def settings(self) -> dict[str, Any]:
        """The fields as plain data. `at` is left out where it is unused: results stored before it existed do not have it."""
        fields = dataclasses.asdict(self)
        return fields if self.before_question else {k: v for k, v in fields.items() if k != "at"}

    @property
    def before_question(self) -> bool:
        """Whether tokens are evicted after the context, before the question."""
        return self.prompt and self.at == "context"

    @staticmethod
    def named(name: str) -> Schedule:
        """The schedule with a `name`; `prompt-keep` is another name of `prompt`.

        Raises:
            ConfigError: if there is no such schedule.
        """
        if (every := re.fullmatch(r"every(\d+)", name)) is not None:
            return Schedule("every", every=int(every[1]))
        if (every := re.fullmatch(rf"({'|'.join(AT)})-every(\d+)", name)) is not None and int(every[2]) > 1:
            return Schedule("prompt", every=int(every[2]), then="every", at=every[1])
        cuts = [Schedule("prompt", then=then, at=at) for at in AT for then in ("keep", "step")]
        known = {s.name: s for s in (STEP, *cuts)}
        known["prompt-keep"] = known["prompt"]
        if name not in known:
            raise ConfigError(
                "schedule", name, f"give one of {', '.join(known)}, or every4 for every 4 tokens, prompt-every4"
            )
        return known[name]

    @property
    def prompt(self) -> bool:
        """Whether nothing is evicted while the prompt is read."""
        return self.when == "prompt"


STEP = Schedule()


def schedule_for(policy: Policy, schedule: Schedule | None) -> Schedule:
    """`schedule`, or the default of `policy` if it is None: `step`, or the first schedule that the policy supports.

    Raises:
        ConfigError: if the policy does not support the schedule.
    """
    if schedule is None:
        return STEP if "step" in policy.schedules else Schedule(policy.schedules[0])
    if schedule.when not in policy.schedules:
        known = " and ".join(policy.schedules)
        raise ConfigError("schedule.when", schedule.when, f"the policy {policy.name} supports only {known}")
    return schedule


def nondefault_schedule(policy: Policy, schedule: Schedule | None) -> Schedule | None:
    """`schedule`, or None if it is the default of `policy` or comes to the same: one cell has one schedule.

    Raises:
        ConfigError: if the policy does not support it.
    """
    if schedule is None:
        return None
    schedule = schedule_for(policy, schedule)
    default = schedule_for(policy, None)
    same = schedule.when == "every" and schedule.every == 1 and default == STEP
    return None if same or not policy.evicts or schedule.name == default.name else Schedule.named(schedule.name)
