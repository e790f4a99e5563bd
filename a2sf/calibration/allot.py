"""Slots shared out so that the sum of errors falls most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

UNIT = 0.05
"""What is given at a time, as a share of the mean budget."""


def allot(curves: np.ndarray, multiples: Sequence[float], unit: float = UNIT) -> np.ndarray:
    """A share for each of `n` layers or heads, float64 [n], mean 1, that lessens the sum of their errors most.

    Greedy: everyone starts with the smallest multiple, and each further unit goes to whom it helps most. Errors between two
    multiples are read off the lower convex hull of the measured points; on that hull greedy is exact, up to a unit.

    Args:
        curves: float64 [n, multiples], the error of each at so many times the mean budget.
        multiples: ascending, the first below 1, the last above.

    Raises:
        ValueError: if they do not allow for a mean of 1.
    """
    at = np.asarray(multiples, dtype=np.float64)
    n = len(curves)
    if not at[0] <= 1 <= at[-1] or bool((np.diff(at) <= 0).any()):
        raise ValueError(f"multiples must ascend around 1, got {list(multiples)}")
    steps = round((at[-1] - at[0]) / unit)
    grid = at[0] + unit * np.arange(steps + 1)
    gains = np.stack([-np.diff(np.interp(grid, *_hull(at, curve))) for curve in curves])  # falling in each row
    left = round(n * (1 - at[0]) / unit)
    # the greatest gains of all: each row's are in order, so that none is taken before those on its left
    order = np.argsort(-gains, axis=None, kind="stable")[:left]
    given = np.bincount(order // steps, minlength=n)
    shares = at[0] + unit * given
    return shares / shares.mean()


def _hull(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower convex hull of points in ascending order, made never to rise."""
    y = np.minimum.accumulate(y)
    kept: list[int] = []
    for i in range(len(x)):
        while len(kept) > 1:
            a, b = kept[-2:]
            if (y[b] - y[a]) * (x[i] - x[b]) < (y[i] - y[b]) * (x[b] - x[a]):
                break
            kept.pop()
        kept.append(i)
    return x[kept], y[kept]
