"""The statistics against statsmodels and scipy on known cases, by hand, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from a2sf.analysis.statistics import paired
from a2sf.analysis.statistics.paired import (
    average_difference,
    bonett_price,
    bootstrap_means,
    detectable_difference,
    holm,
    interval,
    mcnemar_p,
    paired_difference,
    standard_error,
)
from a2sf.analysis.statistics.texts import TextClusters


def answers(gained: int, lost: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = [1] * gained + [0] * lost + [1] * both + [0] * neither
    second = [0] * gained + [1] * lost + [1] * both + [0] * neither
    return np.array(first, float), np.array(second, float)


def test_mcnemar_by_hand() -> None:
    # 3 of 4 flips one way: 2 * (C(4,3) + C(4,4)) / 2^4 = 10/16
    d = paired_difference(*answers(gained=3, lost=1, both=5, neither=1))
    assert d.p == pytest.approx(10 / 16)
    assert (d.n, d.value, d.gained, d.lost) == (10, pytest.approx(0.2), 3, 1)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (9, 2), (40, 61)])
def test_mcnemar_agrees_with_statsmodels(gained: int, lost: int) -> None:
    known = min(1.0, mcnemar([[50, gained], [lost, 50]], exact=True).pvalue) if gained + lost else 1.0
    assert mcnemar_p(gained, lost) == pytest.approx(known)


def test_interval_of_a_published_example() -> None:
    # by hand: up = 13/102, down = 5/102, half = 1.959964 * sqrt((18/102 - (8/102)^2) / 102)
    low, high = bonett_price(12, 4, 100)
    half = 1.959964 * math.sqrt((18 / 102 - (8 / 102) ** 2) / 102)
    assert (low, high) == (pytest.approx(8 / 102 - half), pytest.approx(8 / 102 + half))


@pytest.mark.parametrize(
    ("n", "up", "down"), [(60, 0.20, 0.10), (100, 0.12, 0.08), (200, 0.05, 0.05), (500, 0.07, 0.03)]
)
def test_interval_covers(n: int, up: float, down: float) -> None:
    drawn = np.random.default_rng(1).multinomial(n, [up, down, 1 - up - down], size=20_000)
    kinds, which = np.unique(drawn[:, :2], axis=0, return_inverse=True)
    bounds = np.array([bonett_price(int(g), int(l), n) for g, l in kinds])[which.ravel()]
    covered = np.mean((bounds[:, 0] <= up - down) & (up - down <= bounds[:, 1]))
    assert 0.93 <= covered <= 0.97


def test_bootstrap_interval_of_an_average_covers() -> None:
    rng = np.random.default_rng(2)
    truth, covered, rounds = [0.06, -0.02], 0, 2000
    for _ in range(rounds):
        changes = [
            rng.choice([1.0, -1.0, 0.0], n, p=[0.1 + t, 0.1, 0.8 - t]) for n, t in zip((150, 200), truth, strict=True)
        ]
        means = np.mean([bootstrap_means(c, i) for i, c in enumerate(changes)], axis=0)
        low, high = interval(means)
        covered += low <= np.mean(truth) <= high
    assert 0.93 <= covered / rounds <= 0.97


def test_bootstrap_t_by_its_definition() -> None:
    """Against other random numbers, with scipy's t of each resampling."""
    changes = np.random.default_rng(3).gamma(1, 1, 60) - 0.75
    ours = paired_difference(changes, np.zeros(60))
    drawn = np.random.default_rng(0).choice(changes, (20_000, 60))
    t = abs(scipy_stats.ttest_1samp(drawn, changes.mean(), axis=1).statistic)
    half = np.quantile(t, 0.95) * scipy_stats.sem(changes)
    assert (ours.low, ours.high) == pytest.approx((changes.mean() - half, changes.mean() + half), abs=0.1 * half)
    assert ours.p == pytest.approx((t >= abs(scipy_stats.ttest_1samp(changes, 0).statistic)).mean(), abs=0.01)


def test_bootstrap_t_of_symmetric_differences_is_students() -> None:
    changes = scipy_stats.norm.ppf((np.arange(200) + 0.5) / 200)
    for shift in (0.1, 0.2, 0.5):  # the last p-value is far below what 2,000 resamplings show
        ours = paired_difference(changes + shift, np.zeros(200))
        theirs = scipy_stats.ttest_1samp(changes + shift, 0)
        assert math.log(ours.p) == pytest.approx(math.log(theirs.pvalue), rel=0.12)
        assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval()), abs=0.015)


