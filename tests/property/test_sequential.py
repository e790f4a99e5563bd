"""The interval that may be looked at after every document misses the truth as rarely as it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2sf.analysis.statistics.families import e_bh
from a2sf.sweep.early_stopping import Comparisons
from a2sf.sweep.sequential import LARGEST_E, PairedMean
from a2sf.sweep.stopping_rule import StoppingRule


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


def test_a_clear_difference_is_reported_before_the_end():
    population = np.repeat([-1.0, 0.0, 1.0], [20, 780, 200])
    mean, seen = PairedMean(1000), 0
    for difference in np.random.default_rng(3).permutation(population):
        mean.see([difference])
        seen += 1
        if mean.interval[0] > 0:
            break
    assert seen < 300


def population_of(worse: int, better: int, n: int = 80) -> np.ndarray:
    return np.repeat([-1.0, 0.0, 1.0], [worse, n - worse - better, better])


@pytest.mark.parametrize("counts", [(10, 10), (3, 3), (30, 30)])
def test_an_e_value_is_1_on_average_if_there_is_no_difference_and_one_stops_when_it_is_large(counts):
    """Whoever stops as soon as the evidence doubles, or is a quarter of it, still has 1 on average."""
    rng, found = np.random.default_rng(5), []
    for _ in range(400):
        mean = PairedMean(80)
        for difference in rng.permutation(population_of(*counts)):
            mean.see([difference])
            if not 0.25 < mean.e_value < 2:
                break
        found.append(mean.e_value)
    assert np.mean(found) <= 1 + 3 * np.std(found) / 20


def test_the_e_value_of_an_impossible_zero_is_a_number():
    mean = PairedMean(4)
    mean.see([1, 1, 1, 0])
    assert mean.e_value == pytest.approx(LARGEST_E)


def stopped_sweep(rng: np.random.Generator, tasks: list[list[np.ndarray]]) -> list[float]:
    """e-values of a sweep's comparisons: each task stops when all of its comparisons are decided, in an order of its own."""
    found = []
    for populations in tasks:
        pairs = [("x", f"y{i}") for i in range(len(populations))]
        watch = Comparisons(StoppingRule(("a", "b")), [1] * 80, pairs)
        for d in rng.permutation(80):
            watch.see({"x": [0.0]} | {f"y{i}": [-p[d]] for i, p in enumerate(populations)})
            if watch.decided:
                break
        found += [comparison["e"] for comparison in watch.report()]
    return found


@pytest.mark.parametrize("different", [0, 3])
def test_e_bh_over_tasks_keeps_the_rate_of_false_findings(different):
    """Four tasks with three comparisons each, that depend on each other; `different` tasks have one real difference."""
    rng = np.random.default_rng(6)
    none = population_of(12, 12)
    some = population_of(2, 40)
    real = np.array([[task < different and i == 0 for i in range(3)] for task in range(4)]).ravel()
    tasks = [[some if task < different and i == 0 else np.roll(none, i) for i in range(3)] for task in range(4)]
    runs, rate = 60, 0.2
    false, power = [], []
    for _ in range(runs):
        rejected = np.array(e_bh(stopped_sweep(rng, tasks), rate))
        false.append((rejected & ~real).sum() / max(1, rejected.sum()))
        power.append((rejected & real).sum() / max(1, different))
    assert np.mean(false) <= rate + 3 * (rate * (1 - rate) / runs) ** 0.5
    assert different == 0 or np.mean(power) > 0.5


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=12))
def test_e_bh_as_it_is_defined(values):
    """The k largest, for the largest k with e_(k) >= m / (k rate), by trying each k."""
    m, rate = len(values), 0.05
    ranked = sorted(values, reverse=True)
    most = max((k for k in range(1, m + 1) if k * ranked[k - 1] >= m / rate), default=0)
    assert sorted(np.flatnonzero(e_bh(values, rate))) == sorted(
        i for i, v in enumerate(values) if most and v >= ranked[most - 1]
    )


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="not in"):
        PairedMean(3).see([1.5])
    with pytest.raises(ValueError, match="more than"):
        PairedMean(1).see([0, 0])
