"""Error and 95 % interval of one system's score, and of averages of scores.

Wilson's interval where documents are right or wrong, Student's t elsewhere; both count texts where documents share some.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from a2sf.analysis.statistics.paired import is_binary, standard_error
from a2sf.analysis.statistics.texts import CONFIDENCE, TextClusters, Z


@dataclass(frozen=True)
class Estimate:
    """A score, its standard error and its 95 % interval, in the metric's own unit; NaN where they are not known."""

    value: float
    stderr: float = math.nan
    low: float = math.nan
    high: float = math.nan


def of_share(value: float, n: float, stderr: float = math.nan, critical: float = Z) -> Estimate:
    """Of a share of right answers: Wilson's interval (1927, J. Am. Stat. Assoc. 22).

    Args:
        n: independent documents; the effective number where documents share texts.
        stderr: of the share, if it is known; by default that of `n` documents. If all answers are equal, it is half the
            interval's width over `critical`: that none was wrong does not mean that none can be.
        critical: standard errors to either side.
    """
    if math.isinf(critical):  # a single text: nothing bounds the share
        return Estimate(value, math.nan, 0.0, 1.0)
    z = critical**2 / n
    middle = (value + z / 2) / (1 + z)
    half = critical * math.sqrt(value * (1 - value) / n + z / (4 * n)) / (1 + z)
    if math.isnan(stderr):
        stderr = math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else math.nan
    if value in (0.0, 1.0):
        stderr = half / critical
    return Estimate(value, stderr, max(0.0, middle - half), min(1.0, middle + half))


def of_mean(value: float, stderr: float, n: int) -> Estimate:
    """Of a mean of n independent documents with a known standard error: Student's t."""
    critical = float(special.stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) if n > 1 else math.nan
    return Estimate(value, stderr, value - critical * stderr, value + critical * stderr)


def of_documents(values: np.ndarray, texts: TextClusters) -> Estimate:
    """Of the mean of `values`, [n]: cluster-robust where documents share texts."""
    value, stderr = float(values.mean()), standard_error(values, texts)
    if is_binary(values):
        return of_share(value, len(values) * texts.effective_share(values), stderr, texts.critical)
    if not texts.shared:
        return of_mean(value, stderr, len(values))
    return Estimate(value, stderr, value - texts.critical * stderr, value + texts.critical * stderr)


def right_or_wrong(value: float, stderr: float, n: int) -> bool:
    """Whether n documents with this mean and standard error (with n - 1) are all 0 or 1.

    The variance of numbers from 0 to 1 with mean p is p (1 - p) if each is 0 or 1, else less.
    """
    return n > 1 and 0 <= value <= 1 and math.isclose((n - 1) * stderr**2, value * (1 - value), abs_tol=1e-9)


def averaged(parts: Sequence[Estimate], weights: Sequence[float] | None = None) -> Estimate:
    """Of a weighted average of independent scores, such as that over tasks, which share no documents.

    The interval is made of theirs, which need not be symmetric (MOVER; Zou and Donner, 2008, Statistics in Medicine 27).

    Args:
        weights: equal by default; they are divided by their sum.
    """
    given = np.ones(len(parts)) if weights is None else np.asarray(weights, float)
    share = given / given.sum()
    value, stderr, low, high = np.array([(e.value, e.stderr, e.low, e.high) for e in parts]).T
    mean = float(share @ value)
    below, above = (float(np.sqrt(((share * (value - end)) ** 2).sum())) for end in (low, high))
    return Estimate(mean, float(np.sqrt(((share * stderr) ** 2).sum())), mean - below, mean + above)
