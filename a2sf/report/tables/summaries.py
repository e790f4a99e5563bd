"""Paired comparisons and closeness to the full cache as tables of text, for Markdown, LaTeX and the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from a2sf.analysis.comparisons.against import Against
from a2sf.analysis.comparisons.pairs import Comparison
from a2sf.analysis.comparisons.ranking import Ranked
from a2sf.analysis.comparisons.stopped import Stopped
from a2sf.analysis.results.chance import chance_levels
from a2sf.analysis.results.documents import texts_note
from a2sf.analysis.results.grid import AVERAGE, Grid
from a2sf.analysis.results.labels import DASH, MINUS
from a2sf.analysis.statistics.families import HOLM, Adjusted
from a2sf.report.tables.cells import ORACLE, interval, margin_text, number, within_legend
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
    "average; p ({label}): {how}. Detectable: the smallest difference these documents show with 80 % power."
)
FIDELITY = (
    "Against the full cache on the same documents, with paired 95 % intervals. Same answer: share of documents with the "
    "same chosen answer. Δ log-likelihood of the gold answer: its change per token. Δ margin: change of the gold answer's "
    "margin over the best wrong choice. Mean |Δ log-likelihood|: absolute change, mean over the choices. KL of the "
    "choices: Kullback-Leibler divergence of the distribution over the choices from the full cache's."
)
AGAINST = (
    "Each policy minus the one in the second column at the same budget, average over tasks, on the same documents; "
    "intervals 95 %, paired; p ({label}): {how}. Ratios: the first's mean "
    "|Δ log-likelihood|, and KL divergence of the choices, over the second's; below 1 the first is closer to the full cache."
)
RANKING = (
    "Policies by the mean over budgets and tasks; equal means share a rank. Differences on the same documents, each "
    "document's answers averaged over the budgets."
)
STOPPED = (
    "Difference: confidence interval of the first minus the second on all documents, which holds at all times together. "
    "e-value: the evidence for a difference; its mean is at most 1 where there is none. Differs: shown among {tests} "
    "comparisons over all tasks (e-BH: on average at most 5 % of those shown are false)."
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
        adjusted = _first(c.adjusted for c in part)
        rows = []
        for c in part:
            d = c.difference
            rows.append(
                {
                    "Task": c.task,
                    "Budget": c.budget,
                    "Factor": c.factor,
                    "Difference": number(d.value, percent, signed=True),
                    "95 % interval": interval(d.low, d.high, percent),
                    "Gained": DASH if d.gained is None else str(d.gained),
                    "Lost": DASH if d.lost is None else str(d.lost),
                    "p": p_text(d.p),
                    f"p ({adjusted.correction.label})": p_text(c.adjusted.p if c.adjusted else None),
                    "Detectable": number(d.detectable, percent),
                    "n": str(d.n),
                }
            )
        title = f"{part[0].first} against {part[0].second}: {model}, {shots}-shot" + (" (points)" if percent else "")
        tables.append(
            TextTable(
                title, pd.DataFrame(rows), _legend(_filled(COMPARISONS, adjusted), note), model=model, shots=shots
            )
        )
    return tables


def ranking_tables(grid: Grid, rankings: Sequence[Sequence[Ranked]], pair: tuple[str, str]) -> list[TextTable]:
    """One table per ranking."""
    tables = []
    several = len({ranking[0].schedule for ranking in rankings}) > 1
    for ranking in rankings:
        first, percent = ranking[0], grid.percent
        control = next((r.label for r in ranking if r.policy == pair[1]), None)
        tests = [t for r in ranking for t in (r.p_best, r.p_control) if t is not None]
        rows = [_ranked_row(r, control, percent, _first(tests), ranking) for r in ranking]
        frame = pd.DataFrame(rows)
        for head in ("Factor", "Mean"):
            if (frame[head] == DASH).all() or (head == "Mean" and len(first.means) == 1):
                frame = frame.drop(columns=head)
        more = f", schedule {first.schedule}" if several else grid.one_schedule
        title = f"Ranking: {first.model}, {first.shots}-shot, {grid.metric}" + " (%)" * percent + more
        part = next(p for model, shots, p in grid.by_model() if (model, shots) == (first.model, first.shots))
        legend = _legend(
            RANKING,
            f"p: {_first(tests).how}." if tests else "",
            _shown_within(ranking, percent),
            sizes_note(part),
            "" if all(r.causal for r in ranking) else UNRANKED,
            texts_note(grid.cells_shown),
        )
        tables.append(TextTable(title, frame, legend, model=first.model, shots=first.shots))
    return tables


def _ranked_row(
    r: Ranked, control: str | None, percent: bool, test: Adjusted, ranking: Sequence[Ranked]
) -> dict[str, str]:
    row = {"Rank": DASH if r.rank is None else str(r.rank), "Policy": r.label, "Factor": r.factor}
    row |= {budget: number(value, percent) for budget, value in r.means.items()}
    row["Mean"] = number(r.mean, percent)
    for head, difference, p in (("best", r.to_best, r.p_best), (control, r.to_control, r.p_control)):
        if head is not None:
            value = None if difference is None else difference.value
            row[f"{MINUS} {head}"] = number(value, percent, signed=True)
            row[f"p ({head}, {test.correction.label})"] = p_text(p.p if p else None)
    margin = next((x.within.margin for x in ranking if x.within), None)
    if margin is not None:
        d = r.to_full
        row[f"{MINUS} full cache"] = DASH if d is None else number(d.value, percent, signed=True)
        row["95 % interval"] = DASH if d is None else interval(d.low, d.high, percent)
        row[f"Within {margin_text(margin, percent)}"] = r.verdict or DASH
    return row


def _shown_within(ranking: Sequence[Ranked], percent: bool) -> str:
    """Which policies are shown to be as good as the full cache, in words; "" where that was not tested."""
    tested = [(r, r.within, r.p_within) for r in ranking if r.within is not None and r.p_within is not None]
    if not tested:
        return ""
    _, within, test = tested[0]
    names = [
        r.label if r.factor == DASH else f"{r.label} (factor {r.factor})" for r, *_ in tested if r.verdict == "yes"
    ]
    text = margin_text(within.margin, percent)
    shown = f"Shown to be within {text} of the full cache: {', '.join(names) or 'none'}."
    return f"{within_legend(within.margin, percent, 'the mean', test)} {shown}"


def sizes_note(part: Grid) -> str:
    """The documents and the chance level of a grid with one model and number of shots, for a caption."""
    documents = part.frame.groupby("task")["n"].max()
    column = AVERAGE if len(documents) > 1 else str(documents.index[0])
    chance = chance_levels(part).get(column)
    level = "" if chance is None else f", chance level {number(chance, part.percent)}{' %' * part.percent}"
    tasks = f" in {len(documents)} tasks" if len(documents) > 1 else ""
    return f"n = {documents.sum():,} documents{tasks}{level}."


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
                title,
                pd.DataFrame(rows),
                _legend(FIDELITY, sizes_note(part), texts_note(part.cells_shown)),
                model=model,
                shots=shots,
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
        part = [a for a in found if (a.model, a.shots) == (model, shots)]
        adjusted = _first(a.adjusted for a in part)
        rows = []
        for a in part:
            d = a.difference
            row = {"Policy": a.first.named, "Against": a.second.named, "Budget": a.first.budget}
            row |= {
                "Difference": number(d.value, percent, signed=True),
                "95 % interval": interval(d.low, d.high, percent),
            }
            row |= {"p": p_text(d.p), f"p ({adjusted.correction.label})": p_text(a.adjusted.p if a.adjusted else None)}
            for measure, head in (("change", "ratio of mean |Δ log-likelihood|"), ("choice_kl", "ratio of KL")):
                r = a.ratios.get(measure)
                row[head] = DASH if r is None else f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]"
            rows.append(row | {"n": str(d.n)})
        title = f"Against named policies: {model}, {shots}-shot" + (" (points)" if percent else "")
        tables.append(
            TextTable(
                title,
                pd.DataFrame(rows),
                _legend(_filled(AGAINST, adjusted), note),
                words=("Policy", "Against", "Budget"),
                model=model,
                shots=shots,
            )
        )
    return tables


def stopped_tables(found: Sequence[Stopped], percent: bool) -> list[TextTable]:
    """Comparisons of early stopping: one table per model and shots."""
    tables = []
    for model, shots in dict.fromkeys((c.model, c.shots) for c in found):
        part = [c for c in found if (c.model, c.shots) == (model, shots)]
        rows = [
            {
                "Task": c.task,
                "First": c.first,
                "Second": c.second,
                "Budget": c.budget,
                "Schedule": c.schedule,
                "Documents": f"{c.seen} of {c.of}",
                "Difference": interval(c.low, c.high, percent),
                "e-value": f"{c.e:.3g}",
                "Differs": "yes" if c.differs else "not shown",
            }
            for c in part
        ]
        frame = pd.DataFrame(rows)
        if (frame["Schedule"] == frame["Schedule"].iloc[0]).all():
            frame = frame.drop(columns="Schedule")
        title = f"Early stopping: {model}, {shots}-shot" + (" (points)" if percent else "")
        words = ("Task", "First", "Second", "Budget", "Schedule", "Documents")
        legend = STOPPED.format(tests=part[0].tests)
        tables.append(TextTable(title, frame, legend, words=words, model=model, shots=shots))
    return tables


def p_text(p: float | None) -> str:
    """A p-value with three decimals."""
    return DASH if p is None or pd.isna(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def _legend(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _first(tests: Iterable[Adjusted | None]) -> Adjusted:
    """A test that stands for its family: the correction and the number of tests are the same in all."""
    return next((t for t in tests if t is not None), Adjusted(1.0, 1, HOLM))


def _filled(legend: str, adjusted: Adjusted) -> str:
    return legend.format(label=adjusted.correction.label, how=adjusted.how)
