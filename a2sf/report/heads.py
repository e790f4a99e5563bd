"""Numbers of each layer, or each layer and head, as pictures."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

from a2sf.report.plots.style import Line, styles_of


def heads_figure(
    numbers: np.ndarray, title: str, unit: str, marked: Iterable[tuple[int, int]] = (), group: int = 1
) -> Figure:
    """A heat map of `numbers` [layers, heads], layers from top to bottom.

    Args:
        unit: what a number is, beside the colours.
        marked: `[layer, head]` pairs to frame: in groups of `group` heads where that is above 1.
        group: query heads of each key/value head, separated by a line.
    """
    layers, heads = numbers.shape
    figure = Figure(figsize=(2.2 + 0.24 * heads, 1.4 + 0.17 * layers), layout="constrained")
    axes = figure.subplots()
    axes.grid(False)
    shown = axes.imshow(numbers, vmin=0, vmax=max(float(numbers.max()), 1e-9), cmap="cividis", aspect="auto")
    for head in range(group, heads, group) if group > 1 else ():
        axes.axvline(head - 0.5, color="white", linewidth=1)
    for layer, head in marked:
        corner = (head * group - 0.5, layer - 0.5)
        axes.add_patch(Rectangle(corner, group, 1, fill=False, edgecolor="#d62728", linewidth=1.3, clip_on=False))
    step = 1 if layers <= 16 else 5 if layers <= 60 else 10
    axes.set_yticks(range(0, layers, step))
    axes.set_xticks(range(heads) if heads <= 16 else range(0, heads, 4))
    axes.tick_params(length=0)
    axes.set_xlabel("query head" + (f" ({group} to each key/value head)" if group > 1 else ""))
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=axes, label=unit, shrink=0.8)
    return figure


def errors_figure(frame: pd.DataFrame, labels: dict[str, str] | None = None, over: str | None = None) -> Figure:
    """Error by layer, a line for each policy and a panel for each budget.

    Args:
        frame: columns `policy`, `budget`, `layer`, `error`, as `a2sf layer-errors` writes them.
        labels: how the legend spells a policy.
        over: a policy whose errors the others are divided by, for lines that lie close together.
    """
    if over is not None:
        base = frame[frame["policy"] == over].set_index(["budget", "layer"])["error"]
        by = base.loc[list(zip(frame["budget"], frame["layer"], strict=True))].to_numpy()
        frame = frame.assign(error=frame["error"] / by)
    budgets = list(dict.fromkeys(frame["budget"]))
    figure = Figure(figsize=(1.2 + 3.6 * len(budgets), 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(budgets), sharey=True))
    names = list(dict.fromkeys(frame["policy"]))
    lines = [Line((labels or {}).get(n, n), n.partition(",")[0], []) for n in names]
    styles = styles_of(lines)
    for axis, budget in zip(panels, budgets, strict=True):
        for name, line in zip(names, lines, strict=True):
            rows = frame[(frame["policy"] == name) & (frame["budget"] == budget)]
            style = styles[line.label]
            axis.plot(
                rows["layer"],
                rows["error"],
                color=style.colour,
                marker=style.marker,
                ms=3,
                ls=style.dash,
                label=line.label,
            )
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")  # powers of ten need the mathematics that `plots` switches off
        axis.minorticks_off()
        axis.set_title(f"budget {budget:g}")
        axis.set_xlabel("layer")
    label = "relative squared error"
    panels[0].set_ylabel(label if over is None else f"{label}, over that of {(labels or {}).get(over, over)}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
