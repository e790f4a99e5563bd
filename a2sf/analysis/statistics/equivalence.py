"""Is a system not worse than another, or equivalent to it, within a margin? Two one-sided tests on paired results.

"No significant difference" does not mean "equal": few documents never show a difference. These tests have the opposite null
hypothesis, that the difference is larger than the margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from a2sf.analysis.statistics.paired import is_binary, standard_error
from a2sf.analysis.statistics.texts import Texts

ALPHA = 0.05


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


def within_margin(first: np.ndarray, second: np.ndarray, margin: float, texts: Texts | None = None) -> Within:
    """Two one-sided tests of a paired difference, first minus second, against a margin.

    If documents are right or wrong, and independent: Tango's score test (1998, Statistics in Medicine 17, 891), which keeps
    its level if few answers differ. Else Student's t of the paired difference, with cluster-robust errors if documents share
    texts.

    Args:
        first, second: the metric of each document, [n].
        margin: above 0, in the metric's unit.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    texts = texts or Texts.independent(len(first))
    if is_binary(first) and is_binary(second) and not texts.shared:
        gained, lost = int((first > second).sum()), int((first < second).sum())
        worse = 1 - special.ndtr(tango_score(gained, lost, len(first), -margin))
        better = special.ndtr(tango_score(gained, lost, len(first), margin))
        return Within(margin, float(worse), float(better))
    change = first - second
    error, free = standard_error(change, texts), texts.number - 1
    return _by_error([change], error, margin, lambda t: float(special.stdtr(free, t)))


def average_within_margin(changes: Sequence[np.ndarray], texts: Sequence[Texts], margin: float) -> Within:
    """The same for the unweighted average over tasks, by the normal distribution and the errors of the tasks' means.

    Args:
        changes: for each task, the first system's values minus the second's, one per document.
        texts: for each task, which documents share a text.
    """
    errors = [standard_error(c, t) for c, t in zip(changes, texts, strict=True)]
    return _by_error(changes, math.hypot(*errors) / len(errors), margin, lambda z: float(special.ndtr(z)))


def _by_error(changes: Sequence[np.ndarray], error: float, margin: float, below: Callable[[float], float]) -> Within:
    """The tests of a mean over tasks with a standard error; `below`: the distribution function of their ratio."""
    value = float(np.mean([c.mean() for c in changes]))
    if error > 0:
        return Within(margin, below(-(value + margin) / error), below((value - margin) / error))
    if error == 0 and value == 0:  # nothing differs; what that shows depends on the number of documents
        p = float(special.ndtr(-tango_score(0, 0, sum(map(len, changes)), -margin)))
        return Within(margin, p, p)
    return Within(margin, 1.0, 1.0)  # a single document or text, or no variation: no error is known


def tango_score(gained: int, lost: int, n: int, difference: float) -> float:
    """Tango's score statistic of "the paired difference of proportions is `difference`", standard normal if it is.

    Args:
        gained, lost: documents right in the first alone, and in the second alone.
        n: documents.
    """
    # the share of `lost` that is most likely under the hypothesis: a root of 2n q² + B q + C
    b = -gained - lost + (2 * n - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    share = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
    variance = n * (2 * share + difference * (1 - difference))
    surplus = gained - lost - n * difference
    return surplus / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, surplus) if surplus else 0.0
