"""Slots shared out by weights, to the last one: among the layers of a model, or the key/value heads of a layer."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

from a2sf.policies.base import UNLIMITED, share_of
from a2sf.policies.rule import Head


@lru_cache(maxsize=65536)
def apportion(total: int, weights: tuple[float, ...]) -> tuple[int, ...]:
    """`total` slots shared out in proportion to `weights` (positive), at least 1 each: the sum is exactly `total`.

    What rounding down leaves goes to the largest remainders, of equals to the first.

    Raises:
        ValueError: if there are more weights than slots.
    """
    if total < len(weights):
        raise ValueError(f"{total} slots cannot be shared out among {len(weights)}")
    exact = [Fraction(str(w)) for w in weights]
    each = [(total - len(weights)) * w / sum(exact) for w in exact]  # beyond the first one
    slots = [int(x) for x in each]
    order = sorted(range(len(each)), key=lambda i: slots[i] - each[i])
    for i in order[: total - len(weights) - sum(slots)]:
        slots[i] += 1
    return tuple(1 + n for n in slots)


@lru_cache(maxsize=65536)
def head_slots(heads: tuple[Head, ...], budget: int) -> tuple[tuple[int, int, int], ...]:
    """`C`, `r` and `s` of each head of a layer that may hold `budget` tokens per head."""
    alike = budget >= UNLIMITED or len({h.share for h in heads}) == 1
    slots = (budget,) * len(heads) if alike else apportion(budget * len(heads), tuple(h.share for h in heads))
    found = []
    for head, C in zip(heads, slots, strict=True):
        sinks = min(head.sinks, C)
        found.append((C, min(share_of(C, head.recent_share), C - sinks), sinks))
    return tuple(found)
