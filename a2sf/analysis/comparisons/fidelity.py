"""How close a pruned cache stays to the full one, document by document, whether or not the answer is right.

Five measures against the full-cache cell of the same model, task and shots (docs/statistics.md says how to read them):

agreement     share of documents with the same chosen answer
gold_shift    change of the gold answer's log-likelihood, in nats per token of that answer
margin_shift  change of its margin over the best wrong choice, in nats (sums over the continuation, as scored)
change        absolute change of a choice's log-likelihood, in nats (sums), mean over all choices
choice_kl     Kullback-Leibler divergence of the distribution over the choices (softmax of the sums) from the full cache's
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.special import log_softmax
from statsmodels.stats.proportion import proportion_confint

from a2sf.analysis.results.documents import paired_documents, texts_of
from a2sf.analysis.results.grid import AVERAGE, Grid, SystemResults
from a2sf.analysis.statistics.paired import bootstrap_means, interval
from a2sf.analysis.statistics.texts import TextClusters, tail_of
from a2sf.errors import UserError
from a2sf.store.runs import StoredCell

MEASURES = {
    "agreement": "same answer as full cache",
    "gold_shift": "Δ log-likelihood of the gold answer (nats/token)",
    "margin_shift": "Δ margin of the gold answer (nats)",
    "change": "mean |Δ log-likelihood| of the choices (nats)",
    "choice_kl": "KL divergence of the choices (nats)",
}


def changes(pruned: StoredCell, full: StoredCell, common: bool = False) -> tuple[pd.DataFrame, TextClusters]:
    """One row per document of what two cells share, one column per measure; NaN where a document has no gold answer.

    Returns:
        The measures, and which of the documents share a text.

    Raises:
        UserError: if the documents differ, cannot be read, or have no choices.
    """
    left, right = paired_documents(pruned, full, common)
    if (left["prediction"] < 0).any():
        raise UserError(f"{pruned.cell['task']} has no choices, so there is no answer to agree with.")
    here, there = _gold_and_margin(left), _gold_and_margin(right)
    measured = pd.DataFrame(
        {
            "agreement": (left["prediction"].to_numpy() == right["prediction"].to_numpy()).astype(float),
            "gold_shift": here[:, 0] - there[:, 0],
            "margin_shift": here[:, 1] - there[:, 1],
            **_of_choices(left, right),
        }
    )
    return measured, texts_of(left, right)


def fidelity_frame(grid: Grid) -> tuple[pd.DataFrame, list[str]]:
    """Every pruned cell against its full-cache cell, and the average over tasks.

    Returns:
        One row per system and task: the measures with `<measure>_low` and `<measure>_high`, paired 95 % intervals; and
        one sentence for each thing that could not be compared.
    """
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for model, shots, part in grid.by_model():
        systems = part.systems()
        fulls = {s.variant: s for s in systems if s.is_full}
        if not fulls and part.cells:
            notes.append(f"{model}, {shots}-shot: no full-cache result, so there is no fidelity to it.")
        for system in systems:
            full = fulls.get(system.variant)
            if system.is_full or full is None:
                continue
            where = {"model": model, "shots": shots, "policy": system.policy, "label": system.label}
            where |= {"budget": system.budget, "factor": system.factor}
            for task, measured in _of_system(part, system, full, notes):
                rows.append(where | {"task": task} | measured)
    return pd.DataFrame(rows), list(dict.fromkeys(notes))


def _of_system(
    part: Grid, system: SystemResults, full: SystemResults, notes: list[str]
) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    values, means, texts = [], [], []
    for index, task in enumerate(part.tasks):
        if not {system.keys.get(task), full.keys.get(task)} <= part.cells.keys():
            continue
        try:
            measures, of = changes(part.cells[system.keys[task]], part.cells[full.keys[task]], part.mixed)
        except UserError as error:
            notes.append(str(error))
            continue
        changed = measures.to_numpy()
        values.append(changed.mean(axis=0))
        means.append(bootstrap_means(changed, index, of))
        texts.append(of)
        summary = _summary(len(changed), values[-1], means[-1], tail_of([of]))
        # Wilson: resampling documents that all agree would say that disagreement is impossible
        share = of.effective_share(changed[:, 0])
        bounds = proportion_confint(share * changed[:, 0].sum(), share * len(changed), of.error_rate, method="wilson")
        summary |= {f"agreement_{end}": float(bound) for end, bound in zip(("low", "high"), bounds, strict=True)}
        found.append((task, summary))
    if len(values) == len(part.tasks) > 1:
        total = sum(summary["n"] for _, summary in found)
        sizes = [summary["n"] for _, summary in found] if part.by_documents else None
        mean, resampled = (np.average(x, axis=0, weights=sizes) for x in (values, means))
        found.append((AVERAGE, _summary(total, mean, resampled, tail_of(texts))))
    return found


def _summary(n: int, values: np.ndarray, means: np.ndarray, tail: float) -> dict[str, Any]:
    """Measures ([5]) with the intervals of their bootstrap means ([resamples, 5])."""
    out: dict[str, Any] = {"n": n}
    for i, measure in enumerate(MEASURES):
        low, high = interval(means[:, i], tail)
        out |= {measure: float(values[i]), f"{measure}_low": low, f"{measure}_high": high}
    return out


def _of_choices(left: pd.DataFrame, right: pd.DataFrame) -> dict[str, np.ndarray]:
    """`change` and `choice_kl` of each document, [n] each."""
    pairs = [
        (np.asarray(a, float), np.asarray(b, float))
        for a, b in zip(left["loglikelihoods"], right["loglikelihoods"], strict=True)
    ]
    normalised = [(log_softmax(a), log_softmax(b)) for a, b in pairs]
    return {
        "change": np.array([abs(a - b).mean() for a, b in pairs]),
        "choice_kl": np.array([(np.exp(full) * (full - pruned)).sum() for pruned, full in normalised]),
    }


def _gold_and_margin(documents: pd.DataFrame) -> np.ndarray:
    """[n, 2] the gold answer's log-likelihood per token, and its margin over the best wrong choice."""
    out = np.full((len(documents), 2), np.nan)
    columns = documents["gold"], documents["loglikelihoods"], documents["continuation_tokens"]
    for i, (gold, logs, tokens) in enumerate(zip(*columns, strict=True)):
        if gold >= 0:
            out[i, 0] = logs[gold] / max(1, tokens[gold])
            if len(logs) > 1:
                out[i, 1] = logs[gold] - max(v for j, v in enumerate(logs) if j != gold)
    return out
