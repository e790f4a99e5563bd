"""scripts/findings.py: its figures and tables from a sweep and from the stored settings."""

from __future__ import annotations

import runpy
from pathlib import Path

import pandas as pd
import pytest
import yaml

from a2sf.errors import UserError
from a2sf.report.heads import errors_figure
from a2sf.report.plots.style import save
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


def test_tables_decided_on_beforehand_and_of_every_system(findings, tmp_path: Path) -> None:
    policies, noise = ("full", "h2o", "a2sf", "calibrated"), NOISE | {"calibrated": 0.5}
    write_sweep(tmp_path / "s", Plan(policies, (0.1, 0.2, 0.4), documents={"arc_easy": 30, "piqa": 20}, noise=noise))
    decided, every = findings["held_out_tables"](tmp_path / "s").split("### Every system")
    assert decided.count("| calibrated | ") == 4  # two named, two budgets: 0.4 is not among them
    assert every.count("| calibrated | ") == 3


def test_cells_beside_the_presets_are_planned_with_its_model_and_data(findings, tmp_path: Path) -> None:
    files = findings["by_seed"]()["0.2"]
    seeds = ("policy=calibrated", f"policy.file={','.join(str(f) for f in files[1:])}", "budget.ratio=0.2")
    for sweep, overrides, cells in (("heldout", findings["FACTOR"], 2), ("seeds", seeds, 4)):
        done = evaluate(
            "-m", *overrides, *findings["like_the_preset"](sweep), "tasks=[copa]", "plan_only=true", runs=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"runs/{sweep}: {cells} cells" in done.stdout.replace(str(tmp_path), "runs")
    assert len(findings["like_the_preset"]("s")) == 7


def test_what_another_seed_is_worth(findings, tmp_path: Path) -> None:
    seeds = findings["by_seed"]()["0.2"]
    documents = {"arc_easy": 30, "piqa": 20}
    write_sweep(tmp_path / "s", Plan(("full", "a2sf", "h2o"), (0.1, 0.2), documents=documents))
    for seed, name in enumerate(yaml.safe_load(file.read_text())["name"] for file in seeds):
        extra = {"policy_label": "Calibrated", "policy_settings": {"file": {"name": name}}}
        noise = NOISE | {"calibrated": (1 + seed) / 4}
        write_sweep(tmp_path / str(seed), Plan(("calibrated",), (0.2,), documents=documents, noise=noise, extra=extra))
    sweeps = [tmp_path / d for d in "s012"]
    text = findings["seeds_tables"](sweeps, {"0.2": seeds[:2]}, seeds[2:])
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| Calibrated")]
    assert [row[1] for row in rows] == ["A2SF 0.1"] * 3 + ["H2O"] * 3
    changes = [float(row[5].split()[0]) for row in rows]
    assert changes[:3] == sorted(changes[:3])
    assert changes[0] < 1
    assert "Holm" not in text
    for files, pairs in ((seeds[:2], 1), (seeds, 3)):
        heads = findings["seeds_tables"](sweeps, {"0.2": files}, seeds[2:]).splitlines()[-3].split(" | ")
        assert len(heads[1].split(", ")) == pairs
    with pytest.raises(UserError, match=r"no results of .*three times the text"):
        findings["seeds_tables"](sweeps, {"0.2": seeds}, [findings["MORE"]])


def test_what_was_chosen_layer_by_layer(findings, tmp_path: Path) -> None:
    files = sorted((ROOT / "runs/reference/findings/smollm2-135m").glob("*-0.2.yaml"))
    assert {f.name.removesuffix("-0.2.yaml") for f in files} == set(findings["KINDS"])
    numbers, described = findings["_numbers"](yaml.safe_load(files[0].read_text()))
    assert (numbers["share"].shape, described) == ((30, 3), "by head, budget 0.2")
    for file in files:  # a share of a head is within its layer's, and all of them have the mean 1
        numbers, described = findings["_numbers"](yaml.safe_load(file.read_text()))
        assert numbers["share"].mean() == pytest.approx(1, abs=1e-3), described
    figure = findings["chosen_figure"](files[:2])
    labels = [axis.get_ylabel() for axis in figure.axes if axis.get_label() == "<colorbar>"]
    assert labels == [title for title, _ in findings["SETTINGS"].values()]
    save(figure, tmp_path / "f")


def test_errors_over_one_policys() -> None:
    frame = pd.DataFrame(
        [(p, b, layer, e * (layer + 1)) for p, e in (("a", 2.0), ("b", 1.0)) for b in (0.1, 0.2) for layer in range(3)],
        columns=["policy", "budget", "layer", "error"],
    )
    axes = errors_figure(frame, {"a": "A"}, over="a").axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes[0].get_lines()}
    assert (len(axes), lines) == (2, {"A": [1, 1, 1], "b": [0.5, 0.5, 0.5]})
