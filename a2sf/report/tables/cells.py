"""The texts of a table's cells: numbers, headings, signs, and the legend. The same in every format."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from a2sf.analysis.results.labels import DASH, MINUS
from a2sf.report.tables.layout import Entry, Row, Table

HEADS = {"label": "Policy", "budget": "Budget", "schedule": "Schedule", "factor": "Factor"}
ORACLE = "A policy that is not causal is an oracle (upper bound)"
TIED = "†"


@dataclass(frozen=True)
class Markup:
    """How one output writes things.

    Attributes:
        bold: a number that is best.
        tied: the sign after a number that is not significantly different from the best.
        text: any other text (escaping).
        stderr: whether to add the standard error to each number.
    """

    bold: Callable[[str], str]
    tied: str = TIED
    text: Callable[[str], str] = str
    stderr: bool = False


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


def reference_rows(table: Table) -> list[list[str]]:
    """The rows above a table's own, in the order of `header`: the documents and the chance level of each column."""
    rows = {"Documents (n)": [table.documents.get(c, DASH) for c in table.columns]}
    if table.chance:
        rows["Chance level"] = [number(table.chance.get(c), table.percent) for c in table.columns]
    extra = [""] * (len(header(table)) - len(table.heads) - len(table.columns))
    return [[name, *[""] * (len(table.heads) - 1), *row, *extra] for name, row in rows.items() if table.heads]


def texts(table: Table, row: Row, markup: Markup) -> list[str]:
    """A row's texts, in the order of `header`."""
    written = [markup.text(getattr(row, head)) for head in table.heads]
    written += [_entry(row.entries.get(column), table.percent, markup) for column in table.columns]
    for head, difference in ((table.to_full, row.to_full), (table.to_control, row.to_control)):
        if head:
            written.append(markup.text(number(difference, table.percent, signed=True)))
    return written


def legend(table: Table) -> str:
    """The meaning of the signs that occur in a table."""
    entries = [e for row in table.rows for e in row.entries.values()]
    sentences = []
    if any(e.best for e in entries):
        sentences.append(f"Bold: best pruned value at that budget{' and schedule' * ('schedule' in table.heads)}.")
    if table.tested and any(e.tied for e in entries):
        test = "paired test, Holm, α = 0.05"
        sentences.append(f"{TIED}: not significantly different from the best ({test}).")
    if any(not row.causal for row in table.rows):
        sentences.append(f"{ORACLE}: never bold, and not tested against others.")
    if table.stopped:
        early = ", ".join(f"{task} after {stopped} documents" for task, stopped in table.stopped.items())
        sentences.append(f"Stopped when its comparison was decided: {early}.")
    return " ".join([*sentences, *table.footnotes])


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
    | {"|": "$|$", MINUS: "$-$", DASH: "--", "±": r"$\pm$", TIED: r"\textsuperscript{\dag}", "<": "$<$", ">": "$>$"}
)


def to_tex(text: str) -> str:
    """`text` with what LaTeX reads as commands, and signs outside ASCII, written out."""
    return text.translate(TEX)


def to_markdown(text: str) -> str:
    """`text` for a cell of a pipe table."""
    return text.replace("|", "\\|")
