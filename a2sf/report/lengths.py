"""Sizes: prompts and budgets in tokens as a table, accuracy by prompt length as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from a2sf.analysis.results.documents import TEXT, documents_of, texts_of
from a2sf.analysis.results.grid import DEFAULT_PAIR, Grid, SystemResults
from a2sf.analysis.results.labels import DASH
from a2sf.analysis.statistics.intervals import Estimate, of_documents
from a2sf.report.plots.lines import chosen_lines, draw_line
from a2sf.report.plots.style import GREY, Line, Style, panels, shared_legend, styles_of
from a2sf.report.tables.text import TextTable

GAP = 1.3
"""A length this many times the next smaller one begins a new bin, where that makes few bins."""
MOST_BINS, QUANTILE_BINS = 6, 5
FEWEST = 5
"""Documents in a bin, at least, for its point to be drawn."""
LEGEND = (
    "Tokens: the median, and in parentheses the smallest and the largest, of the documents' prompts and of the budget of "
    "a request (mean over layers)."
)
SHARES = (
    "A threshold has no budget. What was cached at the end of a request instead, mean over layers and KV heads: tokens, mean"
    " over requests, and as a share of the tokens read, mean over requests and of the request with the largest."
)


def length_tables(grid: Grid) -> list[TextTable]:
    """For each model and number of shots a row per task: the prompts' lengths, and what each budget comes to."""
    tables = []
    for model, shots, part in grid.by_model():
        systems = part.systems()
        budgets = list(dict.fromkeys(s.budget for s in systems if not s.is_full))
        rows = []
        for task in part.tasks:
            of_task = [s for s in systems if s.keys.get(task) in part.cells]
            prompts = [n for s in of_task[:1] for n in _prompts(part, s, task)]
            if not any(prompts):
                continue
            row = {"Task": task, "Documents": str(len(prompts)), "Prompt": _spread(_quantiles(prompts))}
            for budget in budgets:
                sizes = [_budget(part, s, task) for s in of_task if s.budget == budget]
                row[f"Budget {budget}"] = _spread(next((t for t in sizes if t is not None), None))
            rows.append(row)
        if rows:
            tables.append(
                TextTable(f"Sizes: {model}, {shots}-shot", pd.DataFrame(rows), LEGEND, model=model, shots=shots)
            )
    return tables


def share_tables(grid: Grid) -> list[TextTable]:
    """For each model and number of shots, what systems with a threshold cached: a row per system and task."""
    tables = []
    for model, shots, part in grid.by_model():
        rows = []
        for s in part.systems():
            for task in part.tasks:
                most = s.rows[task].cache_share_max if task in s.rows else None
                if most is None or pd.isna(most):
                    continue
                share, tokens = s.rows[task].cache_share, s.rows[task].kept_tokens
                row = {"Policy": s.short_label, "Schedule": s.schedule, "Task": task, "Tokens": f"{tokens:,.1f}"}
                rows.append(row | {"Mean": f"{100 * share:.1f}", "Largest": f"{100 * most:.1f}"})
        if rows:
            title = f"Cached share: {model}, {shots}-shot (%)"
            tables.append(TextTable(title, pd.DataFrame(rows), SHARES, model=model, shots=shots))
    return tables


