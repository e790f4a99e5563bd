"""Comparisons of finished runs as a table: on the screen, in Markdown, LaTeX and CSV."""

from __future__ import annotations

import math

import pandas as pd
from rich.table import Table as Grid
from rich.text import Text

from a2sf.analysis.comparisons.runs import ComparedRuns
from a2sf.analysis.results.labels import DASH
from a2sf.analysis.statistics.families import how_of_all
from a2sf.report.tables.cells import interval, margin_text, number
from a2sf.report.tables.summaries import p_text
from a2sf.report.tables.text import TextTable

LEGEND = (
    "Each run minus {reference}, on the documents that both have (n). Interval: 95 %, paired. Gained and lost: documents "
    "that only the run, or only {reference}, got right. p: exact McNemar test (bootstrap if answers are not right or "
    "wrong, sign flips of whole texts if documents share one), {how}. "
    "Detectable: the smallest difference that these documents show with 80 % power."
)
MARGIN = (
    " Within {margin}: whether the difference is shown to be smaller than the margin, either way (two one-sided "
    "paired tests, α = 0.05, {how}): yes, not shown, or no (shown to be larger)."
)
DRAWS = (
    " Draws: share of the squared standard error of the run's mean, and of the difference, that comes from drawing answers "
    "at random; the rest comes from the choice of documents."
)


def comparison_table(made: ComparedRuns) -> TextTable:
    """One row for each run and task."""
    rows = []
    percent = made.percent
    margins = {r.within.margin for r in made.rows if r.within}
    for r in made.rows:
        d = r.difference
        row = {
            "Task": r.task,
            "Run": r.run,
            "n": str(d.n),
            made.reference: number(r.reference, percent),
            "Value": number(r.value, percent),
            "Difference": number(d.value, percent, signed=True),
            "95 % interval": interval(d.low, d.high, percent),
            "Gained": DASH if d.gained is None else str(d.gained),
            "Lost": DASH if d.lost is None else str(d.lost),
            f"p ({made.correction.label})": DASH if r.adjusted is None else p_text(r.adjusted.p),
            "Detectable": number(d.detectable, percent),
        }
        if margins:
            row[_within(min(margins), percent)] = r.verdict
        if any(x.draws is not None for x in made.rows):
            row["Draws"] = _percent(r.draws)
            row["Draws of difference"] = _percent(r.draws_of_difference)
        rows.append(row)
    legend = LEGEND.format(reference=made.reference, how=how_of_all([r.adjusted for r in made.rows if r.adjusted]))
    if margins:
        how = how_of_all([r.equivalent for r in made.rows if r.equivalent])
        legend += MARGIN.format(margin=margin_text(min(margins), percent), how=how)
    if any(r.draws is not None for r in made.rows):
        legend += DRAWS
    metric = ", ".join(dict.fromkeys(made.metrics.values()))
    title = f"Runs against {made.reference}: {metric}" + (" (%)" if percent else "")
    return TextTable(title, pd.DataFrame(rows), legend, words=("Task", "Run", "95 % interval"))


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.0f} %"


def _within(margin: float, percent: bool) -> str:
    return f"Within {100 * margin if percent else margin:g}"


def screen_of(table: TextTable) -> Grid:
    """The same for a terminal of 80 columns: a block for each run, and short headings."""
    frame, reference = table.frame, table.frame.columns[3]
    head = str(next(c for c in frame if str(c).startswith("p (")))
    columns = {
        "Task": frame["Task"],
        "n": frame["n"],
        "refer-\nence": frame[reference],
        "value": frame["Value"],
        "diff.": frame["Difference"],
        "95 %": frame["95 % interval"].str.strip("[]").str.replace(", ", " … "),
        "flips": frame["Gained"].str.cat(frame["Lost"], "/").replace(f"{DASH}/{DASH}", DASH),
        head.replace(" ", "\n").replace("(", "").replace(")", ""): frame[head],
        "detec-\ntable": frame["Detectable"],
    }
    columns |= {head.replace(" ", "\n"): frame[head] for head in frame.columns[11:]}
    grid = Grid(title=table.title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="bold")
    for head in columns:
        grid.add_column(head, justify="left" if head == "Task" else "right", overflow="fold")
    for run in dict.fromkeys(frame["Run"]):
        grid.add_row(Text(str(run), style="bold", no_wrap=True, overflow="ellipsis"))
        for row in pd.DataFrame(columns)[frame["Run"] == run].to_numpy().tolist():
            grid.add_row(*map(str, row))
    return grid


def frame_of(made: ComparedRuns) -> pd.DataFrame:
    """One row for each run and task, unrounded, in the metric's own unit."""
    rows = []
    for r in made.rows:
        row = {
            "task": r.task,
            "run": r.run,
            "reference": made.reference,
            "value_reference": r.reference,
            "value": r.value,
        }
        row |= {("difference" if k == "value" else k): v for k, v in vars(r.difference).items()}
        row |= r.adjusted.columns if r.adjusted else {}
        row |= {"draws": r.draws, "draws_of_difference": r.draws_of_difference}
        if r.within is not None:
            row |= {
                "margin": r.within.margin,
                "p_not_worse": r.within.p_not_worse,
                "p_not_better": r.within.p_not_better,
            }
            if r.equivalent is not None:
                row |= {f"p_equivalent_{made.correction.method}": r.equivalent.p}
            row |= {"within": r.verdict}
        rows.append({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return pd.DataFrame(rows)
