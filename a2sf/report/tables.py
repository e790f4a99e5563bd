"""Laid-out tables written as Markdown, LaTeX, CSV and on the screen. The numbers are the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table as RichTable

from a2sf.analysis.collect import Selection, grid_of
from a2sf.analysis.labels import DASH, MINUS
from a2sf.report.layout import Entry, Row, Table, build_tables
from a2sf.store.aggregates import Group as TaskGroup
from a2sf.store.runs import StoredCell

HEADS = {"label": "Policy", "budget": "Budget", "schedule": "Schedule", "factor": "Factor"}
TIED = "†"
SCREEN_COLUMNS = 12
"""With more columns of numbers a screen shows groups without their tasks."""


@dataclass(frozen=True)
class Markup:
    """How one output writes things.

    Attributes:
        bold: a number that is best.
        tied: the mark behind a number that is not significantly different from the best.
        text: any other text (escaping).
        stderr: whether to add the standard error to each number.
    """

    bold: Callable[[str], str]
    tied: str = TIED
    text: Callable[[str], str] = str
    stderr: bool = False


def screen_table(cells: Sequence[StoredCell], groups: Sequence[TaskGroup] = ()) -> Group:
    """The tables that end a sweep, for the screen: no tests, partial grids allowed (a missing cell is a dash)."""
    if not cells:
        return Group()
    grid = grid_of(cells, Selection(mixed=True), groups)
    told = [escape(note) for note in grid.notes if groups]
    return Group(*screen(build_tables(grid, tested=False)), *told)


def number(value: float | None, percent: bool, signed: bool = False, decimals: int = 2) -> str:
    """A value as tables show it: shares as percentages with one decimal, anything else with `decimals`."""
    if value is None or math.isnan(value):
        return DASH
    value, digits = (100 * value, 1) if percent else (value, decimals)
    value = round(value, digits) + 0.0  # no minus in front of a zero
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", MINUS)


def header(table: Table) -> list[str]:
    """Every column's heading, in order."""
    extra = [head for head in (table.to_full, table.to_control) if head]
    return [*(HEADS[h] for h in table.heads), *table.columns, *extra]


def texts(table: Table, row: Row, markup: Markup) -> list[str]:
    """A row's texts, in the order of `header`."""
    written = [markup.text(getattr(row, head)) for head in table.heads]
    written += [_entry(row.entries.get(column), table.percent, markup) for column in table.columns]
    for head, difference in ((table.to_full, row.to_full), (table.to_control, row.to_control)):
        if head:
            written.append(markup.text(number(difference, table.percent, signed=True)))
    return written


def legend(table: Table) -> str:
    """What the marks mean, in words, as far as they occur."""
    entries = [e for row in table.rows for e in row.entries.values()]
    said = []
    if any(e.best for e in entries):
        said.append(f"Bold: best pruned value at that budget{' and schedule' * ('schedule' in table.heads)}.")
    if table.tested and any(e.tied for e in entries):
        test = "paired test, Holm-corrected over the table, 5 % level"
        said.append(f"{TIED}: not significantly different from that best ({test}).")
    if any(not row.causal for row in table.rows):
        said.append("A policy that is not causal is an oracle (upper bound): never bold, and tested against no other.")
    if table.stopped:
        early = ", ".join(f"{task} after {stopped} documents" for task, stopped in table.stopped.items())
        said.append(f"Stopped when its comparison was decided: {early}.")
    return " ".join([*said, *table.footnotes])


