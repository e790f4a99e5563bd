"""A2SF: token pruning with a forgetting factor, and a harness that measures what pruning costs in accuracy."""

from a2sf.budget import Budget
from a2sf.eviction import EvictionState, evicting_attention
from a2sf.policy import A2SF, Policy, Retention

__all__ = ["A2SF", "Budget", "EvictionState", "Policy", "Retention", "evicting_attention"]
__version__ = "0.1.0"