def test_few_documents_that_change_show_nothing() -> None:
    """One or two of thirty: many resamplings have no spread, which counts against a difference."""
    one, two, all_equal = np.zeros(30), np.zeros(30), np.full(6, -0.1)
    one[0], two[:2] = 0.5, (0.5, 0.4)
    for changes in (one, two):
        d = paired_difference(changes, np.zeros(30))
        assert d.p > 0.1
        assert d.low <= 0 < d.value < d.high < 0.2
    assert paired_difference(all_equal, np.zeros(6)).p == 2 / 2**6
    single = paired_difference(all_equal[:1], np.zeros(1))
    assert single.p == 1.0
    assert math.isnan(single.low)


@pytest.mark.parametrize("change", [1.0, 0.2])
def test_the_level_is_kept_where_differences_are_skewed(change: float) -> None:
    """Student's t has a level of 7 % where all documents change, and of 15 % where a fifth does."""
    rng, rounds = np.random.default_rng(9), 600
    drawn = (rng.random((rounds, 30)) < change) * rng.exponential(1.0, (rounds, 30)) - change
    false = [paired_difference(row, np.zeros(30)).p <= 0.05 for row in drawn]
    assert 0.01 < np.mean(false) < 0.075
    if change < 1:
        assert (scipy_stats.ttest_1samp(drawn, 0, axis=1).pvalue <= 0.05).mean() > 0.1


def test_bootstrap_t_of_an_average_by_its_definition() -> None:
    """Against other random numbers: Welch's t of three tasks of different sizes."""
    rng = np.random.default_rng(4)
    tasks = [rng.gamma(1, 1, n) - 0.8 for n in (30, 60, 90)]
    ours = average_difference(tasks)
    means, errors = np.zeros(20_000), np.zeros(20_000)
    for changes in tasks:
        drawn = rng.choice(changes, (20_000, len(changes)))
        means += (drawn.mean(1) - changes.mean()) / 3
        errors += drawn.var(1, ddof=1) / len(changes) / 9
    half = np.quantile(abs(means) / np.sqrt(errors), 0.95) * math.sqrt(sum(scipy_stats.sem(c) ** 2 for c in tasks)) / 3
    value = np.mean([c.mean() for c in tasks])
    assert (ours.low, ours.high) == pytest.approx((value - half, value + half), abs=0.1 * half)
    assert average_difference(tasks[:1]) == paired_difference(tasks[0], np.zeros(30))


def test_an_average_whose_tasks_change_equally_is_tested_by_signs() -> None:
    d = average_difference([np.full(3, 0.3), np.full(3, 0.5)])
    assert d.p == pytest.approx(2 / 2**6, abs=0.003)
    one = average_difference([np.array([0.3]), np.array([0.1, 0.7, 0.2])])
    assert (one.p, math.isnan(one.low)) == (1.0, True)


def test_average_of_one_task_is_mcnemar() -> None:
    first, second = answers(gained=14, lost=5, both=50, neither=31)
    assert average_difference([first - second]).p == pytest.approx(mcnemar_p(14, 5), abs=0.003)


