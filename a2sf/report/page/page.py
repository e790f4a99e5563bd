"""`report.html`: one self-contained, interactive file per sweep, for a browser without network."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs

from a2sf import atomic
from a2sf.analysis.comparisons.pairs import Comparison
from a2sf.analysis.results.grid import DEFAULT_PAIR, Grid
from a2sf.analysis.results.labels import DASH
from a2sf.analysis.results.variants import MUST_AGREE
from a2sf.report.page.data import chart_data
from a2sf.report.page.documents import browsable
from a2sf.report.page.template import HERE, table_cell, template, text_view
from a2sf.report.tables.cells import differences_of, header, interval, legend, number, reference_rows, sign_of
from a2sf.report.tables.summaries import p_text
from a2sf.report.tables.table import Table
from a2sf.report.tables.text import TextTable
from a2sf.report.traced import Groups
from a2sf.store.runs import finished_cells, is_cell, settings_of

SCORES = ("value", "low", "high", "stderr", "lm_eval_stderr")
SCRIPTS = ("tables.js", "charts.js", "documents.js", "report.js")


@dataclass(frozen=True)
class ReportContents:
    """What goes into a report.

    Attributes:
        text_tables: comparisons, rankings, closeness and sizes.
        fidelity, traces: the frames behind `fidelity.csv` and `traces.csv`.
        groups: the retention traces of documents.
        texts: one row per generated text (`text_frame`).
        notes: one sentence each.
        pair: the policies that are compared.
    """

    grid: Grid
    tables: Sequence[Table]
    comparisons: Sequence[Comparison]
    text_tables: Sequence[TextTable]
    fidelity: pd.DataFrame
    traces: pd.DataFrame
    groups: Groups
    texts: pd.DataFrame = field(default_factory=pd.DataFrame)
    failures: Sequence[dict[str, Any]] = ()
    notes: Sequence[str] = ()
    pair: tuple[str, str] = field(default=DEFAULT_PAIR)


def write_report(target: Path, contents: ReportContents) -> Path:
    """Render the report; the file is written completely or not at all."""
    grid = contents.grid
    frames = contents.fidelity, contents.traces, contents.texts
    charts, systems = chart_data(grid, contents.comparisons, *frames, contents.pair)
    documents = browsable(systems, contents.groups)
    html = template("report.html.j2").render(
        title=", ".join(sorted(grid.frame["source"].unique())),
        plan=_plan(grid),
        provenance=_provenance(grid),
        tables=[_view(table) for table in contents.tables],
        verdict=_verdict(contents.comparisons),
        text_tables=[text_view(table) for table in contents.text_tables],
        failures=contents.failures,
        cells=_cells(grid),
        notes=list(dict.fromkeys([*grid.notes, *contents.notes])),
        style=(HERE / "report.css").read_text(encoding="utf-8"),
        script="".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS),
        library=_plotly(),
        charts=_packed(json.dumps(charts, separators=(",", ":"))),
        documents=_packed(json.dumps(documents, separators=(",", ":"))),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(target, html)
    return target


def _packed(text: str) -> str:
    """gzip, in base64: a browser unpacks it, and a page is a third as large."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


@cache
def _plotly() -> str:
    return _packed(get_plotlyjs())


def read_failures(directories: Sequence[Path]) -> list[dict[str, Any]]:
    """The failures noted in `failures/*.json` of the sweeps; a file that cannot be read is listed as such."""
    found = []
    finished = [settings_of(c.cell) for d in directories if any((d / "failures").glob("*")) for c in finished_cells(d)]
    for file in sorted(f for directory in directories for f in (directory / "failures").glob("*.json")):
        if is_cell(file.parent.parent / file.stem):
            continue  # it finished later
        try:
            noted = json.loads(file.read_text(encoding="utf-8"))
            error = {k: str(noted.get(k, "")) for k in ("error", "traceback", "time")}
            cell = noted.get("cell", file.stem)
            if isinstance(cell, dict) and settings_of(cell) in finished:
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
    plan = {
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
        plan[key.replace("_", " ").capitalize()] = _list(pd.Series(values))
    if "seconds" in frame:
        plan["Compute time"] = f"{frame['seconds'].sum() / 60:.1f} min over all cells"
    return plan


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


def _verdict(comparisons: Sequence[Comparison]) -> str:
    """One sentence on how many differences are significant."""
    if not comparisons or comparisons[0].adjusted is None:
        return ""
    significant = [c for c in comparisons if c.adjusted is not None and c.adjusted.significant]
    better = sum(c.difference.value > 0 for c in significant)
    first, second = comparisons[0].first, comparisons[0].second
    return (
        f"Of {len(comparisons)} comparisons of {first} with {second}, {len(significant)} differ significantly "
        f"(paired test, {comparisons[0].adjusted.correction.label}, α = 0.05): "
        f"{better} with {first} higher, {len(significant) - better} with {second} higher."
    )


def _view(table: Table) -> dict[str, Any]:
    """An accuracy table for the template."""
    words = len(table.heads)
    rows: list[dict[str, Any]] = [
        {"reference": True, "cells": [table_cell(text, "word" if i < words else "") for i, text in enumerate(row)]}
        for row in reference_rows(table)
    ]
    for line in table.rows:
        cells = [table_cell(getattr(line, head), "word") for head in table.heads]
        for column in table.columns:
            entry = line.entries.get(column)
            if entry is None:
                cells.append(table_cell(DASH))
                continue
            text = number(entry.value, table.percent)
            title = f"{text} {interval(entry.low, entry.high, table.percent, signed=False)}, n = {entry.n}"
            title += f", standard error {number(entry.stderr, table.percent)}"
            if entry.test is not None:
                title += f"; p against the best {p_text(entry.test.p)} ({entry.test.correction.label})"
            cells.append(table_cell(text, "best" if entry.best else "", entry.value, title, sign_of(table, entry)))
        values = {table.to_full: line.to_full, table.to_control: line.to_control}
        cells += [table_cell(of(line), value=values.get(head)) for head, of in differences_of(table).items()]
        rows.append({"reference": False, "cells": cells})
    heads = [(head, i < words) for i, head in enumerate(header(table))]
    place = {"model": table.model, "shots": table.shots, "title": table.title}
    return place | {"header": heads, "rows": rows, "legend": legend(table), "notes": table.notes}


def _cells(grid: Grid) -> dict[str, Any]:
    columns = [
        "source",
        "cell",
        "value",
        "low",
        "high",
        "stderr",
        "lm_eval_stderr",
        "n",
        "tokens_per_second",
        "kept_tokens",
    ]
    frame = grid.frame[[c for c in columns if c in grid.frame]].copy()
    for column in frame.columns.intersection([*SCORES, "tokens_per_second", "kept_tokens"]):
        digits = 4 if column in SCORES else 1
        frame[column] = [DASH if pd.isna(v) else f"{v:.{digits}f}" for v in frame[column]]
    frame = frame.astype(str).rename(columns=lambda c: c.replace("_", " "))
    return text_view(TextTable("", frame, "", ("source", "cell")))


def _list(values: pd.Series) -> str:
    return ", ".join(map(str, sorted(values.unique(), key=str)))
