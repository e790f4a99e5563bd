"""A2SF: token pruning with a forgetting factor, and a harness that measures what pruning costs in accuracy."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from a2sf.engine.functional import attend, evicting_attention
    from a2sf.engine.state import EvictionState
    from a2sf.hf.generation import PrunedCache
    from a2sf.hf.scope import pruning
    from a2sf.policies.a2sf import A2SF
    from a2sf.policies.base import Policy, Retention
    from a2sf.policies.budget import Budget
    from a2sf.policies.make import make_policy
    from a2sf.policies.rule import Rule, Step
    from a2sf.policies.schedule import Schedule

__all__ = [
    "A2SF",
    "Budget",
    "EvictionState",
    "Policy",
    "PrunedCache",
    "Retention",
    "Rule",
    "Schedule",
    "Step",
    "attend",
    "evicting_attention",
    "make_policy",
    "pruning",
]
__version__ = "0.2.0"

_WHERE = {
    "A2SF": "a2sf.policies.a2sf",
    "Budget": "a2sf.policies.budget",
    "EvictionState": "a2sf.engine.state",
    "Policy": "a2sf.policies.base",
    "PrunedCache": "a2sf.hf.generation",
    "Retention": "a2sf.policies.base",
    "Rule": "a2sf.policies.rule",
    "Schedule": "a2sf.policies.schedule",
    "Step": "a2sf.policies.rule",
    "attend": "a2sf.engine.functional",
    "evicting_attention": "a2sf.engine.functional",
    "make_policy": "a2sf.policies.make",
    "pruning": "a2sf.hf.scope",
}


def __getattr__(name: str) -> Any:
    """A public name on first use: torch takes a second to load and transformers several, `a2sf --help` needs neither."""
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
