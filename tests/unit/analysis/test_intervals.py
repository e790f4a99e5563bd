"""Errors and intervals of a system's own score: against statsmodels, by hand, and their coverage."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from a2sf.analysis.results.gather import gather
from a2sf.analysis.statistics.intervals import averaged, of_documents, of_mean, of_share, right_or_wrong
from a2sf.analysis.statistics.texts import TextClusters
from tests.sweep_fixture import Plan, write_sweep


@given(st.integers(2, 400), st.data())
def test_a_share_has_wilsons_interval(n, data):
    right = data.draw(st.integers(0, n))
    found = of_share(right / n, n)
    assert (found.low, found.high) == pytest.approx(proportion_confint(right, n, method="wilson"), abs=1e-12)
    values = np.repeat([1.0, 0.0], [right, n - right])
    if 0 < right < n:
        assert found.stderr == pytest.approx(stats.sem(values))
    else:
        assert found.stderr == pytest.approx((found.high - found.low) / 2 / 1.959964, rel=1e-5)
    assert vars(of_documents(values, TextClusters.independent(n))) == pytest.approx(vars(found))


def test_other_numbers_have_students_t():
    values = np.random.default_rng(0).normal(3, 2, 25)
    expected = stats.t.interval(0.95, 24, values.mean(), stats.sem(values))
    for found in (of_documents(values, TextClusters.independent(25)), of_mean(values.mean(), stats.sem(values), 25)):
        assert (found.low, found.high) == pytest.approx(expected)
    assert np.isnan(of_mean(1.0, 0.1, 1).low)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=50), st.floats(0.01, 0.99))
def test_mean_and_error_tell_whether_documents_are_right_or_wrong(values, other):
    x = np.array(values)
    assert right_or_wrong(x.mean(), stats.sem(x), len(x))
    x[0] = other
    assert not right_or_wrong(x.mean(), stats.sem(x), len(x))


def test_one_text_bounds_nothing():
    found = of_documents(np.array([1.0, 0.0, 1.0]), TextClusters(np.zeros(3, int)))
    assert (found.low, found.high) == (0.0, 1.0)
    assert np.isnan(found.stderr)


def test_an_average_of_equal_symmetric_parts_has_the_usual_interval():
    parts = [of_mean(value, error, 10**7) for value, error in ((0.2, 0.03), (0.5, 0.04))]
    found = averaged(parts)
    assert (found.value, found.stderr) == pytest.approx((0.35, 0.025))
    assert (found.low, found.high) == pytest.approx((0.35 - 1.96 * 0.025, 0.35 + 1.96 * 0.025), abs=1e-4)
    weighted = averaged(parts, [300, 100])
    assert (weighted.value, weighted.stderr) == pytest.approx((0.275, np.hypot(0.75 * 0.03, 0.25 * 0.04)))


def coverage(draw, truth: float, rounds: int = 2000) -> float:
    found = [draw() for _ in range(rounds)]
    return float(np.mean([e.low <= truth <= e.high for e in found]))


@pytest.mark.parametrize(("n", "p"), [(30, 0.5), (100, 0.9), (200, 0.3)])
def test_coverage_of_documents(n, p):
    rng = np.random.default_rng(n)
    draw = lambda: of_documents((rng.random(n) < p).astype(float), TextClusters.independent(n))  # noqa: E731
    assert 0.93 <= coverage(draw, p) <= 0.975


@pytest.mark.parametrize(("texts", "binary"), [(20, True), (50, True), (20, False)])
def test_coverage_of_documents_that_share_texts(texts, binary):
    """Four questions about each text, right together: counting them singly covers the truth in fewer than 80 %."""
    rng, of = np.random.default_rng(texts), np.repeat(np.arange(texts), 4)

    def draw(known: bool):
        level = rng.random(texts)[of]
        values = (rng.random(len(of)) < 0.85).astype(float)
        right = np.where(level < 0.6, values * 0 + 1, 1 - values) if binary else level + 0.1 * values
        return of_documents(right, TextClusters(of) if known else TextClusters.independent(len(of)))

    truth = 0.6 + 0.4 * 0.15 if binary else 0.5 + 0.1 * 0.85
    assert 0.92 <= coverage(lambda: draw(True), truth) <= 0.985
    assert coverage(lambda: draw(False), truth) < 0.8


def test_coverage_of_an_average_over_tasks():
    rng, p = np.random.default_rng(9), (0.05, 0.5, 0.95)
    draw = lambda: averaged(  # noqa: E731
        [of_documents((rng.random(40) < x).astype(float), TextClusters.independent(40)) for x in p]
    )
    assert 0.93 <= coverage(draw, 0.5) <= 0.98


def test_results_have_ours_beside_lm_evals(tmp_path):
    cells = write_sweep(tmp_path / "s", Plan())
    frame = gather([tmp_path / "s"]).frame
    for stored in cells:
        row = frame[frame["cell"] == stored.path.name].iloc[0]
        values = stored.documents["metric/acc"].to_numpy(float)
        assert row["lm_eval_stderr"] == stored.metrics["acc"]["stderr"] == pytest.approx(row["stderr"])
        wilson = proportion_confint(values.sum(), len(values), method="wilson")
        assert (row["low"], row["high"]) == pytest.approx(wilson)
    table = pd.read_csv(tmp_path / "s" / "results.csv")
    assert "lm_eval_stderr" in table
    assert "stderr" not in table
