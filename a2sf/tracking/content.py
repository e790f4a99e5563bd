"""The contents for trackers: columns and metrics of a cell, table and pictures of a sweep."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from a2sf.store.aggregates import LM_EVAL_STDERR
from a2sf.store.runs import StoredCell, results_frame

MEASURED = ("metric", "value", LM_EVAL_STDERR, "n", "seconds", "tokens_per_second", "policy_settings", "cell")
"""Columns of `results.csv` that are results, or that trackers get in another form."""


@dataclass(frozen=True)
class CellRun:
    """A finished cell as trackers show it.

    Attributes:
        name: of the cell.
        columns: values to filter by (model, policy, budget_ratio, schedule, task, shots, ...), as numbers or text; None:
            no value. Names are those of `results.csv`, and `policy_<setting>` for the policy's other settings.
        metrics: `acc/<task>/<shots>shot`, its `acc_stderr/...`, speed.
        cell: the `cell` entry of `result.json`.
        baseline: whether it is the full cache, with which the others are compared.
    """

    name: str
    columns: dict[str, str | int | float | bool | None]
    metrics: dict[str, float]
    cell: dict[str, Any]
    baseline: bool


@dataclass(frozen=True)
class Summary:
    """A sweep's summary for trackers: a table with a row per cell and metric, and files of plots by name."""

    table: pd.DataFrame
    pictures: Mapping[str, Path]


class Destination(Protocol):
    """A tracker. Errors of its methods become notes to the user; after repeated errors the tracker is not used any more.

    Attributes:
        label: its name.
    """

    label: str

    @property
    def marks(self) -> Path | None:
        """The file that records what was logged; None: nothing is really logged."""
        ...

    @property
    def note(self) -> str | None:
        """One line for the screen that says where the results are."""
        ...

    def log_cell(self, run: CellRun) -> None:
        """Log a cell; if it was logged before, the new results replace or continue the earlier ones."""
        ...

    def log_summary(self, summary: Summary) -> None:
        """Log the summary of a sweep."""
        ...


def of_cell(stored: StoredCell, sweep: str) -> CellRun:
    """The contents of a finished cell of `sweep`."""
    cell, timing = stored.cell, stored.result["timing"]
    baseline = cell["budget"] is None
    row = results_frame([stored]).iloc[0].to_dict() if stored.metrics else {}
    columns = {str(name): _plain(value) for name, value in row.items() if name not in MEASURED}
    for name, value in cell["policy_settings"].items():
        if name not in columns:
            columns[f"policy_{name}"] = _plain(value)
    columns["schedule"] = cell.get("schedule") or "step"  # it is empty in the table
    columns |= {"documents": stored.result["documents"]["n"], "sweep": sweep, "baseline": baseline}
    where = f"{cell['task']}/{cell['shots']}shot"
    found = {f"{name}/{where}": m["value"] for name, m in stored.metrics.items()}
    found |= {f"{name}_stderr/{where}": m["stderr"] for name, m in stored.metrics.items()}
    found |= {key: timing[key] for key in ("tokens_per_second", "seconds", "cache_share")}
    metrics = {name: float(value) for name, value in found.items() if value is not None}
    return CellRun(stored.path.name, columns, metrics, cell, baseline)


def of_sweep(table: pd.DataFrame, pictures: Mapping[str, Path]) -> Summary:
    """The contents of a sweep's `results_frame`, with the full cache marked as the baseline."""
    shown = one_type_per_column(table)
    if "budget_base" in table:
        shown.insert(0, "baseline", ["yes" if none else "" for none in table["budget_base"].isna()])
    return Summary(shown, pictures)


def one_type_per_column(table: pd.DataFrame) -> pd.DataFrame:
    """The table with only numbers or only text in each column, except missing values, as W&B requires."""
    columns = {}
    for name in table:
        column = table[name]
        present = column[column.notna()]
        numbers = all(isinstance(v, Real) and not isinstance(v, bool) for v in present)
        written = present.astype(float) if numbers else present.map(str)
        columns[name] = written.astype(object).reindex(column.index).where(column.notna(), None)
    return pd.DataFrame(columns, index=table.index)


def _plain(value: Any) -> str | int | float | bool | None:
    """A value for a column: numbers of Python, lists as text, None for NaN."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and math.isnan(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value, sort_keys=True)
