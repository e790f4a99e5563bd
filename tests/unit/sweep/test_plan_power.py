"""What a plan says about the differences that its sweep can detect."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from a2sf.analysis.results.flips import Flips
from a2sf.analysis.results.grid import AVERAGE
from a2sf.analysis.statistics.power import (
    documents_for_average,
    documents_needed,
    smallest_average,
    smallest_difference,
)
from a2sf.app.power import number_of_tests, power_of, power_rows
from a2sf.policies.budget import Budget
from a2sf.sweep.planning.estimate import Measurements
from a2sf.sweep.planning.power import PowerSettings
from tests.unit.sweep.test_sweep import cell


def of(*policies: str, budgets: tuple[float, ...] = (0.2, 0.4), tasks: tuple[str, ...] = ("copa",), **more: object):
    return [
        cell(p, task=t, budget=None if p == "full" else Budget(ratio=b), **more)
        for t in tasks
        for p in policies
        for b in (budgets[:1] if p == "full" else budgets)
    ]


def shown(cells, settings: PowerSettings | None = None, measurements: Measurements | None = None) -> str:
    found = power_of(cells, measurements or Measurements(), settings or PowerSettings())
    if found is None:
        return ""
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        console.print(found)
    return captured.get()


def test_the_number_of_tests_a_table_are_counted():
    assert number_of_tests(of("full", "h2o", "a2sf", "snapkv")) == 2 * 2  # at each of two budgets two against the best
    assert number_of_tests(of("full", "h2o", "a2sf", tasks=("copa", "piqa"))) == 2 * 3  # two tasks and their average
    assert number_of_tests(of("full", "h2o")) == 2  # only the full cache is there to compare with
    assert number_of_tests(of("h2o")) == number_of_tests(of("full")) == 0
    two = [*of("full", "h2o", "a2sf"), *(dataclasses.replace(c, model_name="other") for c in of("full", "h2o"))]
    assert number_of_tests(two) == 2  # of the model with most


def test_rows_are_the_statistics_of_each_task():
    rows = power_rows({"copa": 100, "piqa": 400}, {"piqa": Flips(0.1, 0.5, 3)}, PowerSettings(detect=2.0), level=0.01)
    copa, piqa, average = rows
    assert (copa.flips, copa.known, piqa.flips, piqa.known) == (0.15, False, 0.1, True)
    assert copa.alone == smallest_difference(100, 0.15)
    assert copa.corrected == smallest_difference(100, 0.15, 0.01)
    assert copa.needed == documents_needed(0.02, 0.15, 0.01)
    # half as many independent documents
    assert piqa.alone == smallest_difference(200, 0.1)
    assert piqa.needed == 2 * documents_needed(0.02, 0.1, 0.01)
    assert (average.name, average.documents) == (AVERAGE, 500)
    assert average.corrected == smallest_average([100, 200], [0.15, 0.1], 0.01)
    assert average.needed == 2 * documents_for_average(0.02, [0.15, 0.1], 0.01)


def test_the_users_flips_count_before_those_of_results():
    rows = power_rows({"copa": 100}, {"copa": Flips(0.1)}, PowerSettings(flips=0.3), level=0.05)
    assert [(r.flips, r.known) for r in rows] == [(0.3, True)]
    assert power_rows({"wiki": 100}, {"wiki": Flips(None)}, PowerSettings(), level=0.05) == []


def test_a_plan_shows_what_its_documents_detect():
    text = shown(of("full", "h2o", "a2sf", "snapkv", limit=60), PowerSettings(detect=5.0))
    assert "Documents for 5 points: with 80 % power at the corrected level." in " ".join(text.split())
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("copa"))
    needed = documents_needed(0.05, 0.15, 0.05 / 4)
    assert row == [
        "copa",
        "60",
        "15.0",
        "%*",
        f"{100 * smallest_difference(60, 0.15):.1f}",
        f"{100 * smallest_difference(60, 0.15, 0.05 / 4):.1f}",
        f"{float(f'{needed:.3g}'):,.0f}",
    ]
    assert "4 tests" in " ".join(text.split())
    assert "not known, assumed" in text
    assert max(map(len, text.splitlines())) <= 80


def test_nothing_is_shown_where_nothing_is_compared():
    assert shown(of("full", limit=60)) == ""
    assert "one test" in shown(of("full", limit=60), PowerSettings(detect=2.0)).lower()


@pytest.mark.parametrize("detect", [0.5, 30])
def test_a_large_wanted_difference_flips_as_many_documents_as_it_needs(detect: float):
    rows = power_rows({"copa": 50}, {}, PowerSettings(detect=detect), level=0.05)
    assert rows[0].needed == documents_needed(detect / 100, 0.15)


def test_a_share_of_one_document_is_marked_as_such():
    rows = power_rows({"copa": 5, "piqa": 100}, {"piqa": Flips(0.001)}, PowerSettings(), level=0.05)
    assert [(r.flips, r.one) for r in rows] == [(0.2, True), (0.01, True), (None, False)]
    text = shown(of("full", "h2o", limit=5))
    assert "20.0 %†" in text
    assert "two systems differ († one document, the least there can be)" in " ".join(text.split())
