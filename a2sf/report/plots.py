"""Pictures of a sweep, as PNG and SVG: colours that colour-blind readers tell apart, markers and dashes for grey print.

Every function draws one model and number of shots (`Grid.parts`) and returns the figure, or None where the results hold
nothing for it.
"""

from __future__ import annotations

import math
import textwrap
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from a2sf.analysis.collect import DEFAULT_PAIR, Grid, System
from a2sf.analysis.compare import AVERAGE
from a2sf.analysis.fidelity import MEASURES, fidelity_frame
from a2sf.analysis.labels import DASH
from a2sf.analysis.stats import Z
from a2sf.policies.find import built_in
from a2sf.store.names import safe

# Okabe and Ito, 2008, "Color universal design"; black is the full cache's, the pale yellow is left out
COLOURS = ("#D55E00", "#000000", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00")
MARKERS = "osD^vPX<>ph"
DASHES: tuple[str, ...] = ("-", "--", ":", "-.")
MOST = 8
"""Lines in one panel, the full cache's among them."""
GREY = "0.35"
SHOWN = ("agreement", "gold_shift", "margin_shift")
"""Measures of closeness that are drawn."""
plt.rcParams.update(
    {
        "figure.dpi": 100,
        "savefig.dpi": 150,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "0.9",
        "axes.axisbelow": True,
        "axes.titlesize": 9,
        "legend.frameon": False,
        "svg.hashsalt": "a2sf",  # the same picture is the same file
        "text.parse_math": False,  # a name may hold a dollar sign
    }
)


@dataclass(frozen=True)
class Line:
    """One policy across budgets, at one forgetting factor."""

    label: str
    policy: str
    systems: list[System]


@dataclass(frozen=True)
class Style:
    """How a policy is drawn, everywhere; its second line in a picture differs in `dash`."""

    colour: str
    marker: str
    dash: str


def style_of(policy: str, known: Iterable[str] | None = None) -> Style:
    """The same policy gets the same style in every picture, whatever else is in it.

    Args:
        known: policies in the order that colours are dealt out; ours by default.
    """
    order = sorted(known) if known is not None else sorted(built_in())
    index = order.index(policy) if policy in order else len(order) + zlib.crc32(policy.encode())
    # 7 colours and 11 markers make 77 pairs; what has the colour of another has another dash, too
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    return Style(colour, marker, DASHES[index // len(COLOURS) % len(DASHES)])


def styles_of(lines: Sequence[Line]) -> dict[str, Style]:
    """Label -> style, no two alike: lines of one policy have its colour and marker, and dashes of their own."""
    styles: dict[str, Style] = {}
    for line in lines:
        style = style_of(line.policy)
        start = DASHES.index(style.dash)
        turned = [replace(style, dash=DASHES[(start + i) % len(DASHES)]) for i in range(len(DASHES))]
        turned += [replace(t, marker=m) for m in MARKERS for t in turned]
        styles[line.label] = next(t for t in turned if t not in styles.values())
    return styles


def draw_all(grid: Grid, directory: Path, pair: tuple[str, str] = DEFAULT_PAIR) -> dict[str, list[Path]]:
    """Draw everything the grid has results for; caption -> the PNG and SVG written."""
    written: dict[str, list[Path]] = {}
    parts = grid.parts()
    for model, shots, part in parts:
        for name, (caption, draw) in FIGURES.items():
            figure = draw(part, pair)
            if figure is None:
                continue
            where = f"{model}, {shots}-shot"
            where += part.one_schedule
            left = left_out(part, pair) if draw in LINES else []
            if left:
                caption += f"; at most {MOST} lines, without {', '.join(left)} (choose with --policy)"
                told = textwrap.fill(f"not shown: {', '.join(left)}", 100)
                figure.legends[0].set_title(told, prop=FontProperties(size=7))
            figure.suptitle(where, x=0.01, ha="left", fontsize=10)
            stem = name if len(parts) == 1 else f"{name}-{safe(model)}-{shots}shot"
            written[f"{caption} ({where})"] = save(figure, directory / stem)
    return written


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg`."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, bbox_inches="tight", metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
    return files


def by_budget(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> Figure | None:
    """The metric against the budget, per task and on average, with 95 % bands."""
    lines, columns = chosen_lines(part, pair), _columns(part)
    if not lines:
        return None
    figure, axes = _panels(columns)
    styles = styles_of(lines)
    ticks = _ticks(part.systems())
    for axis, column in zip(axes, columns, strict=True):
        _level(axis, part, column)
        for line in lines:
            points = [(ticks[s.budget], *_score(s, column, part)) for s in line.systems if column in _has(s, part)]
            _curve(axis, points, line, part, styles[line.label])
        axis.set_title(column)
        _budget_axis(axis, ticks)
    _finish(figure, axes, _unit(part))
    return figure


def by_factor(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> Figure | None:
    """The metric against the forgetting factor, one panel per budget; the compared policy stands at factor 1."""
    swept = _swept(part)
    if not swept:
        return None
    column = _columns(part)[-1]
    budgets = list(dict.fromkeys(s.budget for s in swept))
    figure, axes = _panels(budgets, sharey=True)
    controls = [s for s in part.systems() if s.policy == pair[1]]
    lines = [Line(s.label, s.policy, [s]) for s in (*swept, *controls)]
    styles = styles_of(list({line.label: line for line in lines}.values()))
    for axis, budget in zip(axes, budgets, strict=True):
        _level(axis, part, column)
        for label in dict.fromkeys(s.label for s in swept):
            systems = [s for s in swept if s.budget == budget and s.label == label and column in _has(s, part)]
            points = [(s.factor_value, *_score(s, column, part)) for s in systems]
            if systems:
                _curve(axis, points, Line(label, systems[0].policy, systems), part, styles[label])
        for control in controls:
            if control.budget != budget or column not in _has(control, part):
                continue
            value, error = _score(control, column, part)
            style = styles[control.label]
            scale = 100 if part.percent else 1
            label = f"{control.label} (scores as factor 1)"
            axis.errorbar(1, scale * value, scale * Z * error, color=style.colour, fmt=style.marker, ms=6, label=label)
        axis.set_title(f"budget {budget}")
        axis.set_xlim(-0.05, 1.06)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nlast query", "0.25", "0.5", "0.75", "1\nall"])
        axis.set_xlabel("forgetting factor")
    _finish(figure, axes, f"{column}, {_unit(part)}")
    return figure


def heat_map(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> Figure | None:
    """Factor x budget: the average as colour and number, the best factor of each budget framed, the control on top."""
    swept = _swept(part)
    column = _columns(part)[-1]
    ticks = _ticks(part.systems())
    if not swept or len(ticks) < 2:
        return None
    shown = next((s for s in swept if s.policy == pair[0]), swept[0])
    swept = [s for s in swept if s.label == shown.label]
    rows = sorted({s.factor_value for s in swept})
    budgets = list(ticks)
    values = np.full((len(rows), len(budgets)), np.nan)
    control = np.full((1, len(budgets)), np.nan)
    label = pair[1]
    scale = 100 if part.percent else 1
    for s in part.systems():
        if s.is_full or column not in _has(s, part):
            continue
        if s.label == shown.label and not math.isnan(s.factor_value):
            values[rows.index(s.factor_value), budgets.index(s.budget)] = scale * _score(s, column, part)[0]
        elif s.policy == pair[1] and (s.schedule, s.variant) == (shown.schedule, shown.variant):
            control[0, budgets.index(s.budget)], label = scale * _score(s, column, part)[0], s.label
    has_control = not np.isnan(control).all()
    grid = np.vstack([values, control]) if has_control else values
    figure, axis = plt.subplots(figsize=(1.6 + 0.75 * len(budgets), 1.2 + 0.3 * len(grid)), layout="constrained")
    image = axis.imshow(grid, cmap="cividis", aspect="auto", origin="lower")
    middle = np.nanmean([np.nanmin(grid), np.nanmax(grid)])
    for (i, j), value in np.ndenumerate(grid):
        if not math.isnan(value):
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", color="black" if value > middle else "white")
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


def trade_off(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> Figure | None:
    """The metric against tokens per second, of the time that each cell is charged with, and against what was kept."""
    column = _columns(part)[-1]
    wanted = {"tokens_per_second": "tokens/s of the time charged to a cell", "kept_tokens": "tokens kept per KV head"}
    measures = {k: v for k, v in wanted.items() if part.frame[k].notna().any()}
    lines = chosen_lines(part, pair)
    styles = styles_of(lines)
    full = [s for s in part.systems() if s.is_full and column in _has(s, part)]
    if not lines or not measures:
        return None
    figure, axes = _panels(list(measures), sharey=True, width=3.6)
    if full:
        lines = [*lines, Line(full[0].label, full[0].policy, full)]
        styles[full[0].label] = Style(GREY, "*", "-")
    for axis, (measure, label) in zip(axes, measures.items(), strict=True):
        for line in lines:
            points = [
                (_measured(s, measure), *_score(s, column, part)) for s in line.systems if column in _has(s, part)
            ]
            _curve(axis, points, line, part, styles[line.label], bars=True)
        axis.set_xlabel(f"{label} (mean over tasks)" if len(part.tasks) > 1 else label)
        axis.set_xlim(left=0)
    _finish(figure, axes, f"{column}, {_unit(part)}")
    return figure


def fidelity(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> Figure | None:
    """Agreement with the full cache and shifts of log-likelihoods against the budget."""
    frame, _ = fidelity_frame(part)
    if frame.empty:
        return None
    column = AVERAGE if (frame["task"] == AVERAGE).any() else str(frame["task"].iloc[0])
    ticks = _ticks(part.systems())
    lines = chosen_lines(part, pair)
    styles = styles_of(lines)
    figure, axes = _panels(list(SHOWN), width=3.4)
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
    _finish(figure, axes, column)
    return figure


FIGURES: dict[str, tuple[str, Callable[[Grid, tuple[str, str]], Figure | None]]] = {
    "budget": ("Accuracy against budget, with 95 % bands", by_budget),
    "factor": ("Accuracy against forgetting factor", by_factor),
    "heatmap": ("Forgetting factor and budget", heat_map),
    "fidelity": ("Closeness to the full cache, with 95 % bands", fidelity),
    "tradeoff": (
        "Accuracy against charged time and kept cache (cells computed together share a pass's time, so that tokens/s is no "
        "speed of a policy by itself: a2sf bench measures that)",
        trade_off,
    ),
}
"""File name -> caption and drawing function."""
LINES = (by_budget, fidelity, trade_off)
"""Those that draw a line for each policy."""


def chosen_lines(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> list[Line]:
    """At most `MOST` lines, the full cache's with them: the pair's, then the best on average, not causal ones last."""
    lines, column = lines_of(part), _columns(part)[-1]
    room = MOST - any(s.is_full for s in part.systems())
    sign = -1 if part.higher_is_better else 1

    def order(line: Line) -> tuple[bool, bool, float]:
        scores = [_score(s, column, part)[0] for s in line.systems if column in _has(s, part)]
        mean = sign * float(np.mean(scores)) if scores else math.inf
        return line.policy not in pair, not line.systems[0].causal, mean

    chosen = {line.label for line in sorted(lines, key=order)[:room]}
    return [line for line in lines if line.label in chosen]


def left_out(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> list[str]:
    """The labels of the lines that `chosen_lines` leaves out."""
    chosen = {line.label for line in chosen_lines(part, pair)}
    return [line.label for line in lines_of(part) if line.label not in chosen]


def lines_of(part: Grid) -> list[Line]:
    """Pruned policies across budgets; of several forgetting factors the best on average, and the label says so."""
    column = _columns(part)[-1]
    by_policy: dict[str, list[System]] = {}
    for s in part.systems():
        if not s.is_full:
            by_policy.setdefault(s.label, []).append(s)
    lines = []
    for label, systems in by_policy.items():
        factors = list(dict.fromkeys(s.factor for s in systems))
        if factors == [DASH]:
            lines.append(Line(label, systems[0].policy, systems))
            continue
        per_factor = {f: [s for s in systems if s.factor == f] for f in factors}
        most = max(map(len, per_factor.values()))
        means = {
            f: np.mean([_score(s, column, part)[0] for s in group if column in _has(s, part)] or [math.nan])
            for f, group in per_factor.items()
            if len(group) == most
        }
        best = (max if part.higher_is_better else min)(means, key=lambda f: means[f])
        more = f", best of {len(factors)}" if len(factors) > 1 else ""
        lines.append(Line(f"{label} (factor {best}{more})", systems[0].policy, per_factor[best]))
    return lines


def _columns(part: Grid) -> list[str]:
    return [*part.tasks, AVERAGE] if len(part.tasks) > 1 else part.tasks


def _has(system: System, part: Grid) -> list[str]:
    whole = [AVERAGE] if set(part.tasks) <= set(system.rows) else []
    return [*system.rows, *whole]


def _score(system: System, column: str, part: Grid) -> tuple[float, float]:
    """Value and standard error, in the metric's own unit."""
    tasks = part.tasks if column == AVERAGE else [column]
    errors = [float(system.rows[t].stderr) for t in tasks]
    return float(np.mean([system.value(t) for t in tasks])), math.sqrt(sum(e**2 for e in errors)) / len(tasks)


def _measured(system: System, measure: str) -> float:
    return float(np.mean([getattr(r, measure) for r in system.rows.values()]))


def _swept(part: Grid) -> list[System]:
    """Systems of the policies that ran with several forgetting factors."""
    with_factor = [s for s in part.systems() if not math.isnan(s.factor_value)]
    counts = pd.Series({(s.policy, s.factor_value): 1 for s in with_factor}, dtype=int)
    several = {p for p, n in counts.groupby(level=0).size().items() if n > 1} if with_factor else set()
    return [s for s in with_factor if s.policy in several]


def _ticks(systems: list[System]) -> dict[str, float]:
    """Budget -> place on the axis: its ratio or its tokens; evenly spaced where both occur."""
    orders = {s.budget: s.budget_order for s in systems if not s.is_full}
    ratios = [order <= 1.0 for order in orders.values()]
    if all(ratios):
        return orders
    return (
        {b: order - 1 for b, order in orders.items()}
        if not any(ratios)
        else {b: float(i) for i, b in enumerate(orders)}
    )


def _budget_axis(axis: Axes, ticks: dict[str, float]) -> None:
    axis.set_xticks(list(ticks.values()), [b.removesuffix(" tokens") for b in ticks])
    in_tokens = all(b.endswith(" tokens") for b in ticks)
    axis.set_xlabel("budget (tokens)" if in_tokens else "budget (share of the sequence)")


def _level(axis: Axes, part: Grid, column: str) -> None:
    """The full cache as a level line with its band."""
    scale = 100 if part.percent else 1
    for s in part.systems():
        if s.is_full and column in _has(s, part):
            value, error = _score(s, column, part)
            axis.axhline(scale * value, color=GREY, ls=(0, (1, 1)), lw=1.5, label=s.label)
            if not math.isnan(error):
                axis.axhspan(scale * (value - Z * error), scale * (value + Z * error), color=GREY, alpha=0.08, lw=0)


def _curve(
    axis: Axes, points: list[tuple[float, float, float]], line: Line, part: Grid, style: Style, bars: bool = False
) -> None:
    if not points:
        return
    scale = 100 if part.percent else 1
    x, value, error = np.array(points).T
    value, half = scale * value, scale * Z * np.nan_to_num(error)
    axis.plot(x, value, color=style.colour, marker=style.marker, ms=5, ls=style.dash, lw=1.5, label=line.label)
    spread(axis, x, value - half, value + half, style.colour, 0.13, bars)


def spread(
    axis: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, alpha: float, bars: bool = False
) -> None:
    """Intervals as a band, or as bars where they are asked for, or where one point has no band."""
    if bars or len(x) == 1:
        axis.vlines(x, low, high, colors=colour, lw=0.8, alpha=0.6)
    else:
        axis.fill_between(x, low, high, color=colour, alpha=alpha, lw=0)


def _panels(titles: list[str], sharey: bool = False, width: float = 2.7) -> tuple[Figure, list[Axes]]:
    columns = min(4, len(titles)) if len(titles) != 5 else 3
    rows = -(-len(titles) // columns)
    size = (max(3.6, width * columns), 2.5 * rows + 0.6)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=sharey, layout="constrained")
    axes = list(grid.flat)
    for empty in axes[len(titles) :]:
        empty.set_visible(False)
    return figure, axes[: len(titles)]


def _finish(figure: Figure, axes: list[Axes], unit: str) -> None:
    """One legend for all panels, below them."""
    figure.supylabel(unit, fontsize=9)
    seen = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=min(len(seen), 3))


def _unit(part: Grid) -> str:
    return f"{part.metric} (%)" if part.percent else part.metric
