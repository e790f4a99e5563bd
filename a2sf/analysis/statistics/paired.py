"""Statistics of paired results: the same documents, answered by two systems. Plain arrays in, estimates out.

Documents that share a text are not independent: where `TextClusters` says that they do, whole texts are resampled and
permuted.
What each number means and why it was chosen is explained in docs/statistics.md; the coverage of the intervals and the false
positives of the tests are checked by simulation in tests/unit/analysis/test_stats.py and test_texts.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import optimize, special

# scipy.stats and statsmodels, which take a second to import, are imported where they are used: a sweep's table needs neither
from a2sf.analysis.statistics.power import POWER, smallest_average
from a2sf.analysis.statistics.texts import CONFIDENCE, TextClusters, Z, tail_of

RESAMPLES = 2000
"""Bootstrap resamples behind an interval."""
SIGN_FLIPS = 100_000
"""Random sign flips behind the p-value of an average; the smallest p-value they can show is 1e-5."""
FAR = 0.01
"""p-values of the bootstrap-t below are those of a scaled Student's t."""
NO_SPREAD = 1e-5
"""Errors below, relative to the mean or to the error of all documents, are rounding."""
MOST_EXACT = 16
"""Up to so many texts that differ, all sign patterns are used instead of random ones."""


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
        detectable: the smallest difference that is found with 80 % power on these documents, given how many answers flipped.
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


def standard_error(values: np.ndarray, texts: TextClusters | None = None) -> float:
    """Standard error of the mean, with n - 1, as lm-eval gives it (NaN for one document, or one text).

    Args:
        texts: of the documents; where some share one, the error is that of a mean of random texts.
    """
    if texts is not None and texts.shared:
        return texts.standard_error(values)
    from scipy import stats

    return float(stats.sem(values)) if len(values) > 1 else math.nan


