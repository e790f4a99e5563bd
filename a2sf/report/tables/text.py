"""Tables whose numbers are already texts, written as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from a2sf.report.tables.cells import to_markdown, to_tex


@dataclass(frozen=True)
class TextTable:
    """A table whose numbers are already texts; the columns in `words` are left-aligned."""

    title: str
    frame: pd.DataFrame
    legend: str
    words: tuple[str, ...] = ("Task", "Policy", "Budget", "Schedule", "Factor")
    model: str = ""
    shots: int | None = None


def text_markdown(tables: Sequence[TextTable]) -> str:
    """Pipe tables, each with heading and legend."""
    parts = []
    for table in tables:
        align = [":--" if h in table.words else "--:" for h in map(str, table.frame)]
        texts = [[*map(to_markdown, row)] for row in (map(str, table.frame), *table.frame.to_numpy().tolist())]
        body = "\n".join("| " + " | ".join(line) + " |" for line in (texts[0], align, *texts[1:]))
        parts.append(f"### {table.title}\n\n{body}\n\n{table.legend}\n")
    return "\n".join(parts)


def text_latex(tables: Sequence[TextTable]) -> str:
    """`table` environments with booktabs rules."""
    parts = []
    for table in tables:
        heads = [str(h) for h in table.frame]
        align = "".join("l" if h in table.words else "r" for h in heads)
        lines = [" & ".join(map(to_tex, row)) + r" \\" for row in [heads, *table.frame.to_numpy().tolist()]]
        body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
        parts.append(
            "\\begin{table}[ht]\n\\centering\\footnotesize\\setlength{\\tabcolsep}{3pt}\n"
            f"\\caption{{{to_tex(f'{table.title}. {table.legend}')}}}\\medskip\n"
            f"\\begin{{tabular}}{{{align}}}\n{body}\n\\end{{tabular}}\n\\end{{table}}\n"
        )
    return "\n".join(parts)
