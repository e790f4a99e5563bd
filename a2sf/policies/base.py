"""What every token-pruning method states.

A policy is data: for a budget of `C` cached tokens it says how many of them are the newest (`recent`), how many are the
first (`sinks`), how fast an accumulated attention score is forgotten, and by what rule the rest is ranked. What no data
can say is one method, `priorities`. One engine (`a2sf.engine`) runs them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, ClassVar

from a2sf.errors import ConfigError
from a2sf.policies.rule import ACCUMULATED, Rule, Sequence, Step

if TYPE_CHECKING:  # what only needs names loads no torch
    from torch import Tensor

UNLIMITED = 2**31 - 1
"""A budget that no sequence reaches: nothing is evicted."""
WHEN = ("step", "every", "prompt")
"""The schedules there are (`a2sf.policies.schedule`)."""
THEN = ("keep", "step")
AT = ("prompt", "context")


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What one layer keeps of one sequence: the numbers of the recursion in docs/semantics.md, and the rule.

    Attributes:
        budget: cached tokens a KV head may hold between two steps, `C >= 1`.
        recent: the newest tokens that are never evicted, `r`.
        sinks: the first tokens that are never evicted, `s`; `r + s <= C`.
        forgetting_factor: what an accumulated score is multiplied by at every step, `0 <= a <= 1`.
        rule: how the other tokens are ranked.

    Raises:
        ValueError: if a number is out of range.
    """

    budget: int
    recent: int = 0
    sinks: int = 0
    forgetting_factor: float = 1.0
    rule: Rule = ACCUMULATED

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1 token, got {self.budget}")
        if self.recent < 0 or self.sinks < 0 or self.recent + self.sinks > self.budget:
            raise ValueError(
                f"recent ({self.recent}) + sinks ({self.sinks}) must lie between 0 and the budget ({self.budget})"
            )
        if not 0.0 <= self.forgetting_factor <= 1.0:
            raise ValueError(f"forgetting_factor must lie in [0, 1], got {self.forgetting_factor}")


@dataclass(kw_only=True)
class Policy(ABC):
    """A token-pruning method: its numbers as fields, and what they mean at a given budget.

    A new method is one subclass in a file of its own under `baselines/` and one YAML under `conf/policy/`. It states
    its numbers in `retention`; what they cannot say it computes in `priorities`.
    """

    name: ClassVar[str]
    """Identifies the policy in configs, results and tables."""
    label: ClassVar[str]
    """How tables and plots spell it."""
    uses_budget: ClassVar[bool] = True
    """False where the budget is ignored, so that all budgets are one cell."""
    evicts: ClassVar[bool] = True
    """False where nothing ever goes, so that all schedules are one cell."""
    schedules: ClassVar[tuple[str, ...]] = WHEN
    """The schedules that make sense for it."""
    causal: ClassVar[bool] = True
    """False where it looks at later tokens: an oracle (upper bound), not ranked with others and not used to generate."""
    memory: ClassVar[int] = 0
    """Numbers that `priorities` keeps per cached token."""
    version: ClassVar[int] = 1
    """Raised whenever a change of the policy moves its numbers: finished results of an earlier version are not reused."""

    @property
    def least_budget(self) -> int:
        """The smallest budget that holds what the policy protects; a smaller `budget.tokens` is refused."""
        return 1

    @abstractmethod
    def retention(self, budget: int, layer: int) -> Retention:
        """What layer `layer` (from 0) keeps when it may hold `budget` tokens."""

    def priorities(self, step: Step) -> Tensor | tuple[Tensor, Tensor]:
        """Priorities [B, K, N] of the cached tokens, for a policy that data cannot say; see `a2sf.policies.rule.Step`.

        It may return (priorities, memory [B, K, N, memory]): what it keeps per token, which the next step shows to it.
        What is returned for a column without a token is ignored. It must be a function of the step alone.
        """
        raise NotImplementedError

    def foresee(self, sequence: Sequence) -> Tensor:
        """What a policy that is not causal knows of each token before the first step, [B, K, T, M]."""
        raise NotImplementedError

    def of_layer(self, budget: int, layer: int, layers: int, prompt: int | None = None) -> int:
        """What layer `layer` of `layers` may hold where each may hold `budget` on average; the sum must be the same.

        `prompt` is the prompt's length in tokens, under a schedule that cuts after it; else None.
        """
        return budget

    def keeps(self, budget: int, layer: int = 0, layers: int = 1, prompt: int | None = None) -> Retention:
        """What layer `layer` of `layers` keeps at a budget of `budget` tokens, complete: what the engine runs.

        `prompt` as for `of_layer`.
        """
        known = () if prompt is None else (prompt,)
        kept = self.retention(self.of_layer(budget, layer, layers, *known), layer)
        if type(self).priorities is Policy.priorities:
            return kept
        foresee = None if self.causal else self.foresee
        return replace(kept, rule=replace(kept.rule, own=self.priorities, memory=self.memory, foresee=foresee))

    def check(self, layers: int, kv_heads: int | None = None) -> None:  # noqa: B027 (most have nothing to check)
        """Raise `ConfigError` where a setting does not fit a model of `layers` layers with `kv_heads` KV heads each."""


def check_name(policy: type[Policy]) -> None:
    """Raise `ConfigError` where a policy has no name, or one that another policy has as well."""
    name = getattr(policy, "name", None)
    if not isinstance(name, str) or not name or not getattr(policy, "label", None):
        raise ConfigError("policy", policy.__qualname__, "it needs a name and a label of its own, as class attributes")
    for other in subclasses(Policy):  # type: ignore[type-abstract]
        # the same class read twice (defined again, or a module that is also run as a script) is no other
        again = other.__qualname__ == policy.__qualname__ and (
            other.__module__ == policy.__module__ or "__main__" in (other.__module__, policy.__module__)
        )
        if vars(other).get("name") == name and not again:
            owner = f"{other.__module__}.{other.__qualname__}"
            raise ConfigError("policy", name, f"{policy.__qualname__} needs another name, because {owner} has this one")


def subclasses(cls: type[Policy]) -> Iterator[type[Policy]]:
    """Every class below `cls`."""
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def check_share(key: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is a number from 0 to 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 <= value <= 1.0:
        raise ConfigError(key, value, "give a number from 0 to 1")


def check_tokens(key: str, value: object, least: int = 0) -> None:
    """Raise `ConfigError` unless `value` is a whole number of at least `least` tokens."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(key, value, f"give a whole number of tokens, at least {least}")


def share_of(budget: int, share: float) -> int:
    """`share` of `budget` tokens, rounded down, exact in decimal: 0.7 of 10 tokens are 7."""
    return int(Decimal(str(share)) * budget)
