"""Accuracy tables written as Markdown, LaTeX and CSV. The numbers are the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from a2sf.analysis.results.labels import DASH
from a2sf.report.tables.cells import Markup, header, legend, reference_rows, texts, to_markdown, to_tex
from a2sf.report.tables.table import Entry, Table


def markdown(tables: Sequence[Table], stderr: bool = False, interval: bool = False) -> str:
    """Pipe tables with a heading, the legend and the notes of each."""
    markup = Markup(bold=lambda text: f"**{text}**", text=to_markdown, stderr=stderr, interval=interval)
    parts = []
    for table in tables:
        heads = header(table)
        align = [":--" if i < len(table.heads) else "--:" for i in range(len(heads))]
        above = [map(markup.text, row) for row in reference_rows(table)]
        lines = [map(markup.text, heads), align, *above, *(texts(table, row, markup) for row in table.rows)]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append("\n\n".join(filter(None, [f"### {table.title}", body, legend(table), *table.notes])))
    return "\n\n".join(parts) + "\n"


def latex(tables: Sequence[Table], stderr: bool = False, interval: bool = False) -> str:
    """`table` environments with booktabs rules, to be put into a document that loads booktabs."""
    markup = Markup(
        bold=lambda t: rf"\textbf{{{t}}}",
        sign=lambda t: rf"\rlap{{{to_tex(t)}}}",
        text=to_tex,
        stderr=stderr,
        interval=interval,
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
    """The tables as one frame, unrounded, in the metric's own unit.

    `<column>:mark` says `best`, `worse` (significantly) or `tied` (not significantly); `<column>:p_holm` (or `p_fdr`) is the
    corrected p-value against the best.
    """
    rows = []
    for table in tables:
        for row in table.rows:
            line: dict[str, object] = {"model": table.model, "shots": table.shots, "metric": table.metric}
            line |= {head: getattr(row, head).replace(DASH, "") for head in table.heads}
            for column in table.columns:
                line |= _numbers(column, row.entries.get(column), table.tested)
            line |= {
                head: value
                for head, value in ((table.to_full, row.to_full), (table.to_control, row.to_control))
                if head
            }
            tests = [e.test for e in row.entries.values() if e.test is not None]
            if table.tested:
                line |= {k: getattr(tests[0], k) if tests else None for k in ("tests", "family")}
            if (e := row.equivalence) is not None and e.test is not None:
                line |= {f"to_full:{k}": getattr(e.difference, k) for k in ("low", "high")}
                line |= {"margin": e.within.margin, "within": e.verdict}
                line |= {"p_not_worse": e.p_not_worse, "p_within": e.within.p_equivalent}
                line |= {f"within:{k}": v for k, v in e.test.columns.items()}
            rows.append(line)
    return pd.DataFrame(rows)


def _numbers(column: str, entry: Entry | None, tested: bool) -> dict[str, object]:
    """The columns of `tables.csv` for one number."""
    shown = ("stderr", "low", "high", "n", "mark")
    line: dict[str, object] = {column: entry.value if entry else None}
    line |= {f"{column}:{k}": getattr(entry, k) if entry else None for k in shown}
    if tested and entry is not None and entry.test is not None:
        line[f"{column}:{entry.test.correction.column}"] = entry.test.p
    return line