def screen(tables: Sequence[Table], stderr: bool = False) -> list[RichTable]:
    """Rich tables, budgets apart."""
    markup = Markup(bold=lambda text: f"[bold]{text}[/bold]", text=escape, stderr=stderr)
    rendered = []
    for table in map(_narrow, tables):
        out = RichTable(
            title=escape(table.title),
            title_justify="left",
            caption=" ".join(filter(None, [legend(table), *table.notes])) or None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for i, head in enumerate(header(table)):
            out.add_column(escape(head), justify="left" if i < len(table.heads) else "right", overflow="fold")
        for row, following in zip(table.rows, [*table.rows[1:], None], strict=True):
            out.add_row(
                *texts(table, row, markup), end_section=following is not None and following.budget != row.budget
            )
        rendered.append(out)
    return rendered


def _narrow(table: Table) -> Table:
    """What a screen has room for: of a large group the score without its tasks'; the only note left says so."""
    if len(table.columns) <= SCREEN_COLUMNS or not table.members:
        return replace(table, notes=())
    told = f"{len(table.members)} tasks of these groups are in the files alone."
    return replace(table, columns=[c for c in table.columns if c not in table.members], notes=(told,))


def markdown(tables: Sequence[Table], stderr: bool = False) -> str:
    """Pipe tables with a heading, the legend and the notes of each."""
    markup = Markup(bold=lambda text: f"**{text}**", text=lambda text: text.replace("|", "\\|"), stderr=stderr)
    parts = []
    for table in tables:
        heads = header(table)
        align = [":--" if i < len(table.heads) else "--:" for i in range(len(heads))]
        lines = [map(markup.text, heads), align, *(texts(table, row, markup) for row in table.rows)]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append("\n\n".join(filter(None, [f"### {table.title}", body, legend(table), *table.notes])))
    return "\n\n".join(parts) + "\n"


def latex(tables: Sequence[Table], stderr: bool = False) -> str:
    """`table` environments with booktabs rules, to be put into a document that loads booktabs."""
    markup = Markup(
        bold=lambda t: rf"\textbf{{{t}}}", tied=r"\rlap{\textsuperscript{\dag}}", text=to_tex, stderr=stderr
    )
    parts = []
    for table in tables:
        heads = header(table)
        lines = [
            r"\begin{table}[ht]",
            r"\centering\small\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{to_tex(' '.join(filter(None, [table.title + '.', legend(table)])))}}}",
            r"\medskip",
            rf"\begin{{tabular}}{{{'l' * len(table.heads) + 'r' * (len(heads) - len(table.heads))}}}",
            r"\toprule",
            " & ".join(map(to_tex, heads)) + r" \\",
            r"\midrule",
        ]
        previous = None
        for row in table.rows:
            if previous is not None and row.budget != previous:
                lines.append(r"\addlinespace")
            previous = row.budget
            lines.append(" & ".join(texts(table, row, markup)) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]))
    return "% needs \\usepackage{booktabs}\n" + "\n\n".join(parts) + "\n"


def csv_frame(tables: Sequence[Table]) -> pd.DataFrame:
    """The tables as one frame, unrounded, in the metric's own unit; `<column>:mark` says best or tied."""
    rows = []
    for table in tables:
        for row in table.rows:
            line: dict[str, object] = {"model": table.model, "shots": table.shots, "metric": table.metric}
            line |= {head: getattr(row, head).replace(DASH, "") for head in table.heads}
            for column in table.columns:
                entry = row.entries.get(column)
                line[column] = entry.value if entry else None
                line[f"{column}:stderr"] = entry.stderr if entry else None
                line[f"{column}:n"] = entry.n if entry else None
                line[f"{column}:mark"] = ("best" if entry.best else "tied" if entry.tied else "") if entry else ""
            line |= {
                head: value
                for head, value in ((table.to_full, row.to_full), (table.to_control, row.to_control))
                if head
            }
            rows.append(line)
    return pd.DataFrame(rows)


def _entry(entry: Entry | None, percent: bool, markup: Markup) -> str:
    if entry is None:
        return markup.text(DASH)
    text = markup.text(number(entry.value, percent))
    if markup.stderr:
        text += markup.text(f" ± {number(entry.stderr, percent)}")
    return (markup.bold(text) if entry.best else text) + (markup.tied if entry.tied else "")


TEX = str.maketrans(
    {c: "\\" + c for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "Δ": r"$\Delta$"}
    | {MINUS: "$-$", DASH: "--", "±": r"$\pm$", TIED: r"\textsuperscript{\dag}", "<": "$<$", ">": "$>$"}
)


def to_tex(text: str) -> str:
    """`text` with what LaTeX reads as commands, and signs outside ASCII, written out."""
    return text.translate(TEX)
