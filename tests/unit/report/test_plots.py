"""Plots: the numbers drawn are the results' numbers, styles are stable, files are written and reproducible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image

from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.grid import Grid
from a2sf.analysis.results.selection import Selection
from a2sf.policies.find import built_in
from a2sf.report.plots.lines import chosen_lines, estimated, left_out, lines_of
from a2sf.report.plots.style import COLOURS, MOST, Line, own_style, policy_styles, styles_of
from a2sf.report.plots.sweep import FIGURES, by_budget, by_factor, draw_all, fidelity, heat_map, trade_off
from tests.sweep_fixture import NOISE, Plan, write_sweep

PAIR = ("a2sf", "h2o")


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    directory = tmp_path_factory.mktemp("runs") / "demo"
    write_sweep(directory, Plan(factors=(0.0, 0.2, 0.9), documents={"arc_easy": 60, "piqa": 80}))
    return gather([directory])


@pytest.fixture(autouse=True)
def _close() -> object:
    yield
    plt.close("all")


def test_lines_hold_the_accuracies(grid: Grid) -> None:
    figure = by_budget(grid)
    assert figure is not None
    for axis in figure.axes:
        task = axis.get_title()
        (h2o,) = [line for line in axis.lines if line.get_label() == "H2O"]
        for x, y in zip(h2o.get_xdata(), h2o.get_ydata(), strict=True):
            rows = grid.frame[(grid.frame.policy == "h2o") & (grid.frame.budget_ratio == x)]
            rows = rows if task == "average" else rows[rows.task == task]
            assert y == pytest.approx(100 * rows["value"].mean())


def test_the_shown_factor_is_the_best_and_says_so(grid: Grid) -> None:
    (line,) = [line for line in lines_of(grid) if line.policy == "a2sf"]
    rows = grid.frame[grid.frame.policy == "a2sf"]
    best = rows.groupby("factor")["value"].mean().idxmax()
    assert line.label == f"A2SF (factor {best}, best of 3)"
    assert {s.factor for s in line.systems} == {best}


def test_factor_axis_has_both_ends(grid: Grid) -> None:
    figure = by_factor(grid, PAIR)
    assert figure is not None
    assert [a.get_title() for a in figure.axes] == ["budget 0.2", "budget 0.5"]
    (swept,) = [line for line in figure.axes[0].lines if line.get_label() == "A2SF"]
    assert list(swept.get_xdata()) == [0.0, 0.2, 0.9]
    assert [c.get_label() for c in figure.axes[0].containers] == ["H2O (scores as factor 1)"]


def test_heat_map_holds_every_average(grid: Grid) -> None:
    figure = heat_map(grid, PAIR)
    assert figure is not None
    drawn = figure.axes[0].images[0].get_array()
    means = grid.frame[grid.frame.policy == "a2sf"].groupby(["factor_value", "budget_order"])["value"].mean().unstack()
    assert drawn.tolist()[:-1] == [pytest.approx(row) for row in 100 * means.to_numpy()]
    assert len(figure.axes[0].patches) == 2  # one frame a budget
    row = next(s for s in grid.systems() if s.policy == "a2sf")
    average = estimated(row, "average", grid)
    written = f"{100 * average.value:.1f} ±{50 * (average.high - average.low):.1f}"
    assert written in [t.get_text() for t in figure.axes[0].texts]


def test_policies_of_a_report_differ_and_each_has_a_colour_as_long_as_there_are_enough() -> None:
    policies = sorted(set(built_in()) - {"full"})
    styles = policy_styles(policies)
    assert styles == policy_styles(reversed(policies))
    assert {s.colour for s in styles.values()} == set(COLOURS)
    for some in (policies, [f"mine:Policy{i}" for i in range(60)]):
        looks = policy_styles(some).values()
        assert len({(s.colour, s.marker) for s in looks}) == len(some)
    assert len({(s.colour, s.dash) for s in styles.values()}) == len(policies)
    for first in range(len(policies) - len(COLOURS) + 1):
        few = policy_styles(policies[first : first + len(COLOURS)]).values()
        assert len({s.colour for s in few}) == len(COLOURS)
    assert policy_styles(["snapkv"])["snapkv"] == own_style("snapkv")
    assert policy_styles(["snapkv", "pyramidkv"])["snapkv"].colour != own_style("pyramidkv").colour
    for pair in PAIR:  # whose colours are others', too
        assert styles[pair] == own_style(pair)
        assert [p for p, s in styles.items() if s.colour == styles[pair].colour] == [pair]


def test_colours_are_told_apart_by_colour_blind_readers() -> None:
    """Distances in CIELAB, with the red-blind's and green-blind's colours by Machado et al. (2009)."""
    red_blind = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    green_blind = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    to_xyz = np.array([[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8729]])  # over white's
    rgb = np.array([to_rgb(c) for c in COLOURS])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for seen in (np.eye(3), np.array(red_blind), np.array(green_blind)):
        x, y, z = np.cbrt(to_xyz @ (seen @ linear.T).clip(0, 1))
        lab = np.array([116 * y, 500 * (x - y), 200 * (y - z)])
        distance = np.sqrt(((lab[:, :, None] - lab[:, None]) ** 2).sum(0)) + 1000 * np.eye(len(COLOURS))
        assert distance.min() > 9


def test_a_policy_looks_the_same_in_all_plots_of_a_report(tmp_path: Path) -> None:
    """The 0-shot plots have SnapKV without PyramidKV, whose colour it would have by itself."""
    policies = ("full", "snapkv", "pyramidkv")
    write_sweep(tmp_path / "s", Plan(shots=(0, 1), policies=policies, noise=dict.fromkeys(policies, 1.0)))
    both = gather([tmp_path / "s"])
    frame = both.frame[(both.frame.shots != 0) | (both.frame.policy != "pyramidkv")]
    figures = [by_budget(part) for _, _, part in replace(both, frame=frame).by_model()]
    drawn = [[n for n in f.axes[0].lines if n.get_label() in policies] for f in figures if f is not None]
    looks = [{n.get_label(): (n.get_color(), n.get_marker(), n.get_linestyle()) for n in lines} for lines in drawn]
    assert [len(look) for look in looks] == [1, 2]
    assert looks[0]["snapkv"] == looks[1]["snapkv"]
    assert looks[1]["snapkv"][0] != looks[1]["pyramidkv"][0]


def test_lines_of_one_policy_differ_in_their_dashes_and_no_two_lines_are_equal() -> None:
    policies = [*sorted(built_in()), "mine", "yours"]
    lines = [Line(f"{p} {i}", p, []) for p in policies for i in range(4)]
    styles = styles_of(lines)
    assert len(set(styles.values())) == len(lines)
    for policy, style in policy_styles(policies).items():
        first, *others = [styles[f"{policy} {i}"] for i in range(4)]
        assert first == style
        assert {(s.colour, s.marker) for s in others} == {(first.colour, first.marker)}


MANY = ("full", "window", "streaming", "h2o", "a2sf", "p1", "p2", "p3", "p4", "future")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    directory = tmp_path_factory.mktemp("runs") / "many"
    noise = NOISE | {"p1": 0.1, "p2": 1.5, "p3": 5.0, "p4": 6.0, "future": 0.0}
    noise |= {"window": 3.0, "streaming": 8.0}
    write_sweep(directory, Plan(policies=MANY, noise=noise, documents={"arc_easy": 400}))
    return gather([directory])


def test_at_most_eight_lines_and_the_legend_says_what_is_left_out(many: Grid, tmp_path: Path) -> None:
    """Full cache, the pair, then the best on average; what looks ahead only where there is room."""
    chosen = [line.policy for line in chosen_lines(many, PAIR)]
    means = many.frame.groupby("policy")["value"].mean()
    others = [p for p in MANY if p not in ("full", "future", *PAIR)]
    assert set(chosen) == {*PAIR, *sorted(others, key=lambda p: -means[p])[: MOST - 3]}
    figure = by_budget(many, PAIR)
    assert figure is not None
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert len(labels) == MOST + 1
    assert "Chance level" in labels
    draw_all(many, tmp_path, PAIR)
    left = left_out(many, PAIR)
    assert set(left) == {line.label for line in lines_of(many)} - {line.label for line in chosen_lines(many, PAIR)}
    assert "not shown: " + ", ".join(left) in (tmp_path / "budget.svg").read_text()  # a comment beside the glyphs
    other = ("p4", "p3")
    assert set(other) <= {line.policy for line in chosen_lines(many, other)}


def test_files_are_written_and_reproducible(grid: Grid, tmp_path: Path) -> None:
    first = draw_all(grid, tmp_path / "a")
    second = draw_all(grid, tmp_path / "b")
    assert {f.stem for f in first} == {*FIGURES} - {"length"}  # the prompts' lengths are not known
    for png, svg, again in zip(first[::2], first[1::2], second[1::2], strict=True):
        assert (png.suffix, svg.suffix) == (".png", ".svg")
        assert svg.read_bytes() == again.read_bytes()
        with Image.open(png) as image:
            assert len(image.convert("L").getcolors(100_000)) > 20


def test_nothing_to_draw_is_no_picture(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", Plan(policies=("full",), documents={"piqa": 20}))
    part = gather([tmp_path / "s"])
    assert [draw(part, PAIR) for draw in (by_budget, by_factor, heat_map, trade_off, fidelity)] == [None] * 5


def test_one_budget_and_one_factor(grid: Grid) -> None:
    part = gather_again(grid, Selection(budgets=("0.2",), factors=("0.2",), tasks=("piqa",)))
    assert by_factor(part, PAIR) is None
    assert heat_map(part, PAIR) is None
    figure = by_budget(part, PAIR)
    assert figure is not None
    assert [a.get_title() for a in figure.axes] == ["piqa"]


@pytest.mark.parametrize(
    ("bases", "ticks", "title"),
    [
        ((" of context", " of context"), ["0.2", "0.5"], "budget (share of the context)"),
        (("", " of context"), ["0.2", "0.2 of context", "0.5", "0.5 of context"], "budget"),
    ],
)
def test_the_budget_axis_says_of_what_a_budget_is_a_share(grid: Grid, bases: tuple, ticks: list, title: str) -> None:
    rows = zip(grid.frame["budget"], grid.frame["policy"], grid.frame["is_full"], strict=True)
    budgets = [b if full else f"{b}{bases[policy == 'h2o']}" for b, policy, full in rows]
    figure = by_budget(replace(grid, frame=grid.frame.assign(budget=budgets)))
    assert figure is not None
    axis = figure.axes[0]
    assert axis.get_xlabel() == title
    assert sorted(t.get_text() for t in axis.get_xticklabels()) == ticks
    assert len(set(axis.get_xticks())) == len(ticks)  # no two budgets at one place


def gather_again(grid: Grid, selection: Selection) -> Grid:
    directory = next(iter(grid.cells.values())).path.parent
    return gather([directory], selection)


def test_a_long_metric_name_does_not_reach_the_title(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", Plan())
    metric = "exact_match_of_the_normalised_answer,flexible-extract_with_a_long_name"
    part = replace(gather([tmp_path / "s"]), metric=metric)
    for draw in (trade_off, by_budget):
        figure = draw(part)
        assert figure is not None
        figure.suptitle("a-model-with-a-long-name, 0-shot", x=0.01, ha="left", fontsize=10)
        figure.draw_without_rendering()
        label, title = (t.get_window_extent() for t in (figure._supylabel, figure._suptitle))  # type: ignore[attr-defined]
        assert label.y1 < title.y0
        assert label.y0 > 0
        assert metric in figure._supylabel.get_text().replace("\n", "")  # type: ignore[attr-defined]
