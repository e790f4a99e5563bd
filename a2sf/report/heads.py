"""A number for each layer and head as a picture."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def heads_figure(
    numbers: np.ndarray, title: str, unit: str, marked: Iterable[tuple[int, int]] = (), group: int = 1
) -> Figure:
    """A heat map of `numbers` [layers, heads], layers from top to bottom.

    Args:
        unit: what a number is, beside the colours.
        marked: `[layer, head]` pairs to frame: in groups of `group` heads where that is above 1.
        group: query heads of each key/value head, told apart by a line.
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
