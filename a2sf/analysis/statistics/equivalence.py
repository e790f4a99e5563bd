"""Is a system not worse than another, or equivalent to it, within a margin? Two one-sided tests on paired results.

"No significant difference" does not mean "equal": few documents never show a difference. These tests have the opposite null
hypothesis, that the difference is larger than the margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from a2sf.analysis.statistics.families import ALPHA
from a2sf.analysis.statistics.paired import NO_SPREAD, Difference, is_binary, one_sided_p, standard_error
from a2sf.analysis.statistics.texts import TextClusters


@dataclass(frozen=True)
class Within:
    """Whether a difference lies within a margin.

    Attributes:
        margin: in the metric's unit.
        p_not_worse: p-value of "the first is worse than the second by the margin or more".
        p_not_better: p-value of "the first is better by the margin or more".
    """

    margin: float
    p_not_worse: float
    p_not_better: float

    @property
    def p_equivalent(self) -> float:
        """p-value of "they differ by the margin or more, either way" (two one-sided tests; Schuirmann, 1987)."""
        return max(self.p_not_worse, self.p_not_better)


def points(margin: float) -> str:
    """A margin of a share in words: points are hundredths."""
    return f"{100 * margin:g} point{'s' * (round(100 * margin, 9) != 1)}"


def verdict(p_equivalent: float, difference: Difference, margin: float) -> str:
    """Whether a difference is shown to lie within a margin: `yes`, `no` (its 95 % interval lies outside) or `not shown`.

    Args:
        p_equivalent: corrected for the number of tests.
    """
    if p_equivalent < ALPHA:
        return "yes"
    return "no" if difference.high < -margin or difference.low > margin else "not shown"


def within_margin(first: np.ndarray, second: np.ndarray, margin: float, texts: TextClusters | None = None) -> Within:
    """Two one-sided tests of a paired difference, first minus second, against a margin.

    If documents are right or wrong, and independent: Tango's score test (1998, Statistics in Medicine 17, 891), which keeps
    its level if few answers differ. Else Student's t of the paired difference, with cluster-robust errors if documents share
    texts; if they do not, the bootstrap-t as well, and the larger of both p-values counts.

    Args:
        first, second: the metric of each document, [n].
        margin: above 0, in the metric's unit.
    """
    change = np.asarray(first, float) - np.asarray(second, float)
    return average_within_margin([change], [texts or TextClusters.independent(len(change))], margin)


def average_within_margin(changes: Sequence[np.ndarray], texts: Sequence[TextClusters], margin: float) -> Within:
    """The same for the unweighted average over tasks: the variances of the tasks' means are added.

    Args:
        changes: for each task, the first system's values minus the second's, one per document.
        texts: for each task, which documents share a text.
    """
    if all(is_binary(abs(c)) for c in changes) and not any(t.shared for t in texts):
        counts = [(int((c > 0).sum()), int((c < 0).sum()), len(c)) for c in changes]
        worse, better = (float(special.ndtr(sign * tango_score(counts, sign * margin))) for sign in (-1, 1))
        return Within(margin, worse, better)
    value = float(np.mean([c.mean() for c in changes]))
    error = math.hypot(*(standard_error(c, t) for c, t in zip(changes, texts, strict=True))) / len(changes)
    if math.isnan(error) or (
        error == 0 and value != 0
    ):  # a single document or text, or no variation: no error is known
        return Within(margin, 1.0, 1.0)
    error = max(error, _least_error(changes, texts, margin))
    free = sum(t.number for t in texts) - len(texts)
    worse, better = (float(special.stdtr(free, (sign * value - margin) / error)) for sign in (-1, 1))
    if not any(t.shared for t in texts) and error > NO_SPREAD * abs(value):
        # skewed differences: the larger of both p-values keeps the level
        worse = max(worse, one_sided_p(changes, value + margin, error))
        better = max(better, one_sided_p([-c for c in changes], margin - value, error))
    return Within(margin, worse, better)


def _least_error(changes: Sequence[np.ndarray], texts: Sequence[TextClusters], margin: float) -> float:
    """The smallest standard error that a mean of `margin` can have if documents change by a certain step or not at all.

    Few changed documents suggest an error that is too small: even if the true mean is the margin, few may have changed.
    """
    moved = [abs(c[c != 0]).min() for c in changes if c.any()]
    step = min(moved, default=1.0)
    numbers = [len(c) * t.effective_share(c) for c, t in zip(changes, texts, strict=True)]
    return math.sqrt(max(0.0, margin * (step - margin)) * sum(1 / n for n in numbers)) / len(changes)


def tango_score(counts: Sequence[tuple[int, int, int]], difference: float) -> float:
    """Tango's score statistic of "the paired difference of proportions is `difference`", standard normal if it is.

    For several tasks the difference is that of their unweighted average, and the variance of each is Tango's.

    Args:
        counts: for each task, the documents right in the first alone, those right in the second alone, and all.
    """
    surplus = variance = 0.0
    for gained, lost, n in counts:
        # the share of `lost` that is most likely under the hypothesis: a root of 2n q² + B q + C
        b = -gained - lost + (2 * n - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        share = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance += max(0.0, 2 * share + difference * (1 - difference)) / n
        surplus += (gained - lost) / n - difference
    return surplus / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, surplus) if surplus else 0.0
