"""Needle results by depth: `needle_table` from finished cells, and a picture of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from a2sf.collect import DASH
from a2sf.errors import UserError
from a2sf.runs import StoredCell

METRIC = "metric/exact_match"
ROW = ["model", "policy", "budget", "factor"]


def needle_table(cells: Iterable[StoredCell], by: str = "depth") -> pd.DataFrame:
    """Share of needles found: one row per model, policy, budget and factor, one column per depth (percent) or length.

    Args:
        cells: finished cells of any tasks; those of the needle task are used.
        by: `depth` or `length`.

    Raises:
        UserError: if there is no needle result among them, or `by` is neither.
    """
    if by not in ("depth", "length"):
        raise UserError(f"needle results come by depth or by length, not by {by!r}")
    frames = [_answers(c) for c in cells if c.cell["task"] == "needle"]
    if not frames:
        raise UserError("there is no result of the needle task among these cells; run one with tasks=needle")
    answers = pd.concat(frames, ignore_index=True)
    table = answers.pivot_table(index=ROW, columns=f"doc/{by}", values=METRIC, aggfunc="mean", sort=True)
    table.columns = [int(c) for c in table.columns]
    return table.rename_axis(columns=by)


def _answers(cell: StoredCell) -> pd.DataFrame:
    about = cell.cell
    budget: dict[str, Any] = about["budget"] or {}
    share, tokens = budget.get("ratio"), budget.get("tokens")
    label = f"{share:g}" if isinstance(share, float) else f"{tokens} tokens" if isinstance(tokens, int) else "per layer"
    factor = about["forgetting_factor"]
    return cell.documents[["doc/depth", "doc/length", METRIC]].assign(
        model=about["model"],
        policy=about["policy_label"],
        budget=label if budget else DASH,
        factor=DASH if factor is None else f"{factor}",
    )


def needle_plot(cells: Iterable[StoredCell], path: Path, by: str = "depth") -> None:
    """Draw `needle_table` as a heat map: how far into the text (or how long a text) each policy and budget still finds.

    Raises:
        UserError: as for `needle_table`.
    """
    from matplotlib.figure import Figure

    table = needle_table(cells, by)
    figure = Figure(figsize=(3.5 + 0.8 * len(table.columns), 1.2 + 0.35 * len(table)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(table.to_numpy(), vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for i, row in enumerate(table.to_numpy()):
        for j, value in enumerate(row):
            axes.text(
                j, i, f"{value:.0%}", ha="center", va="center", color="white" if value < 0.5 else "black", fontsize=8
            )
    unit = "depth of the needle (% of the text)" if by == "depth" else "words of filler"
    axes.set_xticks(range(len(table.columns)), [str(c) for c in table.columns])
    axes.set_yticks(range(len(table)), [" · ".join(p for p in row if p != DASH) for row in table.index])
    axes.set(xlabel=unit, title="Needles found")
    figure.savefig(path, dpi=150)
