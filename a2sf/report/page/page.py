"""`report.html`: one self-contained file per sweep, for a browser without network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from a2sf import atomic
from a2sf.analysis.comparisons.flips import are_counted, flips
from a2sf.analysis.comparisons.pairs import Comparison
from a2sf.analysis.results.grid import DEFAULT_PAIR, Grid
from a2sf.analysis.results.labels import DASH
from a2sf.analysis.results.variants import MUST_AGREE
from a2sf.report.tables.cells import TIED, header, legend, number
from a2sf.report.tables.layout import Table
from a2sf.report.tables.text import TextTable
from a2sf.store.runs import asked, finished_cells, is_cell

FLIPS_SHOWN = 60


@dataclass(frozen=True)
class Contents:
    """What goes into a report.

    Attributes:
        plots: caption -> files, an SVG among them.
        text_tables: comparisons and fidelity.
        notes: one sentence each.
        pair: the policies whose flipped documents are shown.
    """

    grid: Grid
    tables: Sequence[Table]
    comparisons: Sequence[Comparison]
    text_tables: Sequence[TextTable]
    plots: Mapping[str, Sequence[Path]]
    failures: Sequence[dict[str, Any]] = ()
    notes: Sequence[str] = ()
    pair: tuple[str, str] = field(default=DEFAULT_PAIR)


def write_report(target: Path, contents: Contents) -> Path:
    """Render the report; the file is written whole or not at all."""
    environment = Environment(
        loader=PackageLoader("a2sf.report", "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["nats"] = lambda value: number(value, percent=False)
    shown, total = flips(contents.grid, contents.pair, FLIPS_SHOWN)
    html = environment.get_template("report.html.j2").render(
        title=", ".join(sorted(contents.grid.frame["source"].unique())),
        plan=_plan(contents.grid),
        provenance=_provenance(contents.grid),
        tables=[_view(table) for table in contents.tables],
        verdict=_told_apart(contents.comparisons),
        text_tables=contents.text_tables,
        plots={caption: _data_uri(files) for caption, files in contents.plots.items()},
        flips=shown,
        flips_left_out=total - len(shown),
        flips_counted=are_counted(contents.grid),
        metric=contents.grid.metric,
        failures=contents.failures,
        cells=_cells(contents.grid),
        notes=list(dict.fromkeys([*contents.grid.notes, *contents.notes])),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(target, html)
    return target


def read_failures(directories: Sequence[Path]) -> list[dict[str, Any]]:
    """The failures noted in `failures/*.json` of the sweeps; a file that cannot be read is listed as such."""
    found = []
    finished = [asked(c.cell) for d in directories if any((d / "failures").glob("*")) for c in finished_cells(d)]
    for file in sorted(f for directory in directories for f in (directory / "failures").glob("*.json")):
        if is_cell(file.parent.parent / file.stem):
            continue  # it finished later
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            error = {k: str(told.get(k, "")) for k in ("error", "traceback", "time")}
            cell = told.get("cell", file.stem)
            if isinstance(cell, dict) and asked(cell) in finished:
                continue  # with other weights, which a branch has moved to
            name = cell.get("name", json.dumps(cell, sort_keys=True)) if isinstance(cell, dict) else str(cell)
            found.append({"cell": name, **error})
        except (OSError, ValueError, AttributeError) as error:
            found.append({"cell": file.stem, "error": f"cannot be read ({error})", "traceback": "", "time": ""})
    return found


def _plan(grid: Grid) -> dict[str, str]:
    """What was run, in words."""
    frame = grid.frame
    documents = frame.groupby("task")["n"].max()
    pruned = frame[~frame["is_full"]]
    told = {
        "Models": _list(frame["model"]),
        "Policies": _list(frame["label"]),
        "Budgets": ", ".join(pruned.sort_values("budget_order")["budget"].unique()) or DASH,
        "Forgetting factors": ", ".join(frame[frame["factor"] != DASH].sort_values("factor_value")["factor"].unique())
        or DASH,
        "Schedules": ", ".join(grid.schedules) or DASH,
        "Tasks (documents)": ", ".join(f"{task} ({n})" for task, n in documents.items()),
        "Shots": _list(frame["shots"]),
        "Metric": grid.metric,
        "Cells": str(len(frame)),
    }
    for key in MUST_AGREE:
        values = ["all" if key == "limit" and pd.isna(v) else DASH if pd.isna(v) else v for v in frame[key]]
        told[key.replace("_", " ").capitalize()] = _list(pd.Series(values))
    if "seconds" in frame:
        told["Compute time"] = f"{frame['seconds'].sum() / 60:.1f} min over all cells"
    return told


def _provenance(grid: Grid) -> dict[str, str]:
    """Every provenance key; where cells differ, all that was met."""
    met: dict[str, list[str]] = {}
    for cell in grid.cells.values():
        flat = pd.json_normalize(cell.result.get("provenance") or {}).to_dict("records")
        for key, value in (flat[0] if flat else {}).items():
            seen = met.setdefault(str(key), [])
            if str(value) not in seen:
                seen.append(str(value))
    return {
        key: "; ".join(values[:3]) + (f"; and {len(values) - 3} more" if len(values) > 3 else "")
        for key, values in met.items()
    }


def _told_apart(comparisons: Sequence[Comparison]) -> str:
    """One sentence on how many differences the tests told apart."""
    if not comparisons:
        return ""
    apart = [c for c in comparisons if c.p_holm is not None and c.p_holm <= 0.05]
    better = sum(c.difference.value > 0 for c in apart)
    first, second = comparisons[0].first, comparisons[0].second
    return (
        f"Of {len(comparisons)} comparisons of {first} with {second}, {len(apart)} differ significantly (α = 0.05) after "
        f"Holm's correction: {better} with {first} higher, {len(apart) - better} with {second} higher."
    )


def _view(table: Table) -> dict[str, Any]:
    """A table for the template: texts, and the values that sorting and tooltips need."""
    rows = []
    for row in table.rows:
        cells: list[dict[str, Any]] = [{"text": getattr(row, head), "word": True} for head in table.heads]
        for column in table.columns:
            entry = row.entries.get(column)
            if entry is None:
                cells.append({"text": DASH})
                continue
            text, mark = number(entry.value, table.percent), TIED if entry.tied else ""
            title = f"{number(entry.value, table.percent)} ± {number(entry.stderr, table.percent)}, n = {entry.n}"
            cells.append({"text": text, "value": entry.value, "best": entry.best, "title": title, "mark": mark})
        for head, value in ((table.to_full, row.to_full), (table.to_control, row.to_control)):
            if head:
                cells.append({"text": number(value, table.percent, signed=True), "value": value})
        rows.append(cells)
    return {
        "title": table.title,
        "header": header(table),
        "words": len(table.heads),
        "rows": rows,
        "legend": legend(table),
        "notes": table.notes,
    }


def _cells(grid: Grid) -> pd.DataFrame:
    columns = ["source", "cell", "value", "stderr", "n", "tokens_per_second", "kept_tokens"]
    frame = grid.frame[[c for c in columns if c in grid.frame]].copy()
    for column in frame.columns.intersection(["value", "stderr", "tokens_per_second", "kept_tokens"]):
        digits = 4 if column in ("value", "stderr") else 1
        frame[column] = [DASH if pd.isna(v) else f"{v:.{digits}f}" for v in frame[column]]
    return frame.astype(str)


def _data_uri(files: Sequence[Path]) -> str:
    svg = next(f for f in files if f.suffix == ".svg")
    return "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()


def _list(values: pd.Series) -> str:
    return ", ".join(map(str, sorted(values.unique(), key=str)))
