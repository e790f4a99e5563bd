"""A2SF: token pruning with a forgetting factor, and a harness that measures what pruning costs in accuracy."""

from typing import TYPE_CHECKING, Any

from a2sf.engine.functional import attend, evicting_attention
from a2sf.engine.state import EvictionState
from a2sf.policies.a2sf import A2SF
from a2sf.policies.base import Policy, Retention
from a2sf.policies.budget import Budget
from a2sf.policies.make import make_policy
from a2sf.policies.rule import Rule, Step
from a2sf.policies.schedule import Schedule

if TYPE_CHECKING:
    from a2sf.hf.generation import PrunedCache, pruning

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
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`PrunedCache` and `pruning` on first use, because transformers takes seconds to load."""
    if name in ("PrunedCache", "pruning"):
        from a2sf.hf import generation

        return getattr(generation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
