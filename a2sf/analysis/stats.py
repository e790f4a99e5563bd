"""Statistics of paired results: the same documents, answered by two systems. Plain arrays in, estimates out.

What each number means and why it was chosen is told in docs/statistics.md; the coverage of the intervals and the false
positives of the tests are checked by simulation in tests/unit/test_stats.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import optimize, special

# scipy.stats and statsmodels, which take a second to import, are imported where they are used: a sweep's table needs neither

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 2000
"""Bootstrap resamples behind an interval."""
SIGN_FLIPS = 100_000
"""Random sign flips behind the p-value of an average; the smallest p-value they can show is 1e-5."""

Z = float(special.ndtri(0.5 + CONFIDENCE / 2))


@dataclass(frozen=True)
class Difference:
    """A paired difference between two systems, first minus second.

    Attributes:
        n: documents both answered.
        value: mean of the first minus mean of the second, in the metric's own unit.
        low, high: 95 % interval of the difference.
        p: two-sided p-value of "no difference"; 1.0 where no document differs.
        gained: documents right in the first and wrong in the second; None where the metric is not right-or-wrong.
        lost: the other way round.
        detectable: the smallest difference these documents show with 80 % power, given how many answers flipped.
    """

    n: int
    value: float
    low: float
    high: float
    p: float
    gained: int | None = None
    lost: int | None = None
    detectable: float | None = None


def is_binary(values: np.ndarray) -> bool:
    """Whether every value is 0 or 1: right or wrong."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean, with n - 1, as lm-eval gives it (NaN for one document)."""
    from scipy import stats

    return float(stats.sem(values)) if len(values) > 1 else math.nan


def paired_difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Compare two systems on one task: exact McNemar where documents are right or wrong, paired bootstrap elsewhere."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    change = first - second
    if not (is_binary(first) and is_binary(second)):
        low, high, p = _bootstrap_interval([change])
        return Difference(len(change), float(change.mean()), low, high, p)
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    low, high = bonett_price(gained, lost, len(change))
    return Difference(
        n=len(change),
        value=(gained - lost) / len(change),
        low=low,
        high=high,
        p=mcnemar_p(gained, lost),
        gained=gained,
        lost=lost,
        detectable=detectable_difference(len(change), (gained + lost) / len(change)),
    )


def average_difference(changes: Sequence[np.ndarray]) -> Difference:
    """Compare two systems on the unweighted average of several tasks.

    The interval is a paired bootstrap, documents resampled within each task. Where every change is -1, 0 or 1, the
    p-value is the matching sign-flip test (for one task that is McNemar's exact test); elsewhere the bootstrap's.

    Args:
        changes: for each task, the first system's values minus the second's, one per document.
    """
    changes = [np.asarray(c, float) for c in changes]
    binary = all(is_binary(abs(c)) for c in changes)
    low, high, p = _bootstrap_interval(changes)
    gained = lost = None
    if binary:
        gained, lost = (int(sum((sign * c > 0).sum() for c in changes)) for sign in (1, -1))
        p = _sign_flip_p(changes)
    value = float(np.mean([c.mean() for c in changes]))
    return Difference(sum(map(len, changes)), value, low, high, p, gained, lost)


def mcnemar_p(gained: int, lost: int) -> float:
    """Exact McNemar test on the documents whose answer flipped."""
    if gained + lost == 0:
        return 1.0
    from statsmodels.stats.contingency_tables import mcnemar

    return float(min(1.0, mcnemar(np.array([[0, gained], [lost, 0]]), exact=True).pvalue))


def bonett_price(gained: int, lost: int, n: int) -> tuple[float, float]:
    """95 % interval of a paired difference of proportions: Wald on counts with one document added to each kind of flip.

    Source: Bonett and Price, 2012, J. Educ. Behav. Stat. 37(4), "Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data".
    """
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def detectable_difference(n: int, discordance: float) -> float:
    """The smallest difference of two paired proportions that n documents show with 80 % power at the 5 % level.

    Solves Connor's sample-size formula for McNemar's test (1987, Biometrics 43) for the difference. A difference cannot
    be larger than the share of flipped answers, so a larger one is taken to flip just as many answers as it needs.

    Args:
        n: documents.
        discordance: share of documents whose answer flipped, either way.
    """
    z_power = special.ndtri(POWER)

    def surplus(delta: float) -> float:
        flips = max(discordance, delta)
        return n * delta**2 - (Z * math.sqrt(flips) + z_power * math.sqrt(flips - delta**2)) ** 2

    return float(optimize.brentq(surplus, 1e-9, 1.0)) if surplus(1.0) > 0 else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-corrected p-values, in the given order."""
    if not len(p_values):
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def bootstrap_means(values: np.ndarray, task: int = 0) -> np.ndarray:
    """Means of `RESAMPLES` resamplings of the rows of `values`, [n] or [n, columns]; the first axis becomes RESAMPLES.

    The same n and task draw the same documents every time, so systems compared in different calls stay paired.

    Args:
        task: tells tasks apart whose means are averaged; with the same draws they would move together.
    """
    return _weights(len(values), task) @ values.astype(np.float32)


def interval(means: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of bootstrap means."""
    low, high = np.quantile(means, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(low), float(high)


def _bootstrap_interval(changes: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """95 % interval of the mean over tasks, and the p-value of zero from the bootstrap's standard error."""
    means = np.mean([bootstrap_means(c, task) for task, c in enumerate(changes)], axis=0)
    value, spread = float(np.mean([c.mean() for c in changes])), float(means.std(ddof=1))
    p = 2 * float(special.ndtr(-abs(value) / spread)) if spread > 0 else float(value == 0)
    return *interval(means), p


def _sign_flip_p(changes: Sequence[np.ndarray]) -> float:
    """Two-sided p-value when each flipped document is as likely to have flipped the other way."""
    flips = [(int(abs(c).sum()), len(c)) for c in changes]
    if sum(count for count, _ in flips) == 0:
        return 1.0
    observed = abs(sum(c.mean() for c in changes))
    rng = np.random.default_rng(0)
    draws = sum((2 * rng.binomial(count, 0.5, SIGN_FLIPS) - count) / n for count, n in flips)
    return float((1 + (abs(draws) >= observed - 1e-12).sum()) / (1 + SIGN_FLIPS))


@lru_cache(maxsize=8)
def _weights(n: int, task: int) -> np.ndarray:
    """[RESAMPLES, n] how much each document weighs in each resampling; rows sum to 1."""
    draws = np.random.default_rng((n, task)).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return (draws / n).astype(np.float32)