def paired_difference(first: np.ndarray, second: np.ndarray, texts: TextClusters | None = None) -> Difference:
    """Compare two systems on one task.

    Where documents are right or wrong: exact McNemar test and Bonett and Price's interval; elsewhere the symmetric
    bootstrap-t. Where documents share texts the test flips whole texts, and the interval is that of the effective number of
    independent documents (Rao and Scott, 1992), or resamples whole texts.

    Args:
        first, second: the metric of each document, [n], in its own unit.
        texts: which documents share a text; None: none do.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    change = first - second
    texts = texts or TextClusters.independent(len(change))
    if not (is_binary(first) and is_binary(second)):
        if texts.shared:
            low, high = _bootstrap_interval([change], [texts])
            p = _sign_flip_p([change], [texts])
        else:
            low, high, p = _bootstrap_t([change])
        return Difference(len(change), float(change.mean()), low, high, p)
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    share = texts.effective_share(change)
    low, high = bonett_price(gained * share, lost * share, len(change) * share, texts.critical)
    return Difference(
        n=len(change),
        value=(gained - lost) / len(change),
        low=low,
        high=high,
        p=_sign_flip_p([change], [texts]) if texts.shared else mcnemar_p(gained, lost),
        gained=gained,
        lost=lost,
        detectable=detectable_difference(len(change) * share, (gained + lost) / len(change), texts.critical),
    )


def average_difference(changes: Sequence[np.ndarray], texts: Sequence[TextClusters] | None = None) -> Difference:
    """Compare two systems on the unweighted average of several tasks.

    The interval is a paired bootstrap, documents (whole texts where some share one) resampled within each task; where no
    document changed, it follows from the tasks' intervals of Bonett and Price. Where every change is -1, 0 or 1, or
    documents share texts, the p-value is the matching sign-flip test (for one task of independent documents that is
    McNemar's exact test). Elsewhere interval and p-value are those of the symmetric bootstrap-t.

    Args:
        changes: for each task, the first system's values minus the second's, one per document.
        texts: for each task, which documents share a text; None: none do.
    """
    changes = [np.asarray(c, float) for c in changes]
    texts = [TextClusters.independent(len(c)) for c in changes] if texts is None else texts
    binary = all(is_binary(abs(c)) for c in changes)
    gained = lost = detectable = None
    if binary:
        gained, lost = (int(sum((sign * c > 0).sum() for c in changes)) for sign in (1, -1))
        detectable = _detectable_average(changes, texts)
    if binary or any(t.shared for t in texts):
        low, high = _bootstrap_interval(changes, texts) if any(c.any() for c in changes) else _unchanged(changes, texts)
        p = _sign_flip_p(changes, texts)
    else:
        low, high, p = _bootstrap_t(changes)
    value = float(np.mean([c.mean() for c in changes]))
    return Difference(sum(map(len, changes)), value, low, high, p, gained, lost, detectable)


def mcnemar_p(gained: int, lost: int) -> float:
    """Exact McNemar test on the documents whose answer flipped."""
    if gained + lost == 0:
        return 1.0
    from statsmodels.stats.contingency_tables import mcnemar

    return float(min(1.0, mcnemar(np.array([[0, gained], [lost, 0]]), exact=True).pvalue))


def bonett_price(gained: float, lost: float, n: float, critical: float = Z) -> tuple[float, float]:
    """95 % interval of a paired difference of proportions: Wald on counts with one document added to each kind of flip.

    Source: Bonett and Price, 2012, J. Educ. Behav. Stat. 37(4), "Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data".

    Args:
        gained, lost, n: documents; not whole numbers where documents share texts.
        critical: standard errors to either side.
    """
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = critical * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def detectable_difference(n: float, discordance: float, critical: float = Z) -> float:
    """The smallest difference of two paired proportions that n documents show with 80 % power at the 5 % level.

    Solves Connor's sample-size formula for McNemar's test (1987, Biometrics 43) for the difference. A difference cannot
    be larger than the share of flipped answers, so a larger one is taken to flip just as many answers as it needs.

    Args:
        n: independent documents.
        discordance: share of documents whose answer flipped, either way.
        critical: standard errors beyond which a difference shows.
    """
    if math.isinf(critical):
        return 1.0
    z_power = special.ndtri(POWER)

    def surplus(delta: float) -> float:
        flips = max(discordance, delta)
        return n * delta**2 - (critical * math.sqrt(flips) + z_power * math.sqrt(flips - delta**2)) ** 2

    return float(optimize.brentq(surplus, 1e-9, 1.0)) if surplus(1.0) > 0 else 1.0


def _detectable_average(changes: Sequence[np.ndarray], texts: Sequence[TextClusters]) -> float:
    """The smallest difference of the average that these documents show, given how many answers flipped; 1 if none does."""
    documents = [len(c) * t.effective_share(c) for c, t in zip(changes, texts, strict=True)]
    free = sum(t.number for t in texts) - len(texts)
    shared = any(t.shared for t in texts)
    level = 2 * float(special.ndtr(special.stdtrit(free, 0.5 - CONFIDENCE / 2))) if shared and free else 1 - CONFIDENCE
    return smallest_average(documents, [float(abs(c).mean()) for c in changes], level) or 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-corrected p-values, in the given order.

    Those of statsmodels' `multipletests`, which collects Python's garbage in every call: 0.3 s beside a loaded model.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return corrected.tolist()


def bootstrap_means(values: np.ndarray, task: int = 0, texts: TextClusters | None = None) -> np.ndarray:
    """Means of `RESAMPLES` resamplings of the rows of `values`, [n] or [n, columns]; the first axis becomes RESAMPLES.

    The same n (or number of texts) and task draw the same documents (texts) every time, so systems compared in different
    calls stay paired.

    Args:
        task: a number for each task whose means are averaged, so that tasks have different draws.
        texts: of the rows; where some share one, whole texts are drawn.
    """
    if texts is None or not texts.shared:
        return _weights(len(values), task) @ values.astype(np.float32)
    weights = _weights(texts.number, task)
    sizes = (weights @ texts.sizes.astype(np.float32)).reshape(-1, *[1] * (values.ndim - 1))
    return weights @ texts.sums(values).astype(np.float32) / sizes


def interval(means: np.ndarray, tail: float = 0.5 - CONFIDENCE / 2) -> tuple[float, float]:
    """Percentile interval of bootstrap means; NaN where nothing bounds them.

    Args:
        tail: probability outside of it on either side (`texts.tail_of` where documents share texts).
    """
    if math.isnan(tail):
        return math.nan, math.nan
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _bootstrap_interval(changes: Sequence[np.ndarray], texts: Sequence[TextClusters]) -> tuple[float, float]:
    """95 % interval of the mean over tasks: percentiles of the bootstrap."""
    means = np.mean([bootstrap_means(c, i, t) for i, (c, t) in enumerate(zip(changes, texts, strict=True))], axis=0)
    return interval(means, tail_of(texts))


def _unchanged(changes: Sequence[np.ndarray], texts: Sequence[TextClusters]) -> tuple[float, float]:
    """95 % interval of the mean over tasks of which no document changed: the tasks' own, joined (Zou and Donner, 2008).

    A bootstrap would give a width of zero, however few documents there are.
    """
    sizes = [len(c) * t.effective_share(c) for c, t in zip(changes, texts, strict=True)]
    halves = [bonett_price(0, 0, n, t.critical)[1] for n, t in zip(sizes, texts, strict=True)]
    half = math.hypot(*halves) / len(changes)
    return -half, half


def _bootstrap_t(changes: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """95 % interval of the mean over tasks of independent documents, and the p-value of zero: symmetric bootstrap-t.

    Each resampling gives |t| of its mean's distance from the mean of all documents; the 95 % quantile of these replaces that
    of Student's t. So the test keeps its level where differences are skewed, which Student's t does not (Hall, 1988, J. R.
    Stat. Soc. B 50, "On symmetric bootstrap confidence intervals"). Documents are resampled within each task.
    """
    value = float(np.mean([c.mean() for c in changes]))
    if min(map(len, changes)) < 2:
        return math.nan, math.nan, 1.0
    parts = [float(c.var(ddof=1)) / len(c) / len(changes) ** 2 for c in changes]  # of the squared error
    error = math.sqrt(sum(parts))
    texts = [TextClusters.independent(len(c)) for c in changes]
    if not error > NO_SPREAD * abs(value):  # all documents of a task changed equally: only the signs can be tested
        exact = len(changes) == 1 and value
        return value, value, 2.0 ** (1 - len(changes[0])) if exact else _sign_flip_p(changes, texts)
    means, deviations = _resampled_t(changes, error)
    drawn = abs(means) / deviations
    drawn[np.isnan(drawn)] = math.inf  # a resampling without spread counts as at least as extreme
    measured = abs(value) / error
    p = float((1 + (drawn >= measured).sum()) / (1 + RESAMPLES))
    far, critical = (float(np.quantile(drawn, q, method="higher")) for q in (1 - FAR, CONFIDENCE))
    if p < FAR and math.isfinite(far):  # few resamplings are as far out: Student's t, scaled to agree at 1 %
        free = _degrees(parts, changes)
        p = 2 * float(special.stdtr(free, float(special.stdtrit(free, FAR / 2)) * measured / far))
    if math.isinf(critical):  # at most two documents differ from the rest
        return *interval(means * error + value, tail_of(texts, expanded=True)), p
    return value - critical * error, value + critical * error, p


def _resampled_t(changes: Sequence[np.ndarray], error: float) -> tuple[np.ndarray, np.ndarray]:
    """[RESAMPLES] each: distances of the resamplings' means from the mean of all documents, over `error`, and their errors.

    The error of a resampling without spread is NaN.
    """
    means, variances = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for task, change in enumerate(changes):
        off = (change - change.mean()) / error / len(changes)
        weights = _weights(len(change), task)
        mean = weights @ off.astype(np.float32)
        means += mean
        variances += (weights @ (off**2).astype(np.float32) - mean**2) / (len(change) - 1)
    return means, np.sqrt(np.where(variances > NO_SPREAD, variances, math.nan))


def _degrees(parts: Sequence[float], changes: Sequence[np.ndarray]) -> float:
    """Welch and Satterthwaite's degrees of freedom; for one task n - 1.

    Args:
        parts: of each task, its part of the squared error.
    """
    return sum(parts) ** 2 / sum(v**2 / (len(c) - 1) for v, c in zip(parts, changes, strict=True))


def one_sided_p(changes: Sequence[np.ndarray], distance: float, error: float) -> float:
    """How likely it is that the mean over tasks of independent documents lies so far above its true value: bootstrap-t.

    Differences may be skewed, so that a large mean is likelier than Student's t says.

    Args:
        changes: for each task, one value per document, at least two.
        distance: of the mean from its assumed true value; above 0 if it is larger.
        error: standard error that the distance is divided by, above 0.

    Returns:
        0 where all documents of each task are equal, so that resampling says nothing.
    """
    parts = [float(c.var(ddof=1)) / len(c) / len(changes) ** 2 for c in changes]
    own = math.sqrt(sum(parts))
    if not own > 0:
        return 0.0
    means, deviations = _resampled_t(changes, own)
    drawn = means / deviations
    drawn[np.isnan(drawn)] = math.inf
    measured = distance / error
    p = float((1 + (drawn >= measured).sum()) / (1 + RESAMPLES))
    far = float(np.quantile(drawn, 1 - FAR, method="higher"))
    if p < FAR and math.isfinite(far):  # few resamplings are as far out: Student's t, scaled to agree at 1 %
        free = _degrees(parts, changes)
        p = float(special.stdtr(free, float(special.stdtrit(free, FAR)) * measured / far))
    return p


def _sign_flip_p(changes: Sequence[np.ndarray], texts: Sequence[TextClusters]) -> float:
    """Two-sided p-value when each text's documents are as likely to have changed, all together, the other way.

    Exact where documents share texts and at most `MOST_EXACT` texts changed, else from random flips.
    """
    # what each text adds to the sum of the tasks' means
    parts = [t.sums(c) / len(c) for c, t in zip(changes, texts, strict=True)]
    parts = [p[abs(p) > 1e-12] for p in parts]
    changed = np.concatenate(parts)
    if not len(changed):
        return 1.0
    observed = abs(changed.sum()) - 1e-12
    if any(t.shared for t in texts) and len(changed) <= MOST_EXACT:
        signs = 1 - 2 * ((np.arange(2 ** len(changed))[:, None] >> np.arange(len(changed))) & 1)
        return float((abs(signs @ changed) >= observed).mean())
    rng = np.random.default_rng(0)
    draws = np.zeros(SIGN_FLIPS)
    for part in parts:  # texts that add equally much are drawn together
        for size, count in zip(*np.unique(abs(part), return_counts=True), strict=True):
            draws += size * (2 * rng.binomial(count, 0.5, SIGN_FLIPS) - count)
    return float((1 + (abs(draws) >= observed).sum()) / (1 + SIGN_FLIPS))


@lru_cache(maxsize=8)
def _weights(n: int, task: int) -> np.ndarray:
    """[RESAMPLES, n] how much each document weighs in each resampling; rows sum to 1."""
    draws = np.random.default_rng((n, task)).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return (draws / n).astype(np.float32)
