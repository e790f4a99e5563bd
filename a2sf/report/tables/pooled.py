"""Differences pooled over models as tables of text."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from a2sf.analysis.comparisons.pooled import OverModels, documents_in_words, shown_tasks
from a2sf.analysis.results.grid import STEP
from a2sf.analysis.results.labels import DASH, MINUS
from a2sf.report.tables.cells import interval, number
from a2sf.report.tables.summaries import p_text
from a2sf.report.tables.text import TextTable

MOST_MODELS = 4
"""With more models their own differences stand in models.csv alone."""
LEGEND = (
    "First minus second system on the same documents, averaged over the models {models}; each model counts once. These "
    "models: 95 % interval of that mean, if only other documents were drawn. Models like these: 95 % interval if other "
    "models were drawn as well (random effects); p is for it, {how}. τ: "
    "standard deviation of the true difference between models, in the unit of the difference. I²: share of the variance "
    "between the models' differences that the sampling of documents does not explain."
)
AHEAD = " Another model: 95 % interval of what such a model will show on these documents."


def over_models_tables(
    found: Sequence[OverModels], percent: bool, note: str = "", title: str = "", head: str = "Policy"
) -> list[TextTable]:
    """One table for each number of shots: the average over tasks, or the only task.

    Args:
        note: a further note under each.
        title: what is compared; else the labels of the two systems.
        head: heading of the column of first systems, which a table with a title has.
    """
    tables = []
    for shots in dict.fromkeys(o.shots for o in found):
        of_shots = [o for o in found if o.shots == shots]
        shown = shown_tasks(of_shots)
        models = list(dict.fromkeys(m for o in shown for m in o.by_model))
        several = len({o.schedule for o in shown} - {DASH, STEP, ""}) > 0
        rows = [_row(o, models, percent, head if title else "", several) for o in shown]
        frame = pd.DataFrame(rows)
        empty = [c for c in frame if frame[c].isin(["", DASH]).all()]
        what = title or f"{shown[0].first} {MINUS} {shown[0].second}"
        unit = " (points)" if percent else ""
        tables.append(
            TextTable(
                f"Over {len(models)} models: {what}{'' if shots is None else f', {shots}-shot'}{unit}",
                frame.drop(columns=empty),
                " ".join(filter(None, [_legend(shown, models), note])),
                words=(head, "Budget", "Schedule", "Factor"),
                shots=shots,
            )
        )
    return tables


def _row(o: OverModels, models: Sequence[str], percent: bool, head: str, schedules: bool) -> dict[str, str]:
    p = o.pooled
    row = {head: o.first} if head else {}
    row |= {"Budget": o.budget, **({"Schedule": o.schedule} if schedules else {}), "Factor": o.factor}
    if len(models) <= MOST_MODELS:
        for model in models:
            d = o.by_model.get(model)
            row[model] = DASH if d is None else number(d.value, percent, signed=True)
    else:
        row["Models"] = str(p.models)
    return row | {
        "Mean": number(p.value, percent, signed=True),
        "These models": interval(p.here_low, p.here_high, percent),
        "Models like these": interval(p.low, p.high, percent),
        f"p ({o.adjusted.correction.label})" if o.adjusted else "p": p_text(o.adjusted.p if o.adjusted else p.p),
        "τ": number(p.tau, percent),
        "I²": f"{100 * p.i2:.0f} %",
        "Another model": DASH if p.next_low is None else interval(p.next_low, p.next_high, percent),
    }


def _legend(shown: Sequence[OverModels], models: Sequence[str]) -> str:
    how = shown[0].adjusted.how if shown[0].adjusted else "not corrected"
    text = LEGEND.format(models=", ".join(models), how=how)
    if any(o.pooled.next_low is not None for o in shown):
        text += AHEAD
    if any(len(o.by_model) < len(models) for o in shown):
        text += " A row is over the models that have both systems."
    return f"{text} {documents_in_words(shown)}."
