"""The settings that calibration tries, for one head or for all heads of a layer (`a2sf.policies.rule.Head`)."""

from __future__ import annotations

from itertools import product

from a2sf.policies.rule import Head

SUM_FACTORS = (0.1, 0.4, 0.7, 0.9, 0.97, 1.0)
MEAN_FACTORS = (0.7, 0.9, 0.97, 1.0)
RECENT_SHARES = (0.0, 0.125, 0.25, 0.5, 0.75)
SINKS = (0, 4)
PAPER = Head(forgetting_factor=0.1)
H2O = Head(recent_share=0.5)
"""The settings of the A2SF and H2O papers, for comparison. Both are in the grid."""


def settings() -> tuple[Head, ...]:
    """All combinations, and the newest tokens alone."""
    ranked = [(a, False) for a in SUM_FACTORS] + [(a, True) for a in MEAN_FACTORS]
    made = [
        Head(forgetting_factor=a, mean_over_age=mean, recent_share=recent, sinks=sinks)
        for (a, mean), recent, sinks in product(ranked, RECENT_SHARES, SINKS)
    ]
    return (*made, *(Head(recent_share=1.0, sinks=sinks) for sinks in SINKS))


def describe(head: Head) -> str:
    """A setting as a short text: `A, a 0.7, recent 0.25, sinks 4`."""
    ranked = "A / N" if head.mean_over_age else "A"
    sinks = f", sinks {head.sinks}" if head.sinks else ""
    return f"{ranked}, a {head.forgetting_factor:g}, recent {head.recent_share:g}{sinks}"
