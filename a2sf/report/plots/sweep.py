"""Plots of a sweep, as PNG and SVG files.

Every function draws one model and number of shots (`Grid.by_model`) and returns the figure, or None where the results hold
nothing for it.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from a2sf.analysis.comparisons.fidelity import MEASURES, fidelity_frame
from a2sf.analysis.comparisons.pairs import controls_of
from a2sf.analysis.results.chance import chance_levels
from a2sf.analysis.results.grid import AVERAGE, DEFAULT_PAIR, Grid, SystemResults
from a2sf.analysis.results.labels import budget_axis, budget_kind
from a2sf.analysis.statistics.intervals import Estimate
from a2sf.report.lengths import length_figure
from a2sf.report.plots.lines import (
    available_columns,
    chosen_lines,
    draw_line,
    estimated,
    left_out,
    mean_measure,
    score_columns,
    swept_factors,
)
from a2sf.report.plots.style import GREY, Line, Style, panels, save, shared_legend, spread, styles_of
from a2sf.report.tables.summaries import sizes_note
from a2sf.store.names import safe

CHANCE = "#b00020"
SHOWN = ("agreement", "gold_shift", "margin_shift")
"""Measures of closeness that are drawn."""


def draw_all(grid: Grid, directory: Path, pair: tuple[str, str] = DEFAULT_PAIR) -> list[Path]:
    """Draw everything the grid has results for; the PNG and SVG files written."""
    files: list[Path] = []
    parts = grid.by_model()
    for model, shots, part in parts:
        for name, draw in FIGURES.items():
            figure = draw(part, pair)
            if figure is None:
                continue
            left = left_out(part, pair) if draw in LINES else []
            if left:
                message = textwrap.fill(f"not shown: {', '.join(left)}", 100)
                figure.legends[0].set_title(message, prop=FontProperties(size=7))
            title = f"{model}, {shots}-shot{part.one_schedule}\n{sizes_note(part)}"
            figure.suptitle(title, x=0.01, ha="left", fontsize=9)
            stem = name if len(parts) == 1 else f"{name}-{safe(model)}-{shots}shot"
            files += save(figure, directory / stem)
    return files


def by_budget(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> Figure | None:
    """The metric against the budget, per task and on average, with 95 % bands."""
    lines, columns = chosen_lines(part, pair), score_columns(part)
    if not lines:
        return None
    figure, axes = _panels(len(columns))
    styles = styles_of(lines, part.policies)
    ticks = _ticks(part.systems())
    for axis, column in zip(axes, columns, strict=True):
        _level(axis, part, column)
        for line in lines:
            points = [
                (ticks[s.budget], estimated(s, column, part))
                for s in line.systems
                if column in available_columns(s, part)
            ]
            draw_line(axis, points, styles[line.label], line.label, part.percent)
        axis.set_title(column)
        _budget_axis(axis, ticks)
    _finish(figure, _unit(part))
    return figure


def by_factor(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> Figure | None:
    """The metric against the forgetting factor, one panel per budget; the compared policy stands at factor 1."""
    swept = swept_factors(part)
    if not swept:
        return None
    column = score_columns(part)[-1]
    budgets = list(dict.fromkeys(s.budget for s in swept))
    figure, axes = _panels(len(budgets), sharey=True)
    controls = [s for s in part.systems() if s.policy == pair[1]]
    lines = [Line(s.label, s.policy, [s]) for s in (*swept, *controls)]
    styles = styles_of(list({line.label: line for line in lines}.values()), part.policies)
    for axis, budget in zip(axes, budgets, strict=True):
        _level(axis, part, column)
        for label in dict.fromkeys(s.label for s in swept):
            systems = [
                s for s in swept if s.budget == budget and s.label == label and column in available_columns(s, part)
            ]
            points = [(s.factor_value, estimated(s, column, part)) for s in systems]
            draw_line(axis, points, styles[label], label, part.percent)
        for control in controls:
            if control.budget != budget or column not in available_columns(control, part):
                continue
            style, label = styles[control.label], f"{control.label} (scores as factor 1)"
            found = estimated(control, column, part)
            value, low, high = (100 if part.percent else 1) * np.array([found.value, found.low, found.high])
            sides = [[value - low], [high - value]]
            axis.errorbar(1, value, sides, color=style.colour, fmt=style.marker, ms=6, label=label)
        axis.set_title(f"budget {budget}")
        axis.set_xlim(-0.05, 1.06)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nlast query", "0.25", "0.5", "0.75", "1\nall"])
        axis.set_xlabel("forgetting factor")
    _finish(figure, f"{column}, {_unit(part)}")
    return figure


def heat_map(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> Figure | None:
    """Factor x budget: the average with half its interval, the best factor of each budget framed, the control on top."""
    swept = swept_factors(part)
    column = score_columns(part)[-1]
    ticks = _ticks(part.systems())
    if not swept or len(ticks) < 2:
        return None
    shown = next((s for s in swept if s.policy == pair[0]), swept[0])
    swept = [s for s in swept if s.label == shown.label]
    rows = sorted({s.factor_value for s in swept})
    budgets = list(ticks)
    values, halves = np.full((2, len(rows), len(budgets)), np.nan)
    control, control_halves = np.full((2, 1, len(budgets)), np.nan)
    label = pair[1]
    scale = 100 if part.percent else 1
    systems = part.systems(pair)
    controls = controls_of(systems, pair)
    for s in systems:
        if s.is_full or column not in available_columns(s, part):
            continue
        if s.label == shown.label and not math.isnan(s.factor_value):
            place = rows.index(s.factor_value), budgets.index(s.budget)
            values[place], halves[place] = (scale * x for x in _with_half(estimated(s, column, part)))
        elif s is controls.get((s.budget, shown.schedule, shown.variant)):
            place, label = (0, budgets.index(s.budget)), s.label
            control[place], control_halves[place] = (scale * x for x in _with_half(estimated(s, column, part)))
    has_control = not np.isnan(control).all()
    grid = np.vstack([values, control]) if has_control else values
    halves = np.vstack([halves, control_halves]) if has_control else halves
    figure, axis = plt.subplots(figsize=(1.6 + 0.85 * len(budgets), 1.2 + 0.3 * len(grid)), layout="constrained")
    image = axis.imshow(grid, cmap="cividis", aspect="auto", origin="lower")
    middle = np.nanmean([np.nanmin(grid), np.nanmax(grid)])
    for (i, j), value in np.ndenumerate(grid):
        if not math.isnan(value):
            half, ink = halves[i, j], "black" if value > middle else "white"
            text = f"{value:.1f}" + ("" if math.isnan(half) else f" ±{half:.1f}")
            axis.text(j, i, text, ha="center", va="center", color=ink, fontsize=8)
    for j in range(len(budgets)):
        if not np.isnan(values[:, j]).all():
            best = int((np.nanargmax if part.higher_is_better else np.nanargmin)(values[:, j]))
            frame = plt.Rectangle((j - 0.46, best - 0.44), 0.92, 0.88, fill=False, color="#D55E00", lw=2)
            axis.add_patch(frame)
    if has_control:
        axis.axhline(len(rows) - 0.5, color="white", lw=3)
    axis.set_xticks(range(len(budgets)), budgets)
    axis.set_yticks(range(len(grid)), [f"{r:g}" for r in rows] + ([label] if has_control else []))
    axis.set_xlabel("budget (framed: the best factor)")
    axis.set_ylabel(f"forgetting factor of {shown.label}")
    axis.grid(False)
    figure.colorbar(image, label=f"{column}, {_unit(part)}")
    return figure


def _with_half(found: Estimate) -> tuple[float, float]:
    """A value, and half the width of its interval."""
    return found.value, (found.high - found.low) / 2


def trade_off(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> Figure | None:
    """The metric against tokens per second, of the time that each cell is charged with, and against the tokens retained.

    Cells computed together share the time of a pass, so tokens/s is not the speed of a policy: `a2sf bench` measures that.
    """
    column = score_columns(part)[-1]
    wanted = {"tokens_per_second": "tokens/s of charged time", "kept_tokens": "tokens retained per KV head"}
    measures = {k: v for k, v in wanted.items() if part.frame[k].notna().any()}
    lines = chosen_lines(part, pair)
    styles = styles_of(lines, part.policies)
    full = [s for s in part.systems() if s.is_full and column in available_columns(s, part)]
    if not lines or not measures:
        return None
    figure, axes = _panels(len(measures), sharey=True, width=3.6)
    if full:
        lines = [*lines, Line(full[0].label, full[0].policy, full)]
        styles[full[0].label] = Style(GREY, "*", "-")
    for axis, (measure, label) in zip(axes, measures.items(), strict=True):
        for line in lines:
            points = [
                (mean_measure(s, measure), estimated(s, column, part))
                for s in line.systems
                if column in available_columns(s, part)
            ]
            draw_line(axis, points, styles[line.label], line.label, part.percent, bars=True)
        axis.set_xlabel(f"{label} (mean over tasks)" if len(part.tasks) > 1 else label)
        axis.set_xlim(left=0)
    _finish(figure, f"{column}, {_unit(part)}")
    return figure


def fidelity(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> Figure | None:
    """Agreement with the full cache and shifts of log-likelihoods against the budget."""
    frame, _ = fidelity_frame(part)
    if frame.empty:
        return None
    column = AVERAGE if (frame["task"] == AVERAGE).any() else str(frame["task"].iloc[0])
    ticks = _ticks(part.systems())
    lines = chosen_lines(part, pair)
    styles = styles_of(lines, part.policies)
    figure, axes = _panels(len(SHOWN), width=3.4)
    for axis, measure in zip(axes, SHOWN, strict=True):
        label = MEASURES[measure]
        scale = 100 if measure == "agreement" else 1
        for line in lines:
            rows = frame[(frame["policy"] == line.policy) & (frame["label"] == line.systems[0].label)]
            rows = rows[(rows["factor"] == line.systems[0].factor) & (rows["task"] == column)]
            if rows.empty:
                continue
            style = styles[line.label]
            x = rows["budget"].map(ticks)
            axis.plot(
                x, scale * rows[measure], color=style.colour, marker=style.marker, ls=style.dash, label=line.label
            )
            low, high = (scale * rows[f"{measure}_{end}"].to_numpy() for end in ("low", "high"))
            spread(axis, x.to_numpy(), low, high, style.colour, 0.15)
        if measure != "agreement":
            axis.axhline(0, color=GREY, lw=1)
        axis.set_title(label + (" (%)" if measure == "agreement" else ""))
        _budget_axis(axis, ticks)
    _finish(figure, column)
    return figure


FIGURES: dict[str, Callable[[Grid, tuple[str, str]], Figure | None]] = {
    "budget": by_budget,
    "factor": by_factor,
    "heatmap": heat_map,
    "fidelity": fidelity,
    "tradeoff": trade_off,
    "length": length_figure,
}
"""File name -> drawing function."""
LINES = (by_budget, fidelity, trade_off)
"""Those that draw a line for each policy."""


def _ticks(systems: list[SystemResults]) -> dict[str, float]:
    """Budget -> place on the axis: its ratio or its tokens; evenly spaced where budgets of several kinds occur."""
    orders = {s.budget: s.budget_order for s in systems if not s.is_full}
    kinds = {budget_kind(b)[1] for b in orders}
    if len(kinds) > 1:
        return {b: float(i) for i, b in enumerate(sorted(orders, key=lambda b: (budget_kind(b)[1], orders[b])))}
    return {b: order - 1 for b, order in orders.items()} if kinds == {"tokens"} else orders


def _budget_axis(axis: Axes, ticks: dict[str, float]) -> None:
    title, kinds = budget_axis(ticks)
    axis.set_xticks(list(ticks.values()), [budget_kind(b)[0] for b in ticks] if len(kinds) == 1 else list(ticks))
    axis.set_xlabel(title)


def _level(axis: Axes, part: Grid, column: str) -> None:
    """The full cache as a level line with its band, and the chance level."""
    scale = 100 if part.percent else 1
    chance = chance_levels(part).get(column)
    if chance is not None:
        axis.axhline(scale * chance, color=CHANCE, ls=(0, (4, 3)), lw=1, label="Chance level")
    for s in part.systems():
        if s.is_full and column in available_columns(s, part):
            found = estimated(s, column, part)
            axis.axhline(scale * found.value, color=GREY, ls=(0, (1, 1)), lw=1.5, label=s.label)
            if not math.isnan(found.low):
                axis.axhspan(scale * found.low, scale * found.high, color=GREY, alpha=0.08, lw=0)


def _panels(number: int, sharey: bool = False, width: float = 2.7) -> tuple[Figure, list[Axes]]:
    return panels(number, (width, 2.5), (0, 0.6), columns=3 if number == 5 else 4, least=3.6, sharey=sharey)


def _finish(figure: Figure, unit: str) -> None:
    """One label of the values and one legend for all panels."""
    figure.supylabel(_broken(unit, int(9 * figure.get_figheight())), fontsize=9)
    shared_legend(figure)


def _unit(part: Grid) -> str:
    return f"{part.metric} (%)" if part.percent else part.metric


def _broken(text: str, width: int) -> str:
    """A long axis label in lines, so that it does not reach the title; names are broken behind `_` and `,`."""
    pieces = re.findall(r"[^\s,_]+[,_]*\s*|[,_]+\s*", text)
    lines = [""]
    for piece in pieces:
        if lines[-1] and len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)
