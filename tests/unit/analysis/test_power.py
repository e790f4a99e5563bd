"""Power of the paired tests: against a sum over all outcomes, against simulations, and the flips of results on disk."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from a2sf.analysis.results.flips import flips_of
from a2sf.analysis.statistics import paired
from a2sf.analysis.statistics.paired import average_difference, detectable_difference, mcnemar_p
from a2sf.analysis.statistics.power import (
    documents_for_average,
    documents_needed,
    mcnemar_power,
    smallest_average,
    smallest_difference,
)
from tests.sweep_fixture import Plan, write_sweep


@pytest.mark.parametrize(
    ("n", "flips", "difference", "level"), [(12, 0.5, 0.3, 0.05), (30, 0.2, 0.2, 0.05), (40, 0.6, 0.4, 0.003)]
)
def test_power_is_the_sum_over_all_outcomes(n: int, flips: float, difference: float, level: float) -> None:
    total = 0.0
    for k in range(1, n + 1):
        right = [binom.pmf(g, k, (1 + difference / flips) / 2) for g in range(k + 1)]
        significant = [binomtest(g, k, 0.5).pvalue <= level for g in range(k + 1)]
        total += binom.pmf(k, n, flips) * sum(p for p, s in zip(right, significant, strict=True) if s)
    assert mcnemar_power(n, flips, difference, level) == pytest.approx(total, abs=1e-9)


def test_power_at_the_edges() -> None:
    assert mcnemar_power(5, 1.0, 1.0) == 0.0  # 2 / 2^5 > 0.05
    assert mcnemar_power(6, 1.0, 1.0) == pytest.approx(1.0)
    assert mcnemar_power(0, 0.1, 0.1) == 0.0
    assert mcnemar_power(400, 0.15, 0.0) <= 0.05  # the level


@pytest.mark.parametrize("level", [0.05, 0.05 / 18])
def test_the_smallest_difference_has_its_power(level: float) -> None:
    n, flips = 300, 0.15
    d = smallest_difference(n, flips, level)
    assert d is not None
    drawn = np.random.default_rng(1).multinomial(n, [(flips + d) / 2, (flips - d) / 2, 1 - flips], size=20_000)
    kinds, counts = np.unique(drawn[:, :2], axis=0, return_counts=True)
    power = np.average([mcnemar_p(int(g), int(l)) <= level for g, l in kinds], weights=counts)
    assert power == pytest.approx(0.8, abs=0.012)
    if level == 0.05:  # Connor's formula is for the test without continuity correction
        assert detectable_difference(n, flips) == pytest.approx(d, rel=0.06)


@pytest.mark.parametrize(("difference", "flips", "level"), [(0.05, 0.15, 0.05), (0.02, 0.1, 0.004), (0.3, 0.1, 0.05)])
def test_documents_needed_have_the_power(difference: float, flips: float, level: float) -> None:
    n = documents_needed(difference, flips, level)
    assert n is not None
    share = max(flips, difference)
    assert mcnemar_power(n, share, difference, level) >= 0.8
    assert mcnemar_power(n - 1, share, difference, level) < 0.8
    assert smallest_difference(n, flips, level) <= difference + 1e-6


def test_what_cannot_be_detected() -> None:
    assert smallest_difference(5, 0.15) is None
    assert smallest_difference(6, 0.15) is not None
    assert documents_needed(1e-6, 0.5) is None


def test_the_smallest_average_has_its_power(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "SIGN_FLIPS", 4000)  # p-values near 0.05 within 0.004
    documents, flips = [80, 150, 300], [0.2, 0.1, 0.15]
    d = smallest_average(documents, flips)
    assert d is not None
    rng = np.random.default_rng(2)
    rounds = 400
    found = 0
    for _ in range(rounds):
        changes = [
            rng.choice([1.0, -1.0, 0.0], n, p=[(f + d) / 2, (f - d) / 2, 1 - f])
            for n, f in zip(documents, flips, strict=True)
        ]
        found += average_difference(changes).p <= 0.05
    assert found / rounds == pytest.approx(0.8, abs=0.06)
    n = documents_for_average(d, flips)
    assert smallest_average([n] * 3, flips) <= d < smallest_average([n - 1] * 3, flips)


def test_flips_are_the_mean_over_pairs_of_systems(tmp_path: Path) -> None:
    cells = write_sweep(tmp_path, Plan(documents={"piqa": 150}))
    right = {(c.cell["policy"], (c.cell["budget"] or {}).get("ratio")): c.documents["metric/acc"] for c in cells}
    pairs = []
    for budget in (0.2, 0.5):
        systems = [v for (policy, ratio), v in right.items() if policy == "full" or ratio == budget]
        pairs += [float((a != b).mean()) for a, b in itertools.combinations(systems, 2)]
    found = flips_of(cells)["piqa"]
    assert found.share == pytest.approx(np.mean(pairs))
    assert (found.effective, found.pairs) == (1.0, len(pairs))


def test_flips_of_documents_that_share_texts(tmp_path: Path) -> None:
    cells = write_sweep(tmp_path, Plan(documents={"piqa": 120}))
    for c in cells:
        c.documents["cluster"] = [str(i // 4) for i in range(120)]
        # all four questions of a text go together
        c.documents["metric/acc"] = np.repeat(c.documents["metric/acc"].to_numpy()[::4], 4)
    found = flips_of(cells)["piqa"]
    assert found.effective == pytest.approx(0.25, rel=0.05)


def test_metrics_that_are_not_right_or_wrong_have_no_flips(tmp_path: Path) -> None:
    cells = write_sweep(tmp_path, Plan(documents={"piqa": 20}))
    for c in cells:
        c.documents["metric/acc"] += 0.5
    assert flips_of(cells)["piqa"].share is None


def test_power_needs_no_more_than_a_moment() -> None:
    assert math.isclose(smallest_difference(100_000, 0.15), 0.0034, rel_tol=0.05)
