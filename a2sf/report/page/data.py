"""The numbers behind the report's charts, for the page's script: every system's results with intervals."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd

from a2sf.analysis.comparisons.fidelity import MEASURES
from a2sf.analysis.comparisons.pairs import Comparison
from a2sf.analysis.results.chance import chance_levels
from a2sf.analysis.results.grid import AVERAGE, Grid, SystemResults
from a2sf.analysis.results.labels import DASH, budget_axis
from a2sf.analysis.statistics.intervals import Estimate
from a2sf.errors import UserError
from a2sf.report.lengths import length_points
from a2sf.report.needle import UNITS, needle_estimates
from a2sf.report.page.documents import Place
from a2sf.report.plots.lines import available_columns, chosen_lines, estimated, score_columns
from a2sf.report.plots.style import LONG_DASH, Line, styles_of

SYMBOLS = dict(
    zip(
        "osD^vPX<>ph",
        (
            *("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x"),
            *("triangle-left", "triangle-right", "pentagon", "hexagon"),
        ),
        strict=True,
    )
)
"""Matplotlib's marker -> plotly's symbol."""
QUANTILES = 100
"""Steps of a distribution of lengths."""
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot", LONG_DASH: "longdash"}
FULL = {"colour": "#595959", "symbol": "star", "dash": "dot"}


def chart_data(
    grid: Grid,
    comparisons: Sequence[Comparison],
    fidelity: pd.DataFrame,
    traces: pd.DataFrame,
    texts: pd.DataFrame,
    pair: tuple[str, str],
) -> tuple[dict[str, Any], list[Place]]:
    """Everything that the charts show, and the systems in the order of their numbers in it.

    Args:
        comparisons, fidelity, traces: of the grid, as `compare_pair`, `fidelity_frame` and `trace_frame` return them.
        texts: one row per generated text, as `text_frame` returns them.

    Returns:
        A dictionary for JSON (numbers in the metric's own unit; None where there is none), and each system with its model,
        number of shots and the grid of these.
    """
    differences = {(c.model, c.shots, c.task, c.budget, c.first, c.factor): c for c in comparisons}
    closeness: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in fidelity.to_dict("records"):
        place = tuple(row[k] for k in ("model", "shots", "label", "budget", "factor"))
        closeness.setdefault(place, {})[str(row["task"])] = {
            m: [_rounded(row[m + end]) for end in ("", "_low", "_high")] for m in MEASURES
        }
    parts: list[dict[str, Any]] = []
    systems: list[dict[str, Any]] = []
    places: list[Place] = []
    lengths: list[dict[str, Any]] = []
    for model, shots, part in grid.by_model():
        columns = score_columns(part)
        chance = chance_levels(part)
        chosen = {(line.systems[0].label, line.systems[0].factor) for line in chosen_lines(part, pair)}
        parts.append({"model": model, "shots": shots, "columns": columns, "chance": chance})
        styles = _styles(part, chosen)
        points = length_points(part, part.systems(pair))
        for s, by_length in zip(part.systems(pair), points, strict=True):
            if by_length:
                found = [[*map(_rounded, (x, e.value, e.low, e.high)), n] for x, e, n in by_length]
                lengths.append({"system": len(places), "points": found})
            entry = _system(part, s) | styles[s.label, s.factor] | {"part": len(parts) - 1}
            entry["shown"] = s.is_full or (s.label, s.factor) in chosen
            entry["close"] = closeness.get((model, shots, s.label, s.budget, s.factor), {})
            entry["difference"] = {
                t: [
                    *map(_rounded, (c.difference.value, c.difference.low, c.difference.high)),
                    c.adjusted.p if c.adjusted else None,
                    c.difference.n,
                ]
                for t in columns
                if (c := differences.get((model, shots, t, s.budget, s.label, s.factor))) is not None
            }
            systems.append(entry)
            places.append((model, shots, part, s))
    data = {
        "metric": grid.metric,
        "percent": grid.percent,
        "budget_axis": _budget_axis(systems),
        "corrected": comparisons[0].adjusted.correction.label if comparisons and comparisons[0].adjusted else "",
        "higher": grid.higher_is_better,
        "pair": f"{comparisons[0].first} \N{MINUS SIGN} {comparisons[0].second}" if comparisons else None,
        "measures": MEASURES,
        "parts": parts,
        "systems": systems,
        "needle": _needle(grid),
        "lengths": lengths,
        "written": _written(texts, places),
        "layers": [{k: _rounded(v) for k, v in row.items()} for row in traces.to_dict("records")],
    }
    return data, places


def _budget_axis(systems: list[dict[str, Any]]) -> dict[str, Any]:
    """The title of the axis of budgets, and whether these are places side by side: tokens, or budgets of several kinds."""
    title, kinds = budget_axis(s["budget"] for s in systems if not s["full"])
    return {"title": title, "categories": len(kinds) > 1 or "tokens" in kinds}


def _system(part: Grid, s: SystemResults) -> dict[str, Any]:
    scores = {}
    for column in available_columns(s, part):
        found = estimated(s, column, part)
        tasks = part.tasks if column == AVERAGE else [column]
        n = sum(int(s.rows[t].n) for t in tasks)
        scores[column] = [*map(_rounded, (found.value, found.low, found.high)), n]
    cells = {t: part.cells[k].result for t, k in s.keys.items() if k in part.cells}
    budgets = {t: (r.get("lengths") or {}).get("budget") for t, r in cells.items()}
    return {
        "policy": s.short_label,
        "label": s.label,
        "budget": s.budget,
        "order": None if math.isinf(s.budget_order) else s.budget_order,
        "factor": s.factor,
        "factor_value": _rounded(s.factor_value),
        "schedule": s.schedule,
        "variant": s.variant,
        "full": s.is_full,
        "causal": s.causal,
        "scores": scores,
        "tokens": {t: [b["median"], b["min"], b["max"]] for t, b in budgets.items() if b},
        "kept_tokens": {t: _rounded(r.kept_tokens) for t, r in s.rows.items()},
        "tokens_per_second": {t: _rounded(r.tokens_per_second) for t, r in s.rows.items()},
    }


def _written(texts: pd.DataFrame, places: Sequence[Place]) -> list[dict[str, Any]]:
    """How many tokens a system's texts of a task have, as quantiles, and the shares of those cut off and ended in a loop."""
    if texts.empty:
        return []
    numbers: dict[tuple[Any, ...], int] = {
        (m, n, s.label, s.budget, s.factor): i for i, (m, n, _, s) in enumerate(places)
    }
    found = []
    for place, rows in texts.groupby(["model", "shots", "label", "budget", "factor", "task"], sort=False):
        *system, task = place if isinstance(place, tuple) else (place,)
        tokens = rows["tokens"].dropna()
        if tokens.empty or tuple(system) not in numbers:
            continue
        quantiles = np.quantile(tokens, np.linspace(0, 1, QUANTILES + 1), method="inverted_cdf")
        entry = {"system": numbers[tuple(system)], "task": str(task), "n": len(tokens), "mean": _rounded(tokens.mean())}
        entry |= {"cut": _rounded(rows["cut_off"].mean()), "loop": _rounded(rows["loop"].mean())}
        found.append(entry | {"quantiles": [_rounded(q) for q in quantiles]})
    return found


def _styles(part: Grid, chosen: Collection[tuple[str, str]]) -> dict[tuple[str, str], dict[str, str]]:
    """Label and factor -> colour, symbol and dash: of those `chosen` for the files of plots, the same as there."""
    systems = part.systems()
    found: dict[tuple[str, str], dict[str, str]] = {(s.label, s.factor): FULL for s in systems if s.is_full}
    pruned = list(dict.fromkeys((s.label, s.factor, s.policy) for s in systems if not s.is_full))
    pruned.sort(key=lambda s: s[:2] not in chosen)
    styles = styles_of([Line(f"{label}\n{factor}", policy, []) for label, factor, policy in pruned], part.policies)
    for label, factor, _ in pruned:
        style = styles[f"{label}\n{factor}"]
        found[label, factor] = {"colour": style.colour, "symbol": SYMBOLS[style.marker], "dash": DASHES[style.dash]}
    return found


def _needle(grid: Grid) -> list[dict[str, Any]]:
    """Heat maps of the needle task, one for each model, number of shots and unit."""
    found = []
    for model, shots, part in grid.by_model():
        for by, unit in UNITS.items():
            try:
                table = needle_estimates(part, by)
            except UserError:
                continue
            names = table.index.to_frame()[["policy", "budget", "factor"]].to_numpy()
            rows = [", ".join(str(v) for v in row if v != DASH) for row in names]
            shares = [[_bounded(v) for v in row] for row in table.to_numpy()]
            place = {"model": model, "shots": shots, "policies": [str(n[0]) for n in names]}
            place |= {"budgets": [str(n[1]) for n in names], "unit": unit, "rows": rows}
            found.append(place | {"columns": [*map(str, table.columns)], "shares": shares})
    return found


def _bounded(found: Any) -> list[float | None] | None:
    """A share with its interval; None where there is none."""
    return [*map(_rounded, (found.value, found.low, found.high))] if isinstance(found, Estimate) else None


def _rounded(value: Any) -> Any:
    """For JSON: six digits, and None for what is no number."""
    if isinstance(value, str) or value is None:
        return value
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None
