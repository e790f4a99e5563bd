"""How many documents a comparison needs, before it is made: the power of the paired tests.

Two systems differ on a share of the documents, the flips: one is right and the other wrong. Flips that go either way equally
often hide a difference, so that the power depends on their share, and not on the accuracies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import optimize, special

POWER = 0.8
MOST_DOCUMENTS = 10**8
"""Beyond so many documents a number is not given."""
UNLIKELY = 1e-12
"""Numbers of flips with a smaller probability on either side are left out."""


def mcnemar_power(n: int, flips: float, difference: float, level: float = 0.05) -> float:
    """The probability that the exact two-sided McNemar test of n documents is significant.

    It is a sum over the number of documents that flip, which is binomial; so is, of these, the number that one system has
    right.

    Args:
        flips: share of the documents on which the systems differ.
        difference: true difference of their accuracies, at most `flips`.
        level: of the test.
    """
    if n < 1 or not flips > 0:
        return 0.0
    low = int(special.bdtrik(UNLIKELY, n, min(flips, 1 - 1e-15)))
    high = n - int(special.bdtrik(UNLIKELY, n, max(1 - flips, 1e-15)))
    k = np.arange(max(1, low), min(n, high) + 1)
    probability = np.exp(
        special.gammaln(n + 1)
        - special.gammaln(k + 1)
        - special.gammaln(n - k + 1)
        + special.xlogy(k, flips)
        + special.xlog1py(n - k, -flips)
    )
    last = _last_rejected(k, level)
    right = min(1.0, (1 + abs(difference) / flips) / 2)
    possible = last >= 0
    k, last, probability = k[possible], last[possible], probability[possible]
    # significant if at most `last` flips go one way, or at most `last` the other way
    rejected = special.bdtr(last, k, right) + special.bdtr(last, k, 1 - right)
    return float((probability * rejected).sum())


def smallest_difference(n: int, flips: float, level: float = 0.05) -> float | None:
    """The smallest difference that McNemar's test of n documents finds with 80 % power; None: it finds none.

    A difference is at most the share of flips; for a larger one, as many documents flip as it needs.

    Args:
        n: documents.
        flips, level: as `mcnemar_power`.
    """
    return _smallest(lambda d: mcnemar_power(n, max(flips, d), d, level) - POWER)


def documents_needed(difference: float, flips: float, level: float = 0.05) -> int | None:
    """How many documents McNemar's test needs to find a difference with 80 % power; None: too many.

    Args:
        difference: of the accuracies, above 0.
        flips, level: as `mcnemar_power`.
    """
    flips = max(flips, difference)
    high = 1
    while mcnemar_power(high, flips, difference, level) < POWER:
        high *= 2
        if high > MOST_DOCUMENTS:
            return None
    low = high // 2  # too few
    while high - low > 1:
        middle = (low + high) // 2
        enough = mcnemar_power(middle, flips, difference, level) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high


def smallest_average(documents: Sequence[float], flips: Sequence[float], level: float = 0.05) -> float | None:
    """The smallest difference of the unweighted average over tasks that is found with 80 % power; None: none is.

    By the normal distribution (Connor's formula, 1987, for the mean over tasks), with the same difference in each task.

    Args:
        documents, flips: of each task.
        level: of the test.
    """
    weights = 1 / (len(documents) ** 2 * np.asarray(documents, float))

    def surplus(d: float) -> float:
        shares = np.maximum(np.asarray(flips, float), d)
        return d - _connor(float(weights @ shares), float(weights @ (shares - d**2)), level)

    return _smallest(surplus)


def documents_for_average(difference: float, flips: Sequence[float], level: float = 0.05) -> int:
    """How many documents each task needs, so that the average over tasks shows a difference with 80 % power.

    Args:
        difference, flips, level: as `smallest_average`.
    """
    shares = np.maximum(np.asarray(flips, float), difference)
    of_one = _connor(float(shares.sum()), float((shares - difference**2).sum()), level) / len(shares)
    return max(1, math.ceil((of_one / difference) ** 2))


def _last_rejected(k: np.ndarray, level: float) -> np.ndarray:
    """For each number of flips the largest number of one kind at which the test is significant; -1: there is none."""
    last = np.nan_to_num(np.floor(special.bdtrik(level / 2, k, 0.5)), nan=-1.0) + 1
    for _ in range(2):  # bdtrik is not exact at whole numbers
        last -= (last >= 0) & (2 * special.bdtr(np.maximum(last, 0), k, 0.5) > level * (1 + 1e-12))
    return last


def _connor(under_null: float, under_difference: float, level: float) -> float:
    """The difference that is found with 80 % power, from its variance without and with a difference."""
    return float(
        -special.ndtri(level / 2) * math.sqrt(under_null) + special.ndtri(POWER) * math.sqrt(max(0.0, under_difference))
    )


def _smallest(surplus: Callable[[float], float]) -> float | None:
    """Where a rising function of a difference crosses zero; None: nowhere up to 1."""
    return float(optimize.brentq(surplus, 1e-9, 1.0, xtol=1e-7)) if surplus(1.0) >= 0 else None
