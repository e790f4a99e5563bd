"""A difference pooled over models: in these models, and in models like these (random effects).

All models answer the same documents, so that the errors of their differences are correlated: a sample of documents that is
kind to one policy is so in all models. The errors therefore enter with their covariances.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import optimize, special

from a2sf.analysis.statistics.texts import TextClusters

FEWEST = 3
"""Models from which on there is a prediction interval."""
TAIL = 0.025
SMALLEST = 1e-12
"""p-values below are given as this."""


@dataclass(frozen=True, eq=False)
class Changes:
    """How the documents of a task change between two systems, in one model.

    Attributes:
        values: one system's metric minus the other's, [n].
        keys: [n] what identifies a document in every model, or its text where documents share texts.
    """

    values: np.ndarray
    keys: Sequence[str]

    @classmethod
    def joined(cls, tasks: Sequence[Changes]) -> Changes:
        """Those of several tasks as of one; no two tasks share documents."""
        keys = [f"{i} {key}" for i, task in enumerate(tasks) for key in task.keys]
        return cls(np.concatenate([t.values for t in tasks]), keys)

    @cached_property
    def texts(self) -> TextClusters:
        return TextClusters.keyed(self.keys)

    @cached_property
    def sums(self) -> pd.Series:
        """For each key, what its documents add to the error of the mean; the sum of their squares is its variance."""
        g, n = self.texts.number, len(self.values)
        off = (self.values - self.values.mean()) * (math.sqrt(g / (g - 1)) / n if g > 1 else math.nan)
        if not self.texts.shared:
            return pd.Series(off, index=pd.Index(self.keys))
        return pd.Series(off).groupby(list(self.keys), sort=False).sum()

    @property
    def variance(self) -> float:
        """Of the mean; where documents are right or wrong, with one flip added either way (Bonett and Price, 2012).

        Else models without a flip would have no error.
        """
        measured = float((self.sums**2).sum())
        if not np.isin(self.values, (-1.0, 0.0, 1.0)).all():
            return measured
        n = len(self.values) * self.texts.effective_share(self.values)
        up, down = ((n * float((sign * self.values > 0).mean()) + 1) / (n + 2) for sign in (1, -1))
        return max(measured, (up + down - (up - down) ** 2) / (n + 2))


@dataclass(frozen=True)
class Pooled:
    """A mean of differences over models, each model counted once; all in the metric's own unit.

    Attributes:
        models: how many there are.
        value: the mean.
        here_low, here_high: 95 % interval of the mean over these very models; only the documents are a sample.
        low, high, p: 95 % interval and two-sided p-value of "zero" for the mean over models like these, of which these are a
            random sample.
        tau: standard deviation of the true differences between models.
        i2: share of the variance between the measured differences that the sampling of documents does not explain.
        p_equal: p-value of "the true difference is the same in all models" (Cochran's Q).
        next_low, next_high: 95 % prediction interval: the difference that another such model will show on these documents;
            None with fewer than three models.
    """

    models: int
    value: float
    here_low: float
    here_high: float
    low: float
    high: float
    p: float
    tau: float
    i2: float
    p_equal: float
    next_low: float | None = None
    next_high: float | None = None


def pool_tasks(tasks: Sequence[Sequence[Changes]]) -> Pooled:
    """Pool differences over models, of a task or of the unweighted mean over tasks.

    Args:
        tasks: for each task, the changes in each model, in the same order.
    """
    k, weight = len(tasks[0]), 1 / len(tasks)
    values, covariance = np.zeros(k), np.zeros((k, k))
    for models in tasks:
        values += weight * np.array([m.values.mean() for m in models])
        covariance += weight**2 * covariance_of(models)
    free = sum(min(m.texts.number for m in models) - 1 for models in tasks)
    pooled = pool(values, covariance, free)
    right_or_wrong = all(np.isin(m.values, (-1.0, 0.0, 1.0)).all() for models in tasks for m in models)
    return _within_one(pooled) if right_or_wrong else pooled


def _within_one(pooled: Pooled) -> Pooled:
    """The same with intervals inside of what a difference of shares can be."""
    ends = ("here_low", "here_high", "low", "high", "next_low", "next_high")
    known = {end: value for end in ends if (value := getattr(pooled, end)) is not None}
    return replace(pooled, **{end: min(1.0, max(-1.0, value)) for end, value in known.items()})


def covariance_of(models: Sequence[Changes]) -> np.ndarray:
    """[k, k] covariance of the means of one task's changes in several models, by the documents or texts that they share."""
    out = np.diag([m.variance for m in models])
    for i, j in itertools.combinations(range(len(models)), 2):
        one, other = models[i].sums, models[j].sums
        if one.index.equals(other.index):
            out[i, j] = out[j, i] = float(one.to_numpy() @ other.to_numpy())
        else:  # NaN where one lacks the key: left out
            out[i, j] = out[j, i] = float((one * other).sum())
    return out


def pool(values: np.ndarray, covariance: np.ndarray, free: float) -> Pooled:
    """Pool differences over models.

    The variance between models is Paule and Mandel's estimate (1982), by statsmodels. The error of the mean over models like
    these has two parts: the variance between the measured differences, with Student's t of k - 1 (Hartung and Knapp, 2001;
    Sidik and Jonkman, 2002), and the covariance by common documents; their intervals are joined as by Zou and Donner (2008).
    The interval is not narrower than that of these very models (Wiksten et al., 2016). Models count equally: those in which
    few answers change have small errors and small differences, and would count too much if weighted by their errors.

    Args:
        values: of at least two models, [k].
        covariance: of the errors of `values`, [k, k].
        free: degrees of freedom of the errors: the number of documents or texts, less one for each task.
    """
    values, k = np.asarray(values, float), len(values)
    # mean covariance by common documents; a negative one is chance
    shared = max(0.0, float(covariance.sum() - np.trace(covariance)) / (k * (k - 1)))
    independent = max(0.0, float(np.trace(covariance)) / k - shared)
    value, variance = float(values.mean()), float(values.var(ddof=1))
    tau2, i2, p_equal = _heterogeneity(values, independent)
    parts = [(variance / k, k - 1.0), (shared, free)]
    here = [(independent / k + shared, free)]
    half_here = _half_width(here)
    half = max(_half_width(parts), half_here)
    ahead = math.sqrt(max(variance, independent) * (1 + 1 / k)) * _t(k - 1, TAIL) if k >= FEWEST else None
    return Pooled(
        models=k,
        value=value,
        here_low=value - half_here,
        here_high=value + half_here,
        low=value - half,
        high=value + half,
        p=max(_p_value(value, parts), _p_value(value, here)),
        tau=math.sqrt(tau2),
        i2=i2,
        p_equal=p_equal,
        next_low=None if ahead is None else value - ahead,
        next_high=None if ahead is None else value + ahead,
    )


def _heterogeneity(values: np.ndarray, independent: float) -> tuple[float, float, float]:
    """The variance between models, I² and the p-value of Cochran's Q, with equal errors (variance `independent`)."""
    from statsmodels.stats.meta_analysis import combine_effects

    variance = float(values.var(ddof=1))
    if variance == 0:
        return 0.0, 0.0, 1.0
    if independent == 0:
        return variance, 1.0, 0.0
    made = combine_effects(values, np.full(len(values), independent), method_re="pm")
    return float(made.tau2), max(0.0, float(made.i2)), float(made.test_homogeneity().pvalue)


def _half_width(parts: list[tuple[float, float]], tail: float = TAIL) -> float:
    """Half of an interval whose error is a sum of independent parts, each a variance with its degrees of freedom."""
    return math.sqrt(sum(variance * _t(free, tail) ** 2 for variance, free in parts))


def _p_value(value: float, parts: list[tuple[float, float]]) -> float:
    """The p at which the interval of 1 - p just reaches zero."""

    def surplus(log: float) -> float:
        return _half_width(parts, math.exp(log) / 2) - abs(value)

    least, most = math.log(SMALLEST), math.log(1 - 1e-9)
    if surplus(most) >= 0:
        return 1.0
    return SMALLEST if surplus(least) <= 0 else math.exp(optimize.brentq(surplus, least, most))


def _t(free: float, tail: float) -> float:
    """Student's t beyond which a share `tail` lies."""
    return -float(special.stdtrit(free, tail))
