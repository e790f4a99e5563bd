"""Needle results by depth and by length of the text: as data, as tables of text, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from a2sf.analysis.results.documents import documents_of, texts_of
from a2sf.analysis.results.gather import grid_of
from a2sf.analysis.results.grid import Grid
from a2sf.analysis.results.labels import DASH
from a2sf.analysis.statistics.intervals import Estimate, of_documents
from a2sf.errors import UserError
from a2sf.report.plots.style import save
from a2sf.report.tables.cells import interval, number
from a2sf.report.tables.text import TextTable
from a2sf.store.runs import StoredCell

TASK, METRIC = "needle", "metric/exact_match"
ROW = ["model", "shots", "policy", "budget", "factor"]
UNITS = {"depth": "depth of the needle (% of the text)", "length": "words of filler"}


def needle_table(cells: Sequence[StoredCell] | Grid, by: str = "depth") -> pd.DataFrame:
    """Share of needles found: one row per model, shots, policy, budget and factor, one column per depth (%) or length.

    Args:
        cells: finished cells of any tasks, or a grid of them; those of the needle task are used.
        by: `depth` or `length`.

    Raises:
        UserError: if there is no needle result among them, or `by` is neither.
    """
    return _table(cells, by, lambda answers: float(answers[METRIC].mean()))


def needle_estimates(cells: Sequence[StoredCell] | Grid, by: str = "depth") -> pd.DataFrame:
    """The same with the error and the interval of each share (`Estimate`); arguments and errors as for `needle_table`."""
    return _table(cells, by, lambda answers: of_documents(answers[METRIC].to_numpy(float), texts_of(answers)))


def _table(cells: Sequence[StoredCell] | Grid, by: str, measure: Callable[[pd.DataFrame], Any]) -> pd.DataFrame:
    if by not in UNITS:
        raise UserError(f"needle results come by depth or by length, not by {by!r}")
    grid: Grid | None
    if isinstance(cells, Grid):
        grid = cells
    else:
        found = [c for c in cells if c.cell["task"] == TASK]
        grid = grid_of(found) if found else None
    rows: dict[tuple[Any, ...], dict[int, Any]] = {}
    for model, shots, part in grid.by_model() if grid else ():
        for s in part.systems():
            if s.keys.get(TASK) in part.cells:
                answers = documents_of(part.cells[s.keys[TASK]]).groupby(f"doc/{by}")
                place = (model, shots, s.label, s.budget, s.factor)
                rows[place] = {int(float(str(value))): measure(of_value) for value, of_value in answers}
    if not rows:
        raise UserError("there is no result of the needle task among these cells; run one with tasks=needle")
    index = pd.MultiIndex.from_tuples(rows, names=ROW)
    return pd.DataFrame(list(rows.values()), index=index).sort_index(axis=1).rename_axis(columns=by)


def needle_figure(cells: Sequence[StoredCell] | Grid) -> Figure:
    """Heat maps of how far into a text, and in how long a text, each policy and budget still finds the needle.

    Below each share is its 95 % interval.

    Raises:
        UserError: as for `needle_table`.
    """
    tables = {by: needle_estimates(cells, by) for by in UNITS}
    columns = [len(t.columns) for t in tables.values()]
    first = tables["depth"]
    figure = Figure(figsize=(2.2 + 0.75 * sum(columns), 1.2 + 0.42 * len(first)), layout="constrained")
    panels = figure.subplots(1, len(tables), sharey=True, width_ratios=columns)
    for axes, (by, table) in zip(panels, tables.items(), strict=True):
        axes.grid(False)
        shares = table.map(lambda e: e.value if isinstance(e, Estimate) else math.nan).to_numpy(float)
        axes.imshow(shares, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for i, row in enumerate(table.to_numpy()):
            for j, found in enumerate(row):
                if isinstance(found, Estimate):
                    ink = "white" if found.value < 0.5 else "black"
                    text = f"{found.value:.0%}\n{100 * found.low:.0f} to {100 * found.high:.0f}"
                    axes.text(j, i, text, ha="center", va="center", color=ink, fontsize=7)
        axes.set_xticks(range(len(table.columns)), [str(c) for c in table.columns])
        axes.set_xlabel(UNITS[by])
    names = [n for n in ROW if n not in ("model", "shots") or first.index.get_level_values(n).nunique() > 1]
    labels = first.index.to_frame()[names].to_numpy()
    panels[0].set_yticks(range(len(first)), [", ".join(str(p) for p in row if p != DASH) for row in labels])
    return figure


def needle_plot(cells: Sequence[StoredCell] | Grid, path: Path) -> None:
    """Draw `needle_figure` into a file.

    Raises:
        UserError: as for `needle_table`.
    """
    needle_figure(cells).savefig(path, dpi=150)


def needle_tables(grid: Grid) -> list[TextTable]:
    """By depth and by length, for each model and number of shots that has needle results."""
    tables = []
    for where, part in _parts(grid):
        documents = max(part.frame.loc[part.frame["task"] == TASK, "n"])
        for by, unit in UNITS.items():
            frame = needle_estimates(part, by)
            shares = frame.map(_written).rename(columns=str)
            rows = frame.index.to_frame(index=False)[["policy", "budget", "factor"]].rename(columns=str.capitalize)
            legend = f"Share of {documents} documents whose code was found (%), by {unit}, with 95 % intervals."
            title = f"Needles found by {by}: {where}"
            tables.append(TextTable(title, pd.concat([rows, shares.reset_index(drop=True)], axis=1), legend))
    return tables


def needle_plots(grid: Grid, directory: Path) -> list[Path]:
    """The PNG and SVG files written, for each model and number of shots that has needle results."""
    figures = [needle_figure(part) for _, part in _parts(grid)]
    stems = ["needle"] if len(figures) == 1 else [f"needle-{i}" for i in range(len(figures))]
    return [f for figure, stem in zip(figures, stems, strict=True) for f in save(figure, directory / stem)]


def _written(found: Any) -> str:
    if not isinstance(found, Estimate):
        return DASH
    return f"{number(found.value, percent=True)} {interval(found.low, found.high, percent=True, signed=False)}"


def _parts(grid: Grid) -> Iterator[tuple[str, Grid]]:
    for model, shots, part in grid.by_model():
        if any(TASK in s.keys and s.keys[TASK] in part.cells for s in part.systems()):
            yield f"{model}, {shots}-shot", part
