"""The interval that may be looked at after every document misses the truth as rarely as it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2sf.sweep.sequential import PairedMean


def ever_missed(population: np.ndarray, rng: np.random.Generator, alpha: float) -> bool:
    mean = PairedMean(len(population), alpha)
    for difference in rng.permutation(population):
        mean.see([difference])
        low, high = mean.interval
        if not low - 1e-9 <= population.mean() <= high + 1e-9:
            return True
    return False


@pytest.mark.parametrize(("worse", "better"), [(10, 10), (4, 30), (0, 3), (60, 80)])
def test_the_truth_is_ever_missed_with_at_most_the_stated_probability(worse, better):
    population = np.repeat([-1.0, 0.0, 1.0], [worse, 160 - worse - better, better])
    rng = np.random.default_rng(worse)
    runs, alpha = 150, 0.2
    missed = sum(ever_missed(population, rng, alpha) for _ in range(runs))
    assert missed / runs <= alpha + 3 * (alpha * (1 - alpha) / runs) ** 0.5


def test_numbers_that_are_not_right_or_wrong_are_covered_too():
    population = np.random.default_rng(1).uniform(-0.4, 0.6, 150)
    rng = np.random.default_rng(2)
    assert sum(ever_missed(population, rng, 0.1) for _ in range(60)) <= 6 + 3 * (60 * 0.1 * 0.9) ** 0.5


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=40))
def test_what_is_possible_is_never_out_for_certain_reasons_and_the_end_is_exact(differences):
    mean = PairedMean(len(differences), alpha=1e-12)  # bets alone put nothing out so soon
    for n, difference in enumerate(differences, 1):
        mean.see([difference])
        low, high = mean.interval
        left = len(differences) - n
        assert low - 1e-9 <= (sum(differences[:n]) - left) / len(differences) or left == 0
        assert high + 1e-9 >= (sum(differences[:n]) + left) / len(differences) or left == 0
    assert mean.interval == pytest.approx((np.mean(differences), np.mean(differences)))


def test_a_clear_difference_is_told_before_the_end():
    population = np.repeat([-1.0, 0.0, 1.0], [20, 780, 200])
    mean, seen = PairedMean(1000), 0
    for difference in np.random.default_rng(3).permutation(population):
        mean.see([difference])
        seen += 1
        if mean.interval[0] > 0:
            break
    assert seen < 300


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="not in"):
        PairedMean(3).see([1.5])
    with pytest.raises(ValueError, match="more than"):
        PairedMean(1).see([0, 0])
