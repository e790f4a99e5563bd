"""scripts/findings.py: its figures and tables from a sweep and from the stored settings."""

from __future__ import annotations

import runpy
from pathlib import Path

import pandas as pd
import pytest
import yaml

from a2sf.report.heads import errors_figure
from a2sf.report.plots import save
from tests.end_to_end.test_evaluate import evaluate
from tests.sweep_fixture import NOISE, Plan, write_sweep

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def findings():
    return runpy.run_path(str(ROOT / "scripts" / "findings.py"), run_name="findings")


def test_accuracy_and_closeness_by_budget(findings, tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", Plan(factors=(0.1, 0.9), documents={"arc_easy": 30, "piqa": 20}))
    figure = findings["closeness_figure"](tmp_path / "s")
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["H2O", "A2SF 0.1", "Full cache"]  # of those that are drawn
    assert all(len(line.get_xdata()) == 2 for line in figure.axes[1].get_lines())
    save(figure, tmp_path / "f")


def test_a_task_that_came_later_is_in_a_table_of_its_own(findings, tmp_path: Path) -> None:
    policies, noise = ("full", "h2o", "a2sf", "calibrated"), NOISE | {"calibrated": 0.5}
    for name, documents in (("s", {"arc_easy": 30, "piqa": 20}), ("later", {"hellaswag": 25})):
        write_sweep(tmp_path / name, Plan(policies, (0.1, 0.2), documents=documents, noise=noise))
    without = findings["held_out_tables"](tmp_path / "s")
    with_it = findings["held_out_tables"](tmp_path / "s", tmp_path / "later")
    first, last = without.split("### Every system")
    assert with_it.startswith(first)
    assert with_it.endswith(last)
    assert "hellaswag" not in without
    added = with_it.removeprefix(first).removesuffix(last)
    assert [line for line in added.splitlines() if line.startswith("### ")] == [
        "### The same with hellaswag",
        "### hellaswag by itself",
        "### Every system",
    ]
    decided = first.count("| calibrated | ")
    assert decided == 4  # two named, two budgets
    assert added.count("| calibrated | ") == decided + 2  # and by itself


def test_the_factor_of_its_own_is_planned(findings, tmp_path: Path) -> None:
    done = evaluate("-m", *findings["FACTOR"], "tasks=[copa]", "plan_only=true", runs=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 cells" in done.stdout


def test_what_was_chosen_layer_by_layer(findings, tmp_path: Path) -> None:
    files = sorted((ROOT / "runs/reference/findings/smollm2-135m").glob("*-0.2.yaml"))
    assert {f.name.removesuffix("-0.2.yaml") for f in files} == set(findings["KINDS"])
    numbers, told = findings["_numbers"](yaml.safe_load(files[0].read_text()))
    assert (numbers["share"].shape, told) == ((30, 3), "by head, budget 0.2")
    for file in files:  # a share of a head is within its layer's, and all of them have the mean 1
        numbers, told = findings["_numbers"](yaml.safe_load(file.read_text()))
        assert numbers["share"].mean() == pytest.approx(1, abs=1e-3), told
    save(findings["chosen_figure"](files[:2]), tmp_path / "f")


def test_errors_over_one_policys() -> None:
    frame = pd.DataFrame(
        [(p, b, layer, e * (layer + 1)) for p, e in (("a", 2.0), ("b", 1.0)) for b in (0.1, 0.2) for layer in range(3)],
        columns=["policy", "budget", "layer", "error"],
    )
    axes = errors_figure(frame, {"a": "A"}, over="a").axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes[0].get_lines()}
    assert (len(axes), lines) == (2, {"A": [1, 1, 1], "b": [0.5, 0.5, 0.5]})
