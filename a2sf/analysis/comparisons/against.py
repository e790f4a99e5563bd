"""Every policy against named ones at the same budget: accuracy, and how far each stays from the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from a2sf.analysis.comparisons.fidelity import changes
from a2sf.analysis.comparisons.pairs import Comparer
from a2sf.analysis.results.grid import Grid, SystemResults
from a2sf.analysis.statistics.families import Adjusted, Correction
from a2sf.analysis.statistics.paired import Difference, bootstrap_means, interval
from a2sf.analysis.statistics.texts import TextClusters, tail_of
from a2sf.errors import UserError, nearest

OF_MODEL = Correction("model")
RATIOS = ("change", "choice_kl")
"""Measures of closeness whose ratio is given: below 1, the first stays closer to the full cache than the second."""


@dataclass(frozen=True)
class Ratio:
    """A mean over that of another system on the same documents, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Against:
    """One system and a named one at the same budget and schedule, averaged over tasks.

    Attributes:
        first, second: `difference` is first minus second, of the grid's metric.
        ratios: `RATIOS` -> the first's mean over the second's; empty without a full-cache result.
        adjusted: the difference's p-value after correction; None until corrected.
    """

    model: str
    shots: int
    first: SystemResults
    second: SystemResults
    difference: Difference
    ratios: dict[str, Ratio]
    adjusted: Adjusted | None = None


def compare_against(
    grid: Grid, policies: Sequence[str], correction: Correction = OF_MODEL
) -> tuple[list[Against], list[str]]:
    """Every causal pruned system against those of `policies` at the same budget and schedule.

    Systems that lack a task are left out. There is a table for each model and number of shots.

    Returns:
        The comparisons, and one sentence for each thing that could not be compared.

    Raises:
        UserError: if none of the results are of one of the policies.
    """
    known = sorted(grid.frame.loc[~grid.frame["is_full"], "policy"].unique())
    for policy in policies:
        if policy not in known:
            raise UserError(
                f"--against {policy}: there is no pruned result of it, only of {', '.join(known)}{nearest(policy, known)}."
            )
    found: list[Against] = []
    notes: list[str] = []
    for model, shots, part in grid.by_model():
        complete = [s for s in part.systems() if s.causal and set(part.tasks) <= set(s.keys)]
        fulls = {s.variant: s for s in complete if s.is_full}
        pruned = [s for s in complete if not s.is_full]
        comparer, closeness = Comparer(part), _Closeness(part, notes)
        for second in (s for name in policies for s in pruned if s.policy == name):
            place = (second.budget, second.schedule, second.variant)
            for first in pruned:
                if (first.budget, first.schedule, first.variant) != place or first.policy in policies:
                    continue
                difference = comparer.average(first.keys, second.keys)
                if difference is None:
                    continue
                full = fulls.get(second.variant)
                ratios = {} if full is None else closeness.ratios(first, second, full)
                found.append(Against(model, shots, first, second, difference, ratios))
        notes += comparer.problems
    adjusted = correction.adjusted([a.difference.p for a in found], [(a.model, a.shots) for a in found])
    return [replace(a, adjusted=p) for a, p in zip(found, adjusted, strict=True)], list(dict.fromkeys(notes))


def against_frame(found: Sequence[Against]) -> pd.DataFrame:
    """`against.csv`: one row per comparison, unrounded, in the metric's own unit."""
    rows = []
    for a in found:
        row: dict[str, Any] = {"model": a.model, "shots": a.shots, "budget": a.first.budget}
        for side, system in (("first", a.first), ("second", a.second)):
            row |= {side: system.label, f"{side}_factor": system.factor}
        row |= {k: getattr(a.difference, k) for k in ("n", "value", "low", "high", "p")}
        row |= a.adjusted.columns if a.adjusted else {}
        for measure, ratio in a.ratios.items():
            row |= {f"{measure}_ratio": ratio.value, f"{measure}_low": ratio.low, f"{measure}_high": ratio.high}
        rows.append(row)
    return pd.DataFrame(rows)


class _Closeness:
    """Means of `RATIOS` of the systems of one part, over tasks, with their bootstrap means."""

    def __init__(self, part: Grid, notes: list[str]) -> None:
        self.part, self.notes = part, notes
        self.known: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray, list[TextClusters]] | None] = {}

    def ratios(self, first: SystemResults, second: SystemResults, full: SystemResults) -> dict[str, Ratio]:
        """Paired: both systems' means are of the same resampled documents."""
        one, other = self._means(first, full), self._means(second, full)
        if one is None or other is None:
            return {}
        values = one[0] / other[0]
        spread = one[1] / other[1]  # [resamples, measures]
        return {m: Ratio(float(values[i]), *interval(spread[:, i], tail_of(one[2]))) for i, m in enumerate(RATIOS)}

    def _means(
        self, system: SystemResults, full: SystemResults
    ) -> tuple[np.ndarray, np.ndarray, list[TextClusters]] | None:
        key = tuple(system.keys[t] for t in self.part.tasks)
        if key not in self.known:
            self.known[key] = self._measured(system, full)
        return self.known[key]

    def _measured(
        self, system: SystemResults, full: SystemResults
    ) -> tuple[np.ndarray, np.ndarray, list[TextClusters]] | None:
        values, means, texts = [], [], []
        for index, task in enumerate(self.part.tasks):
            cells = [self.part.cells.get(s.keys[task]) for s in (system, full)]
            if cells[0] is None or cells[1] is None:
                return None
            try:
                measures, of = changes(cells[0], cells[1], self.part.mixed)
            except UserError as error:
                self.notes.append(str(error))
                return None
            changed = measures[list(RATIOS)].to_numpy()
            values.append(changed.mean(0))
            means.append(bootstrap_means(changed, index, of))
            texts.append(of)
        sizes = [len(t.of) for t in texts] if self.part.by_documents else None
        return np.average(values, axis=0, weights=sizes), np.average(means, axis=0, weights=sizes), texts
