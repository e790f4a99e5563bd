"""Accuracy tables written as Markdown, LaTeX and CSV. The numbers are the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from a2sf.analysis.results.labels import DASH
from a2sf.report.tables.cells import Markup, header, legend, reference_rows, texts, to_markdown, to_tex
from a2sf.report.tables.layout import Table


def markdown(tables: Sequence[Table], stderr: bool = False) -> str:
    """Pipe tables with a heading, the legend and the notes of each."""
    markup = Markup(bold=lambda text: f"**{text}**", text=to_markdown, stderr=stderr)
    parts = []
    for table in tables:
        heads = header(table)
        align = [":--" if i < len(table.heads) else "--:" for i in range(len(heads))]
        above = [map(markup.text, row) for row in reference_rows(table)]
        lines = [map(markup.text, heads), align, *above, *(texts(table, row, markup) for row in table.rows)]
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
            *(" & ".join(map(to_tex, row)) + r" \\" for row in (heads, *reference_rows(table))),
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
