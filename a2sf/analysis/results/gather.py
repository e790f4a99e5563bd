"""Sweeps read from disk into one grid, which tables, plots and reports show.

Directories of cells give everything; a directory with only a `results.csv` gives the numbers without the documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from a2sf.analysis.results.directions import LOWER, direction
from a2sf.analysis.results.grid import STEP, Grid
from a2sf.analysis.results.labels import DASH, budget_label, factor_label, first_number, settings_label
from a2sf.analysis.results.limits import drop_smaller
from a2sf.analysis.results.selection import Selection, select
from a2sf.analysis.results.variants import MUST_AGREE, drop_outdated, rest_of_identity
from a2sf.errors import UserError
from a2sf.store.aggregates import LM_EVAL_STDERR, MEMBERS, OPTIONS, TaskGroup
from a2sf.store.archive import groups_of, is_archive, read_sweep
from a2sf.store.runs import COMPUTED_WITH, TABLE, StoredCell, id_of, is_cell, name_of, results_frame

OPTIONAL_COLUMNS = [
    *(LM_EVAL_STDERR, "forgetting_factor", "budget_tokens", "budget_base", "policy_settings", *MUST_AGREE),
    *("tokens_per_second", "kept_tokens", "cache_share", "cache_share_max", "cell", "cell_id", "model_path", "weights"),
    *("schedule", "causal", "data_settings", "rest", *OPTIONS, *COMPUTED_WITH),
]


def gather(directories: Sequence[Path], selection: Selection | None = None) -> Grid:
    """Read sweeps and keep what is selected, of one metric.

    Raises:
        UserError: if a directory is missing or empty, nothing matches, or the cells should not be mixed.
    """
    return next(gather_metrics(directories, selection))


def gather_metrics(directories: Sequence[Path], selection: Selection | None = None) -> Iterator[Grid]:
    """As `gather`; if no metric is selected, a further grid for the tasks that have others, until each task is in one."""
    selection = selection or Selection()
    frames: list[pd.DataFrame] = []
    cells: dict[str, StoredCell] = {}
    notes: list[str] = []
    groups: list[TaskGroup] = []
    for directory in directories:
        if not is_archive(directory) and (directory / TABLE).is_file() and not any(map(is_cell, directory.iterdir())):
            frames.append(_from_csv(directory))
            notes.append(
                f"{directory} holds only a {TABLE}: paired tests need the per-document files, so there are none."
            )
            continue
        groups += groups_of(directory)
        stored = drop_outdated(list(read_sweep(directory)), notes)
        if not (selection.limits or selection.mixed):
            stored = drop_smaller(stored, notes)
        frame = _from_cells(stored, name_of(directory))
        frames.append(frame)
        cells |= {f"{name_of(directory)}/{name_of(c.path)}": c for c in stored}
    yield from select(pd.concat(frames, ignore_index=True), cells, selection, notes, groups)


def grid_of(cells: Sequence[StoredCell], selection: Selection | None = None) -> Grid:
    """As `gather`, for cells already read."""
    return next(grids_of(cells, selection))


def grids_of(
    cells: Sequence[StoredCell], selection: Selection | None = None, groups: Sequence[TaskGroup] = ()
) -> Iterator[Grid]:
    """As `gather_metrics`, for cells already read."""
    if not cells:
        raise UserError("There is no finished cell to show.")
    keyed = {f"{name_of(c.path.parent)}/{name_of(c.path)}": c for c in cells}
    frame = _from_cells(list(cells), None)
    yield from select(frame, keyed, selection or Selection(), [], groups)


def _from_cells(cells: Sequence[StoredCell], source: str | None) -> pd.DataFrame:
    frame = results_frame(cells)
    more = []
    for stored in cells:
        timing = stored.result["timing"]
        common = {
            "source": source or name_of(stored.path.parent),
            "cell": name_of(stored.path),
            "label": stored.cell.get("policy_label") or stored.cell["policy"],
            "cell_id": id_of(stored.cell),
            "causal": stored.cell.get("policy_causal", True),
            "rest": rest_of_identity(stored.cell),
            "kept_tokens": timing.get("kept_tokens_mean"),
            "cache_share": timing.get("cache_share"),
            "cache_share_max": timing.get("cache_share_max"),
        }
        more += [common | {"metric": name, **direction(name, m)} for name, m in stored.metrics.items()]
    extra = pd.DataFrame(more, columns=None if more else ["source", "cell", "metric"])
    return _tidy(frame.merge(extra, on=["cell", "metric"], how="left", validate="1:1"))


def _from_csv(directory: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(directory / TABLE, dtype={"forgetting_factor": object, "budget_ratio": object})
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / TABLE} cannot be read ({error}).") from error
    needed = {"model", "policy", "budget_ratio", "shots", "task", "metric", "value", "n"}
    if missing := needed - set(frame.columns):
        raise UserError(f"{directory / TABLE} lacks the column {', '.join(sorted(missing))}.")
    if frame.empty:
        raise UserError(f"{directory / TABLE} holds no row; run `a2sf run` with that sweep first.")
    if LM_EVAL_STDERR not in frame:  # an older table has it as `stderr`
        frame = frame.rename(columns={"stderr": LM_EVAL_STDERR})
    if MEMBERS in frame:  # a group's score, of cells that are here, too
        frame = frame[frame[MEMBERS].isna()].copy()
    frame["budget_ratio"] = [_number_or_text(v) for v in frame["budget_ratio"]]
    frame["label"], frame["source"] = frame["policy"], name_of(directory)
    frame["higher_is_better"] = ~frame["metric"].str.contains(LOWER)
    return _tidy(frame)


def _tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """Add what tables sort and group by."""
    for column in OPTIONAL_COLUMNS:
        if column not in frame:
            frame[column] = None
    # files of published numbers have no base; there a ratio of 1 is the full cache
    at_full_ratio = np.array([first_number(r) >= 1.0 for r in frame["budget_ratio"]])
    frame["is_full"] = at_full_ratio & frame["budget_base"].isna() & frame["budget_tokens"].isna()
    budgets = frame[["is_full", "budget_ratio", "budget_tokens", "budget_base"]]
    labelled = [budget_label(*row) for row in budgets.itertuples(index=False)]
    frame["budget"], frame["budget_order"] = ([pair[i] for pair in labelled] for i in (0, 1))
    frame["factor"] = [factor_label(v) for v in frame["forgetting_factor"]]
    frame["factor_value"] = pd.to_numeric(frame["forgetting_factor"], errors="coerce")
    frame["settings"] = [settings_label(s) for s in frame["policy_settings"]]
    frame["schedule"] = frame["schedule"].fillna("").astype(str).replace("", STEP).mask(frame["is_full"], DASH)
    frame["causal"] = ~frame["causal"].isin([False])
    frame[LM_EVAL_STDERR] = pd.to_numeric(frame[LM_EVAL_STDERR], errors="coerce")
    frame["key"] = frame["source"] + "/" + frame["cell"].fillna("").astype(str)
    frame["variant"] = ""
    if "direction_known" not in frame:
        frame["direction_known"] = True
    frame["data_settings"] = frame["data_settings"].fillna("{}").astype(str).replace("", "{}")
    frame["rest"] = frame["rest"].fillna("{}")
    return frame


def _number_or_text(value: Any) -> Any:
    try:
        return float(value)
    except ValueError:
        return value
