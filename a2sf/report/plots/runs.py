"""Plots of a comparison of finished runs: each run's differences from the first, with their intervals."""

from __future__ import annotations

from pathlib import Path

from a2sf.analysis.comparisons.runs import ComparedRuns
from a2sf.analysis.results.labels import MINUS
from a2sf.analysis.statistics.families import span
from a2sf.report.plots.style import GREY, panels, save

COLUMNS = 4
"""Panels side by side."""
MOST = 24
"""Runs of a figure."""


def difference_plots(made: ComparedRuns, directory: Path) -> list[Path]:
    """`differences.png` and `.svg`: a panel for each task and the average, in it a line for each run."""
    scale = 100 if made.percent else 1
    runs = list(dict.fromkeys(r.run for r in made.rows))
    tasks = list(dict.fromkeys(r.task for r in made.rows))
    shown = runs[:MOST]
    figure, axes = panels(
        len(tasks), (2.2, 0.27 * len(shown) + 0.75), (1.8, 0.5), columns=COLUMNS, sharex=made.percent, sharey=True
    )
    for axis, task in zip(axes, tasks, strict=True):
        axis.axvline(0, color=GREY, lw=1)
        axis.grid(axis="y", visible=False)
        axis.set_title(task)
        axis.tick_params(labelbottom=True)
        for r in made.rows:
            if r.task == task and r.run in shown:
                d, y = r.difference, -shown.index(r.run)
                axis.hlines(y, scale * d.low, scale * d.high, colors="black", lw=1.2)
                axis.plot([scale * d.value], [y], marker="s", color="black", ms=4.5, ls="")
    axes[0].set_yticks([-i for i in range(len(shown))], shown)
    axes[0].set_ylim(0.7 - len(shown), 0.7)
    metrics = ", ".join(dict.fromkeys(made.metrics.values()))
    figure.supxlabel(f"difference in {metrics}{' (points)' if made.percent else ''}", fontsize=9)
    what = f"each run {MINUS} {made.reference}"
    what += f", the first {MOST} of {len(runs)}" if len(runs) > MOST else ""
    below = f"n = {span([r.difference.n for r in made.rows])} documents; intervals: 95 %, of each comparison by itself"
    figure.suptitle(f"{what}\n{below}", x=0.01, ha="left", fontsize=10)
    return save(figure, directory / "differences")
