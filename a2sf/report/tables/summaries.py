"""Paired comparisons and closeness to the full cache as tables of text, for Markdown, LaTeX and the report."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from a2sf.analysis.comparisons.against import Against
from a2sf.analysis.comparisons.pairs import Comparison
from a2sf.analysis.comparisons.ranking import Ranked
from a2sf.analysis.results.documents import texts_note
from a2sf.analysis.results.grid import AVERAGE, Grid, System
from a2sf.analysis.results.labels import DASH, MINUS
from a2sf.report.tables.cells import ORACLE, number
from a2sf.report.tables.text import TextTable

HEADS = {
    "agreement": ("Same answer (%)", 1),
    "gold_shift": ("Δ log-likelihood of the gold answer (nats/token)", 3),
    "margin_shift": ("Δ margin (nats)", 2),
    "change": ("mean |Δ log-likelihood| (nats)", 2),
    "choice_kl": ("KL of the choices (nats)", 3),
}
"""Measure -> heading and decimals."""
COMPARISONS = (
    "Difference of the first minus the second policy on the same documents. Interval: 95 %, paired. Gained and lost: "
    "documents that only the first, or only the second, got right. p: exact McNemar test for a task, sign-flip test for the "
    "average; Holm: corrected over this table. Detectable: the smallest difference these documents show with 80 % "
    "power."
)
FIDELITY = (
    "Against the full cache on the same documents, with paired 95 % intervals. Same answer: share of documents with the "
    "same chosen answer. Δ log-likelihood of the gold answer: its change per token. Δ margin: change of the gold answer's "
    "margin over the best wrong choice. Mean |Δ log-likelihood|: absolute change, mean over the choices. KL of the "
    "choices: Kullback-Leibler divergence of the distribution over the choices from the full cache's."
)
AGAINST = (
    "Each policy minus the one in the second column at the same budget, average over tasks, on the same documents; "
    "intervals 95 %, paired; Holm: corrected over all such comparisons of the model. Ratios: the first's mean "
    "|Δ log-likelihood|, and KL divergence of the choices, over the second's; below 1 the first is closer to the full cache."
)
RANKING = (
    "Policies by the mean over budgets and tasks; equal means share a rank. Differences on the same documents, each "
    "document's answers averaged over the budgets; Holm: corrected over this table."
)
UNRANKED = f"{ORACLE}: it has no rank and is not tested against others."


def comparison_tables(comparisons: Sequence[Comparison], percent: bool, note: str = "") -> list[TextTable]:
    """One table per model and shots.

    Args:
        note: a further note under each.
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
        tables.append(TextTable(title, pd.DataFrame(rows), _legend(COMPARISONS, note), model=model, shots=shots))
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
        more = f", schedule {first.schedule}" if several else grid.one_schedule
        title = f"Ranking: {first.model}, {first.shots}-shot, {grid.metric}" + " (%)" * percent + more
        legend = _legend(
            RANKING,
            "" if all(r.causal for r in ranking) else UNRANKED,
            texts_note(grid.cells_shown),
        )
        tables.append(TextTable(title, frame, legend, model=first.model, shots=first.shots))
    return tables


def fidelity_tables(grid: Grid, fidelity: pd.DataFrame) -> list[TextTable]:
    """One table per model and shots: closeness beside the metric, on the average over tasks (or the only task)."""
    tables = []
    for model, shots, part in grid.by_model():
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
        tables.append(
            TextTable(
                title, pd.DataFrame(rows), _legend(FIDELITY, texts_note(part.cells_shown)), model=model, shots=shots
            )
        )
    return tables


def against_tables(found: Sequence[Against], percent: bool, note: str = "") -> list[TextTable]:
    """One table per model and shots.

    Args:
        note: a further note under each.
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
            for measure, head in (("change", "ratio of mean |Δ log-likelihood|"), ("choice_kl", "ratio of KL")):
                r = a.ratios.get(measure)
                row[head] = DASH if r is None else f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]"
            rows.append(row)
        title = f"Against named policies: {model}, {shots}-shot" + (" (points)" if percent else "")
        tables.append(
            TextTable(
                title,
                pd.DataFrame(rows),
                _legend(AGAINST, note),
                words=("Policy", "Against", "Budget"),
                model=model,
                shots=shots,
            )
        )
    return tables


def _named(system: System) -> str:
    return system.label if system.factor == DASH else f"{system.label} {system.factor}"


def p_text(p: float | None) -> str:
    """A p-value with three decimals."""
    return DASH if p is None or pd.isna(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def _legend(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _interval(low: float, high: float, percent: bool) -> str:
    return f"[{number(low, percent, signed=True)}, {number(high, percent, signed=True)}]"
