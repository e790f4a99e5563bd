"""Policies that are built on another policy (`by`): its tokens ranked in another way, or what it evicts merged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from a2sf.errors import ConfigError
from a2sf.policies.base import Policy, Retention
from a2sf.policies.find import check_setting_names, find_policy, source_digest
from a2sf.policies.ranking import Ranking
from a2sf.policies.rule import PriorityFn

OWN_VERSION = 2
"""Raised when a change moves the numbers of a policy from outside this package that is given as `by`."""
ALLOWED = "give the name of a policy, or a mapping of its name and settings, such as {name: h2o, recent_share: 0.25}"


@dataclass(frozen=True, kw_only=True)
class Built(Policy):
    """A policy built on another policy. It has the other policy's schedules and budgets of layers.

    Attributes:
        by: the other policy: its name, or a mapping of its `name` and settings.
    """

    by: Any = "snapkv"

    def __post_init__(self) -> None:
        if isinstance(self.by, Mapping):
            object.__setattr__(self, "by", dict(self.by))
        object.__setattr__(self, "schedules", self.inner.schedules)
        for name in ("unrotated", "projected"):
            object.__setattr__(self, name, getattr(self, name) or getattr(self.inner, name))

    @cached_property
    def inner(self) -> Policy:
        """The other policy.

        Raises:
            ConfigError: if there is no such policy, or its ranking cannot be changed.
        """
        settings = dict(self.by) if isinstance(self.by, Mapping) else {"name": self.by}
        name = settings.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError("policy.by", self.by, ALLOWED)
        cls = find_policy(name, "policy.by")
        why = {
            "is built on another policy itself": issubclass(cls, Built),
            "sees later tokens": not cls.causal,
            "evicts nothing": not cls.evicts,
            "merges what it evicts": cls.merge is not Policy.merge,
            "reads a prompt before it is cut": cls.prepare is not Policy.prepare or cls.look is not Policy.look,
        }
        for reason, refused in why.items():
            if refused:
                raise ConfigError("policy.by", name, f"{name} {reason}; give another policy")
        check_setting_names(cls, settings, "policy.by")
        return cls(**settings)

    def check_budget(self) -> None:
        """Raise `ConfigError` if the other policy has no budget, but a threshold."""
        if not self.inner.uses_budget:
            raise ConfigError("policy.by", self.inner.name, f"{self.inner.name} has no budget; give another policy")

    @property
    def min_budget(self) -> int:
        return self.inner.min_budget

    def acting_budget(self, budget: int, layer: int, acts: tuple[bool, ...], prompt: int | None) -> int:
        return self.inner.acting_budget(budget, layer, acts, prompt)

    def layer_budget(self, budget: int, layer: int, layers: int, prompt: int | None = None) -> int:
        known = () if prompt is None else (prompt,)
        return self.inner.layer_budget(budget, layer, layers, *known)

    def check(self, layers: int, kv_heads: int | None = None) -> None:
        self.inner.check(layers, kv_heads)

    def check_head_size(self, size: int) -> None:
        self.inner.check_head_size(size)

    def stored_settings(self) -> dict[str, Any]:
        by: dict[str, Any] = {"name": self.inner.name, **self.inner.stored_settings(), "version": self.inner.version}
        if source := source_digest(type(self.inner)):
            by |= {"source": source, "own": OWN_VERSION}
        return super().stored_settings() | {"by": by}


@dataclass(frozen=True, kw_only=True)
class By(Built):
    """A policy whose tokens are ranked by another policy, and then otherwise. Sinks and recent tokens are the other's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_budget()

    @abstractmethod
    def changed(self, ranking: Ranking) -> PriorityFn:
        """The priorities made of the other policy's ranking; it must not depend on the budget."""

    def retention(self, budget: int, layer: int) -> Retention:
        stated = self.inner.retention(budget, layer)
        rule = stated.rule
        if rule.heads or rule.full_heads:
            raise ConfigError(
                "policy.by", self.inner.name, "its key/value heads differ in a layer; give another policy"
            )
        inner, functions = self.inner, dict[str, Any]()
        if type(inner).priorities is not Policy.priorities:
            functions |= {"priority_fn": inner.priorities, "memory": inner.memory}
        if type(inner).remember is not Policy.remember:
            functions["memory_fn"] = inner.remember
        if type(inner).head_priorities is not Policy.head_priorities:
            functions["division_fn"] = inner.head_priorities
        if functions:
            seen = {name: getattr(inner, name) for name in ("queries", "unrotated", "projected")}
            rule = replace(rule, **functions, **seen)
        ranked = self.changed(Ranking(rule, stated.forgetting_factor))
        plain = replace(rule, weight=None, bias=None, mean_over_age=False, priority_fn=ranked)
        return replace(stated, rule=plain)
