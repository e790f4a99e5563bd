"""Paired comparisons and closeness to the full cache as tables of text, for Markdown, LaTeX and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from a2sf.analysis.against import Against
from a2sf.analysis.collect import Grid, System
from a2sf.analysis.compare import AVERAGE, Comparison
from a2sf.analysis.documents import texts_note
from a2sf.analysis.labels import DASH, MINUS
from a2sf.analysis.ranking import Ranked
from a2sf.report.tables import number, to_tex

HEADS = {
    "agreement": ("Same answer (%)", 1),
    "gold_shift": ("Right choice (nats/token)", 3),
    "margin_shift": ("Margin (nats)", 2),
    "change": ("Change (nats)", 2),
    "choice_kl": ("Choices' KL (nats)", 3),
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
    "best wrong choice. Change: of any choice's log-likelihood, absolute, mean over the choices. Choices' KL: divergence "
    "of the choices' distribution from the full cache's."
)
AGAINST = (
    "Each policy minus the one in the second column at the same budget, average over tasks, on the same documents; "
    "intervals 95 %, paired; Holm: corrected over all such comparisons of the model. Change and KL: the first's mean "
    "change of a choice's log-likelihood, and divergence of the choices, over the second's; below 1 it is closer to the "
    "full cache."
)
RANKING = (
    "Policies by the mean over budgets and tasks; equal means share a rank. Differences on the same documents, each "
    "document's answers averaged over the budgets; Holm: corrected over this table."
)
UPPER_MARK = "A policy that is not causal is an oracle (upper bound): it has no rank and is tested against no other."


@dataclass(frozen=True)
class TextTable:
    """A table whose numbers are already written; the columns in `words` are left-aligned."""

    title: str
    frame: pd.DataFrame
    legend: str
    words: tuple[str, ...] = ("Task", "Policy", "Budget", "Schedule", "Factor")


def comparison_tables(comparisons: Sequence[Comparison], percent: bool, note: str = "") -> list[TextTable]:
    """One table per model and shots.

    Args:
        note: what else stands under each.
    """
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
        tables.append(TextTable(title, pd.DataFrame(rows), _legend(COMPARISONS, note)))
    return tables


def ranking_tables(grid: Grid, rankings: Sequence[Sequence[Ranked]], pair: tuple[str, str]) -> list[TextTable]:
    """One table per ranking."""
    tables = []
    for ranking in rankings:
        first, percent = ranking[0], grid.percent
        control = next((r.label for r in ranking if r.policy == pair[1]), None)
        rows = []
        for r in ranking:
            row = {"Rank": DASH if r.rank is None else str(r.rank), "Policy": r.label, "Factor": r.factor}
            row |= {budget: number(value, percent) for budget, value in r.means.items()}
            row["Mean"] = number(r.mean, percent)
            for head, difference, p in (("best", r.to_best, r.p_best), (control, r.to_control, r.p_control)):
                if head is not None:
                    value = None if difference is None else difference.value
                    row[f"{MINUS} {head}"] = number(value, percent, signed=True)
                    row[f"p ({head}, Holm)"] = p_text(p)
            rows.append(row)
        frame = pd.DataFrame(rows)
        for head in ("Factor", "Mean"):
            if (frame[head] == DASH).all() or (head == "Mean" and len(first.means) == 1):
                frame = frame.drop(columns=head)
        several = len({(r[0].schedule) for r in rankings}) > 1
        told = f", schedule {first.schedule}" if several else grid.one_schedule
        title = f"Ranking: {first.model}, {first.shots}-shot, {grid.metric}" + " (%)" * percent + told
        legend = _legend(RANKING, "" if all(r.causal for r in ranking) else UPPER_MARK, texts_note(grid.cells_shown))
        tables.append(TextTable(title, frame, legend))
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
                share, signed = measure == "agreement", measure.endswith("_shift")
                low, value, high = (
                    number(r[measure + end], share, signed=signed, decimals=decimals) for end in ("_low", "", "_high")
                )
                row[head] = f"{value} [{low}, {high}]"
            rows.append(row)
        title = f"Closeness to the full cache: {model}, {shots}-shot, {task}"
        tables.append(TextTable(title, pd.DataFrame(rows), _legend(FIDELITY, texts_note(part.cells_shown))))
    return tables


def against_tables(found: Sequence[Against], percent: bool, note: str = "") -> list[TextTable]:
    """One table per model and shots.

    Args:
        note: what else stands under each.
    """
    tables = []
    for model, shots in dict.fromkeys((a.model, a.shots) for a in found):
        rows = []
        for a in (a for a in found if (a.model, a.shots) == (model, shots)):
            d = a.difference
            row = {"Policy": _named(a.first), "Against": _named(a.second), "Budget": a.first.budget}
            row |= {
                "Difference": number(d.value, percent, signed=True),
                "95 % interval": _interval(d.low, d.high, percent),
            }
            row |= {"p": p_text(d.p), "p (Holm)": p_text(a.p_holm)}
            for measure, head in (("change", "Change"), ("choice_kl", "KL")):
                r = a.ratios.get(measure)
                row[head] = DASH if r is None else f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]"
            rows.append(row)
        title = f"Against the named: {model}, {shots}-shot" + (" (points)" if percent else "")
        tables.append(
            TextTable(title, pd.DataFrame(rows), _legend(AGAINST, note), words=("Policy", "Against", "Budget"))
        )
    return tables


def _named(system: System) -> str:
    return system.label if system.factor == DASH else f"{system.label} {system.factor}"


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


def text_screen(tables: Sequence[TextTable]) -> list[RichTable]:
    """Rich tables."""
    rendered = []
    for table in tables:
        layout = {"title_justify": "left", "caption_justify": "left", "box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
        out = RichTable(title=escape(table.title), caption=escape(table.legend), **layout)  # type: ignore[arg-type]
        for head in map(str, table.frame):
            out.add_column(escape(head), justify="left" if head in table.words else "right", overflow="fold")
        for row in table.frame.to_numpy().tolist():
            out.add_row(*map(escape, row))
        rendered.append(out)
    return rendered


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


def _legend(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _interval(low: float, high: float, percent: bool) -> str:
    return f"[{number(low, percent, signed=True)}, {number(high, percent, signed=True)}]"
