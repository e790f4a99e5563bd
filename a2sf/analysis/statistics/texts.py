"""Which documents share a text (clusters), and what that does to the error of a mean.

Questions about one passage are answered right or wrong together more often than questions about different ones, so that
they carry less information than the same number of independent documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import special  # scipy.stats takes a second to import

CONFIDENCE = 0.95
Z = float(special.ndtri(0.5 + CONFIDENCE / 2))


@dataclass(frozen=True, eq=False)
class TextClusters:
    """The texts of one task's documents.

    Attributes:
        of: [n] the number of each document's text, from 0.
    """

    of: np.ndarray

    @classmethod
    def independent(cls, n: int) -> TextClusters:
        """Documents of which no two share a text."""
        return cls(np.arange(n))

    @classmethod
    def keyed(cls, keys: Sequence[Any] | np.ndarray) -> TextClusters:
        """Documents that share a text where their keys are equal."""
        return cls(np.unique(np.asarray(keys, dtype=str), return_inverse=True)[1])

    @classmethod
    def joined(cls, several: Sequence[TextClusters]) -> TextClusters:
        """Documents of several tasks one after the other; no text is of two tasks."""
        starts = np.cumsum([0, *(t.number for t in several)])
        return cls(np.concatenate([t.of + start for t, start in zip(several, starts, strict=False)]))

    @cached_property
    def sizes(self) -> np.ndarray:
        """Documents of each text."""
        return np.bincount(self.of)

    @property
    def number(self) -> int:
        """How many texts there are."""
        return len(self.sizes)

    @property
    def shared(self) -> bool:
        """Whether some documents share one."""
        return self.number < len(self.of)

    @property
    def critical(self) -> float:
        """Standard errors to either side of a 95 % interval: Student's t of the texts where documents share some."""
        if not self.shared:
            return Z
        return float(special.stdtrit(self.number - 1, 0.5 + CONFIDENCE / 2)) if self.number > 1 else math.inf

    @property
    def error_rate(self) -> float:
        """The share of normal deviates beyond `critical`, for intervals that are given an alpha."""
        return float(2 * special.ndtr(-self.critical)) if self.shared else 1 - CONFIDENCE

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums over each text's documents of `values`, [n] or [n, columns]."""
        out = np.zeros((self.number, *values.shape[1:]))
        np.add.at(out, self.of, values)
        return out

    def standard_error(self, values: np.ndarray) -> float:
        """Of the mean of `values`, [n], when texts are drawn and not documents; NaN for one text."""
        if self.number < 2:
            return math.nan
        off = self.sums(values - values.mean())
        return math.sqrt(self.number / (self.number - 1) * float((off**2).sum())) / len(values)

    def effective_share(self, values: np.ndarray) -> float:
        """The effective number of independent documents, as a share of their number; at most 1."""
        if not self.shared:
            return 1.0
        fewest = self.number / len(values)  # as if each text were one document
        error, independent = self.standard_error(values), float(values.std(ddof=1)) / math.sqrt(len(values))
        return (
            fewest if math.isnan(error) or independent == 0 else min(1.0, (independent / error) ** 2) if error else 1.0
        )


def tail_of(several: Sequence[TextClusters], expanded: bool = False) -> float:
    """The probability on either side of a 95 % percentile interval of bootstrap means over several tasks.

    Where documents share texts, of which there may be few, percentiles are too narrow, and are moved out as far as Student's
    t would be (Hesterberg, 2015, The American Statistician 69(4), "expanded percentile"). NaN where no resampling is as far
    out, so that percentiles would be the smallest and the largest text: with fewer than five texts of one task.

    Args:
        expanded: move them out where documents share no texts, too.
    """
    if not expanded and not any(t.shared for t in several):
        return 0.5 - CONFIDENCE / 2
    number = sum(t.number for t in several)
    free = number - len(several)
    if not free:
        return math.nan
    tail = float(special.ndtr(-math.sqrt(number / free) * special.stdtrit(free, 0.5 + CONFIDENCE / 2)))
    # the probability of the farthest resampling, which draws the same text of a task every time
    farthest = math.prod(float(t.number) ** -t.number for t in several)
    return tail if tail >= farthest else math.nan
