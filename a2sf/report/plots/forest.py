"""Forest plots: differences in each model, and pooled over models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from a2sf.analysis.comparisons.pooled import OverModels, documents_in_words, shown_tasks
from a2sf.analysis.results.grid import AVERAGE
from a2sf.analysis.results.labels import DASH, MINUS
from a2sf.report.plots.style import GREY, panels, save

COLUMNS = 4
"""Panels side by side."""
MOST = 12
"""Panels of a figure."""
POOLED, THESE = "#0072B2", "#D55E00"


def forest_plots(found: Sequence[OverModels], directory: Path, percent: bool, metric: str) -> list[Path]:
    """The PNG and SVG files written, one figure for each number of shots and two systems: a panel for each budget.

    Without budgets (runs of any harness) it is a panel for each system, against the same one.
    """
    files: list[Path] = []
    figures: dict[tuple[object, ...], list[OverModels]] = {}
    for o in shown_tasks(found):
        figures.setdefault((o.shots, o.first if o.budget else "each", o.second), []).append(o)
    for number, ((shots, first, second), rows) in enumerate(figures.items()):
        figure = forest(rows[:MOST], percent, metric)
        what = f"{first} {MINUS} {second}" + ("" if shots is None else f", {shots}-shot")
        what += f", the first {MOST} of {len(rows)}" if len(rows) > MOST else ""
        tasks = ", ".join(dict.fromkeys("average over tasks" if o.task == AVERAGE else o.task for o in rows[:MOST]))
        below = f"{tasks}; {documents_in_words(rows[:MOST])}; intervals: 95 %"
        figure.suptitle(f"{what}\n{below}", x=0.01, ha="left", fontsize=10)
        files += save(figure, directory / (f"forest-{number + 1}" if len(figures) > 1 else "forest"))
    return files


def forest(rows: Sequence[OverModels], percent: bool, metric: str) -> Figure:
    """One panel for each comparison: a line per model, then the mean with its interval for these and such models."""
    scale = 100 if percent else 1
    models = list(dict.fromkeys(m for o in rows for m in o.by_model))
    ahead = any(o.pooled.next_low is not None for o in rows)
    names = [*models, "mean, these models", "mean, models like these", *(["another model"] if ahead else [])]
    each = (2.2, 0.27 * len(names) + 0.75)
    figure, axes = panels(len(rows), each, (1.8, 0.5), columns=COLUMNS, sharex=True, sharey=True)
    for axis in axes[-COLUMNS:]:
        axis.tick_params(labelbottom=True)  # nothing is below it
    for axis, o in zip(axes, rows, strict=True):
        _panel(axis, o, models, scale)
        axis.set_title(_title(o))
    places = [-i - 0.5 * (i >= len(models)) for i in range(len(names))]
    axes[0].set_yticks(places, names)
    axes[0].set_ylim(places[-1] - 0.7, 0.7)
    figure.supxlabel(f"difference in {metric}{' (points)' if percent else ''}", fontsize=9)
    return figure


def _panel(axis: Axes, o: OverModels, models: Sequence[str], scale: float) -> None:
    axis.axvline(0, color=GREY, lw=1)
    axis.grid(axis="y", visible=False)
    for i, model in enumerate(models):
        d = o.by_model.get(model)
        if d is not None:
            _line(axis, -i, (d.low, d.value, d.high), scale, "black", "s")
    p, start = o.pooled, -len(models) - 0.5
    _line(axis, start, (p.here_low, p.value, p.here_high), scale, THESE, "D")
    _line(axis, start - 1, (p.low, p.value, p.high), scale, POOLED, "D")
    if p.next_low is not None and p.next_high is not None:
        axis.hlines(start - 2, scale * p.next_low, scale * p.next_high, colors=POOLED, lw=1.2, ls=(0, (3, 2)))
    axis.axhline(start + 0.75, color="0.8", lw=0.8)


def _line(axis: Axes, y: float, values: tuple[float, float, float], scale: float, colour: str, marker: str) -> None:
    low, value, high = (scale * v for v in values)
    axis.hlines(y, low, high, colors=colour, lw=1.2)
    axis.plot([value], [y], marker=marker, color=colour, ms=4.5, ls="")


def _title(o: OverModels) -> str:
    factor = "" if o.factor == DASH else f", factor {o.factor}"
    return f"budget {o.budget}{factor}" if o.budget else o.first
