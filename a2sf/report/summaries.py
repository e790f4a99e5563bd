"""Paired comparisons and closeness to the full cache as tables of text, for Markdown, LaTeX and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from a2sf.analysis.collect import DASH, Grid
from a2sf.analysis.compare import AVERAGE, Comparison
from a2sf.report.tables import number, to_tex

HEADS = {
    "agreement": ("Same answer (%)", 1),
    "gold_shift": ("Right choice (nats/token)", 3),
    "margin_shift": ("Margin (nats)", 2),
}
"""Measure -> heading and decimals."""
COMPARISONS = (
    "Difference of the first minus the second policy on the same documents. Interval: 95 %, paired. Gained and lost: "
    "documents that only the first, or only the second, got right. p: exact McNemar for a task, sign flips for the "
    "average; Holm: corrected over this table. Detectable: the smallest difference these documents show with 80 % "
    "power."
)
FIDELITY = (
    "Against the full cache on the same documents, with paired 95 % intervals. Same answer: share of documents with "
    "the same chosen answer. Right choice: change of its log-likelihood per token. Margin: change of its lead over the "
    "best wrong choice."
)


@dataclass(frozen=True)
class TextTable:
    """A table whose numbers are already written; the columns in `words` are left-aligned."""

    title: str
    frame: pd.DataFrame
    legend: str
    words: tuple[str, ...] = ("Task", "Policy", "Budget", "Factor")


def comparison_tables(comparisons: Sequence[Comparison], percent: bool) -> list[TextTable]:
    """One table per model and shots."""
    tables = []
    for model, shots in dict.fromkeys((c.model, c.shots) for c in comparisons):
        part = [c for c in comparisons if (c.model, c.shots) == (model, shots)]
        rows = []
        for c in part:
            d = c.difference
            rows.append(
                {
                    "Task": c.task,
                    "Budget": c.budget,
                    "Factor": c.factor,
                    "Difference": number(d.value, percent, signed=True),
                    "95 % interval": _interval(d.low, d.high, percent),
                    "Gained": DASH if d.gained is None else str(d.gained),
                    "Lost": DASH if d.lost is None else str(d.lost),
                    "p": p_text(d.p),
                    "p (Holm)": p_text(c.p_holm),
                    "Detectable": number(d.detectable, percent),
                    "n": str(d.n),
                }
            )
        title = f"{part[0].first} against {part[0].second}: {model}, {shots}-shot" + (" (points)" if percent else "")
        tables.append(TextTable(title, pd.DataFrame(rows), COMPARISONS))
    return tables


def fidelity_tables(grid: Grid, fidelity: pd.DataFrame) -> list[TextTable]:
    """One table per model and shots: closeness beside the metric, on the average over tasks (or the only task)."""
    tables = []
    for model, shots, part in grid.parts():
        mine = fidelity[(fidelity["model"] == model) & (fidelity["shots"] == shots)] if len(fidelity) else fidelity
        if mine.empty:
            continue
        task = AVERAGE if (mine["task"] == AVERAGE).any() else str(mine["task"].iloc[0])
        scores = {(s.label, s.budget, s.factor): s for s in part.systems()}
        rows = []
        for r in mine[mine["task"] == task].to_dict("records"):
            system = scores[r["label"], r["budget"], r["factor"]]
            row = {"Policy": r["label"], "Budget": r["budget"], "Factor": r["factor"]}
            row[part.metric] = number(system.average(part.tasks if task == AVERAGE else [task]), part.percent)
            for measure, (head, decimals) in HEADS.items():
                share = measure == "agreement"
                low, value, high = (
                    number(r[measure + end], share, signed=not share, decimals=decimals)
                    for end in ("_low", "", "_high")
                )
                row[head] = f"{value} [{low}, {high}]"
            rows.append(row)
        title = f"Closeness to the full cache: {model}, {shots}-shot, {task}"
        tables.append(TextTable(title, pd.DataFrame(rows), FIDELITY))
    return tables


def p_text(p: float | None) -> str:
    """A p-value with three decimals."""
    return DASH if p is None or pd.isna(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def text_markdown(tables: Sequence[TextTable]) -> str:
    """Pipe tables, each with heading and legend."""
    parts = []
    for table in tables:
        heads = [str(h) for h in table.frame]
        align = [":--" if h in table.words else "--:" for h in heads]
        lines = [heads, align, *table.frame.to_numpy().tolist()]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
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


def _interval(low: float, high: float, percent: bool) -> str:
    return f"[{number(low, percent, signed=True)}, {number(high, percent, signed=True)}]"