def test_the_interval_of_an_average_in_which_nothing_changed_has_a_width() -> None:
    one = average_difference([np.zeros(24)])
    alone = paired_difference(np.ones(24), np.ones(24))
    assert (one.low, one.high) == pytest.approx((alone.low, alone.high))
    two = average_difference([np.zeros(24), np.zeros(200)])
    half = math.hypot(alone.high, paired_difference(np.ones(200), np.ones(200)).high) / 2
    assert (two.low, two.high) == pytest.approx((-half, half))
    assert 0.03 < half < 0.08
    assert (two.value, two.p, two.gained, two.lost) == (0, 1, 0, 0)
    texts = [TextClusters.keyed([str(i // 4) for i in range(24)])]
    assert average_difference([np.zeros(24)], texts).high > one.high


def test_average_weighs_tasks_equally() -> None:
    small, large = answers(2, 0, 4, 4), answers(0, 10, 80, 10)
    d = average_difference([np.subtract(*small), np.subtract(*large)])
    assert d.value == pytest.approx((2 / 10 - 10 / 100) / 2)
    assert (d.gained, d.lost, d.n) == (2, 10, 110)


def test_tasks_of_one_size_do_not_move_together() -> None:
    change = np.repeat([1.0, -1.0, 0.0], [30, 30, 140])
    one, two = average_difference([change]), average_difference([change, change])
    assert (two.high - two.low) / (one.high - one.low) == pytest.approx(1 / math.sqrt(2), rel=0.08)


def test_corrected_test_has_few_false_positives() -> None:
    """No system differs from another: at most 5 % of tables may show any difference."""
    rng = np.random.default_rng(4)
    tables, false = 400, 0
    for _ in range(tables):
        flips = rng.binomial([80] * 5 + [120] * 5, 0.2)
        gained = rng.binomial(flips, 0.5)
        false += min(holm([mcnemar_p(int(g), int(f - g)) for g, f in zip(gained, flips, strict=True)])) <= 0.05
    assert 0 < false / tables <= 0.05


@pytest.mark.full
def test_average_has_few_false_positives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "SIGN_FLIPS", 4000)  # p-values near 0.05 within 0.004
    rng = np.random.default_rng(5)
    rounds = 300
    p_values = [
        average_difference([rng.choice([1.0, -1.0, 0.0], n, p=[0.1, 0.1, 0.8]) for n in (40, 60)]).p
        for _ in range(rounds)
    ]
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.075


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == [pytest.approx(p) for p in (0.03, 0.06, 0.06)]
    assert holm([]) == []


def test_holm_is_statsmodels_to_the_bit() -> None:
    rng = np.random.default_rng(8)
    for n in range(1, 40):
        p = rng.choice([*rng.random(n) ** 4, 0.03, 1.0], n)  # some are equal
        assert holm(p) == multipletests(p, method="holm")[1].tolist()


def test_detectable_difference_has_its_power() -> None:
    n, flips = 400, 0.15
    delta = detectable_difference(n, flips)
    drawn = np.random.default_rng(6).multinomial(n, [(flips + delta) / 2, (flips - delta) / 2, 1 - flips], size=2000)
    kinds, counts = np.unique(drawn[:, :2], axis=0, return_counts=True)
    power = np.average([mcnemar_p(int(g), int(l)) <= 0.05 for g, l in kinds], weights=counts)
    assert power == pytest.approx(0.8, abs=0.04)


def test_detectable_difference_of_an_average_has_its_power() -> None:
    """Of tasks with other numbers of documents and flips; of one task it is nearly that of the task."""
    rng = np.random.default_rng(0)
    sizes, flips = (160, 80), (0.1, 0.3)
    exact = [
        np.array([1.0] * round(n * f / 2) + [-1.0] * round(n * f / 2) + [0.0] * round(n * (1 - f)))
        for n, f in zip(sizes, flips, strict=True)
    ]
    delta = average_difference(exact).detectable
    assert delta is not None

    def found() -> bool:
        p = [[(f + delta) / 2, (f - delta) / 2, 1 - f] for f in flips]
        return (
            average_difference([rng.choice([1.0, -1.0, 0.0], n, p=q) for n, q in zip(sizes, p, strict=True)]).p <= 0.05
        )

    assert np.mean([found() for _ in range(400)]) == pytest.approx(0.8, abs=0.06)
    one = average_difference(exact[:1]).detectable
    assert one == pytest.approx(detectable_difference(160, 0.1), rel=0.01)
    in_texts = average_difference(exact, [TextClusters(np.arange(len(c)) // 4) for c in exact]).detectable
    assert in_texts is not None
    assert in_texts > 1.5 * delta  # flips of one kind are next to each other
    assert average_difference([np.array([0.3, -0.1, 0.0])]).detectable is None


def test_detectable_difference_shrinks_with_documents_and_grows_with_flips() -> None:
    assert detectable_difference(1000, 0.1) < detectable_difference(100, 0.1)
    assert detectable_difference(500, 0.05) < detectable_difference(500, 0.2)
    assert 0 < detectable_difference(100, 0.0) < 0.1
    assert detectable_difference(1, 0.0) == 1.0


def test_no_flip_is_no_difference() -> None:
    same = np.array([1.0, 0.0, 1.0])
    d = paired_difference(same, same)
    assert (d.value, d.p) == (0.0, 1.0)
    assert d.low < 0 < d.high
    assert average_difference([same - same]).p == 1.0


def test_standard_error_is_lm_evals() -> None:
    values = np.array([1.0, 0.0, 1.0, 1.0])
    assert standard_error(values) == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert math.isnan(standard_error(values[:1]))
