"""Slots divided among layers or heads so that the sum of their errors is smallest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

UNIT = 0.05
"""How much budget is given at a time, as a share of the mean budget."""


def allocate_budget(curves: np.ndarray, multiples: Sequence[float]) -> np.ndarray:
    """Budgets of `n` layers or heads, as shares of the mean budget, that make the sum of their errors smallest.

    A greedy search: each layer or head starts with the smallest multiple, and every further unit goes to the one whose error
    it reduces most. The error between two multiples is that of the lower convex hull of the measured points. On the hull
    the greedy search is exact up to one unit.

    Args:
        curves: float64 [n, multiples], the error of each layer or head at each multiple of the mean budget.
        multiples: in ascending order, the first at most 1 and the last at least 1.

    Returns:
        float64 [n], with mean 1.

    Raises:
        ValueError: if the multiples do not ascend, or do not contain 1.
    """
    at = np.asarray(multiples, dtype=np.float64)
    n = len(curves)
    if not at[0] <= 1 <= at[-1] or bool((np.diff(at) <= 0).any()):
        raise ValueError(f"multiples must ascend around 1, got {list(multiples)}")
    steps = round((at[-1] - at[0]) / UNIT)
    grid = at[0] + UNIT * np.arange(steps + 1)
    # how much each unit reduces the error; on a convex curve, less and less
    gains = np.stack([-np.diff(np.interp(grid, *_hull(at, curve))) for curve in curves])
    left = round(n * (1 - at[0]) / UNIT)
    # the largest gains of all rows: a row's gains descend, so that its units are taken in their order
    order = np.argsort(-gains, axis=None, kind="stable")[:left]
    given = np.bincount(order // steps, minlength=n)
    shares = at[0] + UNIT * given
    return shares / shares.mean()


def _hull(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower convex hull of points with ascending `x`, after `y` is replaced by its running minimum."""
    y = np.minimum.accumulate(y)
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (y[b] - y[a]) * (x[i] - x[b]) < (y[i] - y[b]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    return x[corners], y[corners]
