"""How plots look: a colour, marker and dash for each policy, and the files that are written.

Colour-blind readers can distinguish the colours; markers and dashes distinguish lines in grey print.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from a2sf.analysis.results.grid import SystemResults
from a2sf.policies.find import built_in

# Okabe and Ito, 2008, "Color universal design"; black is the full cache's, the pale yellow is left out
COLOURS = ("#D55E00", "#000000", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00")
MARKERS = "osD^vPX<>ph"
Dash: TypeAlias = str | tuple[int, tuple[float, ...]]
"""A line style of matplotlib: a name, or an offset and the lengths of strokes and gaps."""
LONG_DASH: Dash = (0, (9.0, 3.0))
DASHES: tuple[Dash, ...] = ("-", "--", ":", "-.", LONG_DASH)
MOST = 8
"""Lines in one panel, the full cache's among them."""
GREY = "0.35"
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
    systems: list[SystemResults]


@dataclass(frozen=True)
class Style:
    """How a policy is drawn, everywhere; its second line in a picture differs in `dash`."""

    colour: str
    marker: str
    dash: Dash


def style_of(policy: str) -> Style:
    """The same policy gets the same style in every picture, whatever else is in it."""
    order = sorted(built_in())
    index = order.index(policy) if policy in order else len(order) + zlib.crc32(policy.encode())
    # 7 colours and 11 markers make 77 pairs; what has the colour of another has another dash, too
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    return Style(colour, marker, DASHES[index // len(COLOURS) % len(DASHES)])


def styles_of(lines: Sequence[Line]) -> dict[str, Style]:
    """Label -> style, all different: lines of one policy share its colour and marker, and differ in dashes."""
    styles: dict[str, Style] = {}
    for line in lines:
        style = style_of(line.policy)
        start = DASHES.index(style.dash)
        turned = [replace(style, dash=DASHES[(start + i) % len(DASHES)]) for i in range(len(DASHES))]
        turned += [replace(t, marker=m) for m in MARKERS for t in turned]
        styles[line.label] = next(t for t in turned if t not in styles.values())
    return styles


def panels(
    number: int,
    each: tuple[float, float],
    around: tuple[float, float],
    *,
    columns: int = 4,
    least: float = 0.0,
    **share: bool,
) -> tuple[Figure, list[Axes]]:
    """A figure with `number` panels, row by row.

    Args:
        each: width and height of a panel, in inches.
        around: what is added to the width and height of them all.
        columns: panels side by side, at most.
        least: the smallest width of the figure.
        share: `sharex`, `sharey`, as for `pyplot.subplots`.
    """
    columns = min(columns, number)
    rows = -(-number // columns)
    size = (max(least, each[0] * columns + around[0]), each[1] * rows + around[1])
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **share)
    for unused in grid.flat[number:]:
        unused.set_visible(False)
    return figure, list(grid.flat[:number])


def shared_legend(figure: Figure, columns: int = 3, **text: float) -> None:
    """One legend for all panels, below them; each label once."""
    seen = {
        label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=min(len(seen), columns), **text)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg`."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, bbox_inches="tight", metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
    return files


def spread(
    axis: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, alpha: float, bars: bool = False
) -> None:
    """Intervals as a band; as bars where `bars` is set or there is only one point."""
    if bars or len(x) == 1:
        axis.vlines(x, low, high, colors=colour, lw=0.8, alpha=0.6)
    else:
        axis.fill_between(x, low, high, color=colour, alpha=alpha, lw=0)
