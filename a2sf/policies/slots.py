"""Slots divided in proportion to weights, among the layers of a model or the key/value heads of a layer."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

from a2sf.policies.base import UNLIMITED, Retention, share_of
from a2sf.policies.rule import Head


@lru_cache(maxsize=65536)
def apportion(total: int, weights: tuple[float, ...]) -> tuple[int, ...]:
    """Divide `total` slots in proportion to `weights`, by the largest remainders (ties: the first).

    Args:
        total: number of slots, at least one for each weight.
        weights: positive numbers.

    Returns:
        A number of slots for each weight, at least 1, with sum `total`.

    Raises:
        ValueError: if there are more weights than slots.
    """
    if total < len(weights):
        raise ValueError(f"{total} slots cannot be divided among {len(weights)}")
    exact = [Fraction(str(w)) for w in weights]
    each = [(total - len(weights)) * w / sum(exact) for w in exact]  # beyond one slot for each
    slots = [int(x) for x in each]
    order = sorted(range(len(each)), key=lambda i: slots[i] - each[i])
    for i in order[: total - len(weights) - sum(slots)]:
        slots[i] += 1
    return tuple(1 + n for n in slots)


@lru_cache(maxsize=65536)
def head_slots(heads: tuple[Head, ...], budget: int) -> tuple[tuple[int, int, int], ...]:
    """Budget `C`, recent tokens `r` and sinks `s` of each head, where the mean budget of the layer's heads is `budget`."""
    equal = budget >= UNLIMITED or len({h.share for h in heads}) == 1
    slots = (budget,) * len(heads) if equal else apportion(budget * len(heads), tuple(h.share for h in heads))
    found = []
    for head, C in zip(heads, slots, strict=True):
        sinks = min(head.sinks, C)
        found.append((C, min(share_of(C, head.recent_share), C - sinks), sinks))
    return tuple(found)


def leaves_choice(stated: Retention) -> bool:
    """Whether some head has a slot that is neither for the newest nor for the first tokens: the rule ranks for it."""
    whole_layer = ((stated.budget, stated.recent, stated.sinks),)
    heads = head_slots(stated.rule.heads, stated.budget) if stated.rule.heads else whole_layer
    return any(recent + sinks < C for C, recent, sinks in heads)
