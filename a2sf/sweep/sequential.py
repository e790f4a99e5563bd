"""A mean that may be looked at after every document: confidence sequences by betting, without replacement.

Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting" (2010.09686), section 5: for every candidate
mean m of a finite population whose members come in random order, the capital of a gambler who bets against m is a martingale
if m is the truth. Candidates against which the capital reached 1/alpha are out; by Ville's inequality the truth is ever put
out with probability at most alpha, however often one looks and whatever makes one stop. The bets are the paper's aGRAPA
(appendix B.3), which follow the mean seen so far.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

BOLDEST = 0.75
"""The largest share of the capital that a bet may lose."""
ROUNDING = 1e-9


class PairedMean:
    """Interval for the mean of differences in [-1, 1] over a population of which random members are seen one by one.

    Args:
        population: how many members there are.
        alpha: probability that the truth is ever outside of `interval`.
        steps: differences are multiples of one over it, as right and wrong answers are of 1; others make intervals wider.

    Attributes:
        n: members seen.
        interval: lowest and highest mean of the whole population that is not out yet; one number when all are seen.
    """

    def __init__(self, population: int, alpha: float = 0.05, steps: int = 1) -> None:
        self.population, self.alpha, self.steps, self.n = population, alpha, steps, 0
        # in [0, 1]; every mean that multiples of a step can have is there
        self._means = np.linspace(0, 1, 2 * population * steps + 1)
        self._spare = 0.0
        self._capital = np.zeros_like(self._means)  # logarithm
        self._sum, self._squares = 0.0, 0.25
        self._bounds = (0.0, 1.0)

    @property
    def interval(self) -> tuple[float, float]:
        low, high = self._bounds
        return 2 * low - 1, 2 * high - 1

    @property
    def half_width(self) -> float:
        low, high = self._bounds
        return high - low

    def see(self, differences: Iterable[float]) -> None:
        """Take in further members, in the order in which they were drawn.

        Raises:
            ValueError: if one is outside [-1, 1], or there are more than the population has.
        """
        for difference in differences:
            if not -1 <= difference <= 1:
                raise ValueError(f"a difference of {difference} is not in [-1, 1]")
            if self.n == self.population:
                raise ValueError(f"more than the {self.population} members of the population")
            if (
                abs(self.steps * difference - round(self.steps * difference)) > ROUNDING
            ):  # the truth may lie between two candidates
                self._spare = self._means[1]
            self._bet((difference + 1) / 2)
            self._narrow()

    def _bet(self, x: float) -> None:
        """Settle the bets on `x`, placed by what was seen before it."""
        expected = (self.population * self._means - self._sum) / (self.population - self.n)  # of what is left
        possible = (expected >= -ROUNDING) & (expected <= 1 + ROUNDING)
        expected = expected.clip(0, 1)
        mean, variance = (0.5 + self._sum) / (self.n + 1), self._squares / (self.n + 1)
        lean = mean - expected
        with np.errstate(divide="ignore"):
            bet = (lean / (variance + lean**2)).clip(-BOLDEST / (1 - expected), BOLDEST / expected)
        self._capital += np.log1p(bet * (x - expected))
        # where all that is left would have to be 0, or 1
        possible &= ~(((expected <= ROUNDING) | (expected >= 1 - ROUNDING)) & (abs(x - expected) > ROUNDING))
        self._capital[~possible] = np.inf
        self.n += 1
        self._sum += x
        self._squares += (x - (0.5 + self._sum) / (self.n + 1)) ** 2

    def _narrow(self) -> None:
        if self.n == self.population:
            mean = self._sum / self.population
            self._bounds = (mean, mean)
            return
        left = self._means[self._capital < -np.log(self.alpha)]
        if left.size:  # else the order was not random, or it is one of the alpha: what was told stays
            low, high = self._bounds
            self._bounds = (max(low, left[0] - self._spare), min(high, left[-1] + self._spare))
