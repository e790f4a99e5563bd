"""How plots look: a colour, marker and dash for each policy, and the files that are written.

Colour-blind readers can distinguish the colours; markers and dashes distinguish lines in grey print, and what has the
colour of another.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from a2sf.analysis.results.grid import DEFAULT_PAIR, SystemResults
from a2sf.policies.find import built_in

# Okabe and Ito, 2008, "Color universal design"; black is the full cache's, the pale yellow is left out
OKABE_ITO = ("#D55E00", "#000000", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00")
# Paul Tol's schemes (muted, light, dark, medium contrast, rainbow), each the one that differs most from those before it
TOL = ("#332288", "#90C987", "#FFAABB", "#994F88", "#117733", "#663333", "#999933", "#88CCEE", "#004488", "#44BB99")
COLOURS = (*OKABE_ITO, *TOL, "#4EB265", "#CAACCB", "#EE8866")
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
    """How a policy is drawn in a report; its second line in a picture differs in `dash`."""

    colour: str
    marker: str
    dash: Dash


def own_style(policy: str) -> Style:
    """How a policy is drawn whose colour no other of the report has; its marker and dash are always these."""
    order = sorted(built_in())
    index = order.index(policy) if policy in order else len(order) + zlib.crc32(policy.encode())
    colour, marker = OKABE_ITO[index % len(OKABE_ITO)], MARKERS[index % len(MARKERS)]
    return Style(colour, marker, DASHES[index // len(OKABE_ITO) % len(DASHES)])


def policy_styles(policies: Iterable[str]) -> dict[str, Style]:
    """The style of each policy of a report, all different, the same for the same policies.

    Each has a colour of its own as long as there are enough: that of `own_style`, or the next that is free. Policies beyond
    these share one with a policy of another marker, and of another dash where possible. The usual pair chooses first, and
    its colours are shared last.
    """
    order = sorted(set(policies), key=lambda p: (p not in DEFAULT_PAIR, p))
    found: dict[str, Style] = {}
    for policy in order:
        own = own_style(policy)
        if all(own.colour != s.colour for s in found.values()):
            found[policy] = own
    for policy in order:
        if policy not in found:
            found[policy] = _free_style(own_style(policy), found)
    return found


def _free_style(own: Style, found: dict[str, Style]) -> Style:
    """`own` in the colour that fewest have, and with the next marker where another has both."""
    taken = list(found.values())
    uses = Counter(s.colour for s in taken)
    marked, dashed = {(s.colour, s.marker) for s in taken}, {(s.colour, s.dash) for s in taken}
    of_pair = {found[p].colour for p in DEFAULT_PAIR if p in found}
    colours = sorted(COLOURS, key=lambda c: (uses[c], (c, own.dash) in dashed, c in of_pair))
    start = MARKERS.index(own.marker)
    free = ((c, m) for m in MARKERS[start:] + MARKERS[:start] for c in colours if (c, m) not in marked)
    colour, marker = next(free, (colours[0], own.marker))
    return replace(own, colour=colour, marker=marker)


def styles_of(lines: Sequence[Line], policies: Iterable[str] = ()) -> dict[str, Style]:
    """Label -> style, all different: lines of one policy share its colour and marker, and differ in dashes.

    Args:
        policies: those of the report, in whose other plots a policy looks the same.
    """
    of_policy = policy_styles([*policies, *(line.policy for line in lines)])
    styles: dict[str, Style] = {}
    for line in lines:
        style = of_policy[line.policy]
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
