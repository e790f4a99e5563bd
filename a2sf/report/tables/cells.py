"""The texts of a table's cells: numbers, headings, signs, and the legend. The same in every format."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from a2sf.analysis.results.labels import DASH, MINUS
from a2sf.analysis.statistics.equivalence import points
from a2sf.analysis.statistics.families import Adjusted
from a2sf.report.tables.table import Entry, Table, TableRow

HEADS = {"label": "Policy", "budget": "Budget", "schedule": "Schedule", "factor": "Factor"}
ORACLE = "A policy that is not causal is an oracle (upper bound)"
BELOW, ABOVE = "↓", "↑"
"""Signs after a number that is significantly below, or above, the best one: the latter where lower is better."""


@dataclass(frozen=True)
class Markup:
    """How one output writes things.

    Attributes:
        bold: a number that is best.
        sign: the sign after a number that is significantly worse than the best.
        text: any other text (escaping).
        stderr, interval: whether to add the standard error, or the 95 % interval, to each number.
    """

    bold: Callable[[str], str]
    sign: Callable[[str], str] = str
    text: Callable[[str], str] = str
    stderr: bool = False
    interval: bool = False


def number(value: float | None, percent: bool, signed: bool = False, decimals: int = 2) -> str:
    """A value as tables show it: shares as percentages with one decimal, anything else with `decimals`."""
    if value is None or math.isnan(value):
        return DASH
    value, digits = (100 * value, 1) if percent else (value, decimals)
    value = round(value, digits) + 0.0  # no minus in front of a zero
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", MINUS)


def interval(low: float | None, high: float | None, percent: bool, signed: bool = True) -> str:
    """An interval as tables show it."""
    return f"[{number(low, percent, signed)}, {number(high, percent, signed)}]"


def margin_text(margin: float, percent: bool) -> str:
    """A margin in words: points (hundredths) of a share, else the metric's own unit."""
    return points(margin) if percent else f"{margin:g}"


def header(table: Table) -> list[str]:
    """Every column's heading, in order."""
    return [*(HEADS[h] for h in table.heads), *table.columns, *differences_of(table)]


def differences_of(table: Table) -> dict[str, Callable[[TableRow], str]]:
    """The columns of differences: heading -> the text of a row."""

    def signed(value: float | None) -> str:
        return number(value, table.percent, signed=True)

    found: dict[str, Callable[[TableRow], str]] = {}
    if table.to_full:
        found[table.to_full] = lambda row: signed(row.to_full)
    if table.margin is not None:
        found["95 % of Δ full"] = lambda row: (
            interval(e.difference.low, e.difference.high, table.percent) if (e := row.equivalence) else DASH
        )
        found[f"Within {margin_text(table.margin, table.percent)}"] = lambda row: (
            row.equivalence.verdict if row.equivalence else DASH
        )
    if table.to_control:
        found[table.to_control] = lambda row: signed(row.to_control)
    return found


def reference_rows(table: Table) -> list[list[str]]:
    """The rows above a table's own, in the order of `header`: the documents and the chance level of each column."""
    rows = {"Documents (n)": [table.documents.get(c, DASH) for c in table.columns]}
    if table.chance:
        rows["Chance level"] = [number(table.chance.get(c), table.percent) for c in table.columns]
    extra = [""] * len(differences_of(table))
    return [[name, *[""] * (len(table.heads) - 1), *row, *extra] for name, row in rows.items() if table.heads]


def texts(table: Table, row: TableRow, markup: Markup) -> list[str]:
    """A row's texts, in the order of `header`."""
    written = [markup.text(getattr(row, head)) for head in table.heads]
    written += [_entry(row.entries.get(column), table, markup) for column in table.columns]
    return [*written, *(markup.text(of(row)) for of in differences_of(table).values())]


def sign_of(table: Table, entry: Entry) -> str:
    """The sign after a number; "" for none."""
    return (BELOW if table.higher else ABOVE) if entry.worse else ""


def legend(table: Table) -> str:
    """The meaning of the signs that occur in a table, its documents and chance level, and how its tests were corrected."""
    entries = [e for row in table.rows for e in row.entries.values()]
    sentences = [_sizes(table)]
    if any(e.best for e in entries):
        sentences.append(f"Bold: best pruned value at that budget{' and schedule' * ('schedule' in table.heads)}.")
    tests = [e.test for e in entries if e.test is not None]
    if tests:
        side, sign = ("below", BELOW) if table.higher else ("above", ABOVE)
        how = f"paired test, α = 0.05, {tests[0].how}"
        marked = any(e.worse for e in entries)
        meaning = f"{sign}: significantly {side} the best" if marked else f"No value is significantly {side} the best"
        sentences.append(f"{meaning} ({how}).")
    equivalences = [r.equivalence.test for r in table.rows if r.equivalence and r.equivalence.test]
    if table.margin is not None and equivalences:
        score = "the average" if len(table.columns) > 1 else f"the score of {table.columns[0]}"
        sentences.append(within_legend(table.margin, table.percent, score, equivalences[0]))
    if any(not row.causal for row in table.rows):
        sentences.append(f"{ORACLE}: never bold, and not tested against others.")
    if table.stopped:
        early = ", ".join(f"{task} after {stopped} documents" for task, stopped in table.stopped.items())
        sentences.append(f"Stopped when its comparison was decided: {early}.")
    return " ".join([*filter(None, sentences), *table.footnotes])


def within_legend(margin: float, percent: bool, what: str, test: Adjusted) -> str:
    """The meaning of the column "Within": what is compared with the full cache, and one of its tests."""
    text = margin_text(margin, percent)
    return (
        f"Within {text}: is {what} shown to differ from the full cache's by less than {text}, either way (two one-sided "
        f"paired tests, α = 0.05, {test.how})? No: the 95 % interval of the difference lies outside. Not shown: neither."
    )


def _sizes(table: Table) -> str:
    """The documents and the chance level of the average or the only column, for a caption."""
    column = table.columns[-1]
    n, chance = table.documents.get(column), table.chance.get(column)
    level = "" if chance is None else f", chance level {number(chance, table.percent)}{' %' * table.percent}"
    return f"{column[0].upper()}{column[1:]}: n = {n}{level}." if n else ""


def _entry(entry: Entry | None, table: Table, markup: Markup) -> str:
    if entry is None:
        return markup.text(DASH)
    percent = table.percent
    text = markup.text(number(entry.value, percent))
    if markup.stderr:
        text += markup.text(f" ± {number(entry.stderr, percent)}")
    if markup.interval:
        text += markup.text(f" {interval(entry.low, entry.high, percent, signed=False)}")
    sign = sign_of(table, entry)
    return (markup.bold(text) if entry.best else text) + (markup.sign(sign) if sign else "")


TEX = str.maketrans(
    {c: "\\" + c for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "Δ": r"$\Delta$"}
    | {
        "|": "$|$",
        MINUS: "$-$",
        DASH: "--",
        "±": r"$\pm$",
        BELOW: r"$\downarrow$",
        ABOVE: r"$\uparrow$",
        "α": r"$\alpha$",
        "<": "$<$",
        ">": "$>$",
    }
)


def to_tex(text: str) -> str:
    """`text` with what LaTeX reads as commands, and signs outside ASCII, written out."""
    return text.translate(TEX)


def to_markdown(text: str) -> str:
    """`text` for a cell of a pipe table."""
    return text.replace("|", "\\|")
