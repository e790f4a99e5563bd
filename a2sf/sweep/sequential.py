"""The confidence sequence of a mean: an interval that is valid after every document.

The method is betting without replacement (Waudby-Smith & Ramdas, "Estimating means of bounded random variables by
betting", 2010.09686, section 5). The values of a finite population are drawn in random order. For each candidate m of
the mean there is a gambler who bets against m. If m is the true mean, the gambler's capital is a martingale. So a
candidate is rejected once the capital against it reaches 1/alpha: by Ville's inequality the true mean is rejected
with probability at most alpha, at any time and under any rule for stopping. The bets are the paper's aGRAPA (appendix
B.3), which follow the mean of the values so far.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

BOLDEST = 0.75
"""The largest share of the capital that a bet may lose."""
ROUNDING = 1e-9
LARGEST_E = 1e9
"""Evidence is not counted beyond this, so that it stays a number where a mean is impossible."""


class PairedMean:
    """Confidence interval for the mean of a population's differences in [-1, 1], which are drawn at random one by one.

    Args:
        population: number of differences in the population.
        alpha: probability that `interval` does not contain the mean at some time.
        steps: differences are multiples of `1 / steps`, so 1 for right and wrong answers; other differences are allowed
            and make the interval wider.

    Attributes:
        n: differences seen so far.
        interval: lowest and highest mean that is not rejected; the mean itself when all differences are seen.
    """

    def __init__(self, population: int, alpha: float = 0.05, steps: int = 1) -> None:
        self.population, self.alpha, self.steps, self.n = population, alpha, steps, 0
        # all means in [0, 1] that multiples of a step can have
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

    @property
    def e_value(self) -> float:
        """The e-value of "the mean is 0": the capital, from a start of 1, of a gambler who bets against it.

        If the mean is 0, its expectation is at most 1, whenever and for whatever reason one stops.
        """
        at_zero = self._capital[self.population * self.steps]
        return float(np.exp(min(at_zero, np.log(LARGEST_E))))

    def see(self, differences: Iterable[float]) -> None:
        """Add differences, in the order in which they were drawn.

        Raises:
            ValueError: if one is outside [-1, 1], or there are more than the population has.
        """
        for difference in differences:
            if not -1 <= difference <= 1:
                raise ValueError(f"a difference of {difference} is not in [-1, 1]")
            if self.n == self.population:
                raise ValueError(f"there are more than the {self.population} differences of the population")
            # not a multiple of a step: the mean may lie between two candidates
            if abs(self.steps * difference - round(self.steps * difference)) > ROUNDING:
                self._spare = self._means[1]
            self._bet((difference + 1) / 2)
            self._narrow()

    def _bet(self, x: float) -> None:
        """Update the capital by a value `x` in [0, 1]; the bets on it follow from the values before it."""
        # mean of the values not drawn yet
        expected = (self.population * self._means - self._sum) / (self.population - self.n)
        possible = (expected >= -ROUNDING) & (expected <= 1 + ROUNDING)
        expected = expected.clip(0, 1)
        mean, variance = (0.5 + self._sum) / (self.n + 1), self._squares / (self.n + 1)
        lean = mean - expected
        with np.errstate(divide="ignore"):
            bet = (lean / (variance + lean**2)).clip(-BOLDEST / (1 - expected), BOLDEST / expected)
        self._capital += np.log1p(bet * (x - expected))
        # where all values not drawn yet would have to be 0, or 1
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
        if left.size:  # else the order was not random, or the mean was rejected by chance: the interval stays
            low, high = self._bounds
            self._bounds = (max(low, left[0] - self._spare), min(high, left[-1] + self._spare))