def length_figure(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> Figure | None:
    """The metric against the prompt's length in tokens, a panel for each budget; None where all are about as long."""
    lines = chosen_lines(part, pair)
    full = [Line(s.label, s.policy, [s]) for s in part.systems() if s.is_full]
    values = {id(s): _by_length(part, s) for line in (*full, *lines) for s in line.systems}
    every = [v["tokens"] for v in values.values() if len(v)]
    edges = bins_of(pd.concat(every).tolist()) if every else []
    budgets = list(dict.fromkeys(s.budget for line in lines for s in line.systems if len(values[id(s)])))
    most = max((len(_points(v, edges)) for v in values.values()), default=0) if len(edges) >= 3 else 0
    if most < 2 or not budgets:  # no length to compare with another
        return None
    styles = styles_of(lines, part.policies) | {line.label: Style(GREY, "*", ":") for line in full}
    figure, axes = panels(len(budgets), (3.1, 2.7), (0, 0.8), least=4.2, sharey=True)
    for axis, budget in zip(axes, budgets, strict=True):
        for line in (*full, *lines):
            for s in line.systems:
                if s.is_full or s.budget == budget:
                    points = [(x, score) for x, score, _ in _points(values[id(s)], edges)]
                    draw_line(axis, points, styles[line.label], line.label, part.percent, alpha=0.07)
        axis.set_title(f"budget {budget}")
        axis.set_xscale("log")
        middles = _middles(pd.concat(every), edges)
        axis.set_xticks(middles, [f"{m:,.0f}" for m in middles])
        axis.xaxis.minorticks_off()
        axis.set_xlabel("tokens of the prompt")
    figure.supylabel(f"{part.metric} (%)" if part.percent else part.metric, fontsize=9)
    shared_legend(figure)
    return figure


def bins_of(lengths: Sequence[int]) -> list[float]:
    """Edges of bins, the first below and the last above all lengths; two edges where all lengths are similar.

    Where lengths form a few clusters, each is a bin; else bins hold equal numbers of documents.
    """
    distinct = np.unique(np.asarray(lengths, dtype=float))
    clusters = distinct[1:][distinct[1:] > GAP * distinct[:-1]]
    if 1 <= len(clusters) < MOST_BINS:
        inner = clusters
    else:
        inner = np.unique(np.quantile(lengths, np.linspace(0, 1, QUANTILE_BINS + 1)[1:-1]).round())
        inner = inner[inner > distinct[0]]
    return [float(distinct[0]), *inner.tolist(), float(distinct[-1]) + 1]


def length_points(part: Grid, systems: Sequence[SystemResults]) -> list[list[tuple[float, Estimate, int]]]:
    """Of each system, for each bin of prompt lengths with enough documents: median tokens, the score, documents.

    All lists are empty where the prompts are about as long.
    """
    values = [_by_length(part, s) for s in systems]
    edges = bins_of(tokens) if (tokens := [t for v in values for t in v["tokens"]]) else []
    points = [_points(v, edges) for v in values]
    several = len(edges) > 2 and max(map(len, points)) > 1
    return points if several else [[] for _ in systems]


def _by_length(part: Grid, s: SystemResults) -> pd.DataFrame:
    """`tokens` and `value` of each document of a system, of all tasks."""
    frames = [pd.DataFrame({"tokens": [], "value": []})]
    for task in s.keys:
        column = f"metric/{part.metric}"
        stored = part.cells.get(s.keys[task])
        documents = pd.DataFrame() if stored is None else documents_of(stored)
        if column in documents and "context_tokens" in documents:
            found = pd.DataFrame({"tokens": _prompts(part, s, task), "value": documents[column]})
            found[TEXT] = [f"{task} {t}" for t in texts_of(documents).of]
            frames.append(found[found["tokens"] > 0].dropna())
    filled = [f for f in frames if len(f)]
    return pd.concat(filled, ignore_index=True) if filled else frames[0]


def _prompts(part: Grid, s: SystemResults, task: str) -> list[int]:
    """Tokens of each document's longest prompt; 0 where it has none."""
    documents = part.cells[s.keys[task]].documents
    return [max(map(int, n), default=0) for n in documents["context_tokens"]] if "context_tokens" in documents else []


def _budget(part: Grid, s: SystemResults, task: str) -> dict[str, Any] | None:
    return (part.cells[s.keys[task]].result.get("lengths") or {}).get("budget")


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


def _spread(sizes: dict[str, Any] | None) -> str:
    if sizes is None:
        return DASH
    low, middle, high = (f"{sizes[k]:,.0f}" for k in ("min", "median", "max"))
    return middle if low == high else f"{middle} ({low} to {high})"


def _middles(lengths: pd.Series, edges: Sequence[float]) -> list[float]:
    parts = (lengths[(lengths >= low) & (lengths < high)] for low, high in pairwise(edges))
    return [float(part.median()) for part in parts if len(part)]


def _points(documents: pd.DataFrame, edges: Sequence[float]) -> list[tuple[float, Estimate, int]]:
    """Length, score and number of documents of each bin with enough documents."""
    points = []
    for low, high in pairwise(edges):
        of_bin = documents[(documents["tokens"] >= low) & (documents["tokens"] < high)]
        if len(of_bin) >= FEWEST:
            values = of_bin["value"].to_numpy(float)
            score = of_documents(values, texts_of(of_bin.reset_index(drop=True)))
            points.append((float(of_bin["tokens"].median()), score, len(of_bin)))
    return points
