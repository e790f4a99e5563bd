"""Policies ranked by the mean over tasks and budgets, with paired tests against the best and the pair's control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import pandas as pd

from a2sf.analysis.comparisons.pairs import Comparer
from a2sf.analysis.results.grid import DEFAULT_PAIR, Grid, SystemResults
from a2sf.analysis.results.labels import DASH
from a2sf.analysis.statistics.equivalence import Within, verdict
from a2sf.analysis.statistics.families import HOLM, Adjusted, Correction
from a2sf.analysis.statistics.paired import Difference

FEWEST = 3
"""Ranked policies below which there is no table: two are compared already."""


@dataclass(frozen=True)
class Ranked:
    """One policy, with one set of settings and one factor, over all budgets: a row of the ranking.

    Attributes:
        rank: 1 for the best, equal means share one; None for the full cache and for a policy that is not causal.
        means: budget -> average over tasks, in the metric's own unit.
        mean: of these.
        to_best, to_control: this one minus the best, or the pair's control, paired over the same documents; None where it
            is that one itself, or was not tested.
        p_best, p_control: their p-values after correction, in one family.
        to_full: the same against the full cache.
        within: the tests of that against the margin; None where it was not tested.
        p_within: p-value of equivalence after correction, in a family of its own.
    """

    model: str
    shots: int
    schedule: str
    policy: str
    label: str
    factor: str
    causal: bool
    rank: int | None
    means: dict[str, float]
    mean: float
    to_best: Difference | None = None
    to_control: Difference | None = None
    p_best: Adjusted | None = None
    p_control: Adjusted | None = None
    to_full: Difference | None = None
    within: Within | None = None
    p_within: Adjusted | None = None

    @property
    def verdict(self) -> str:
        """Whether it is shown to be within the margin of the full cache: `yes`, `no` or `not shown`; "" if not tested."""
        if self.within is None or self.p_within is None or self.to_full is None:
            return ""
        return verdict(self.p_within.p, self.to_full, self.within.margin)


@dataclass(frozen=True)
class Competitor:
    """The systems of one policy, settings and factor, by budget."""

    systems: dict[str, SystemResults]
    means: dict[str, float]

    @property
    def first(self) -> SystemResults:
        return next(iter(self.systems.values()))

    @property
    def mean(self) -> float:
        return fmean(self.means.values())


def rank(
    grid: Grid, pair: tuple[str, str] = DEFAULT_PAIR, correction: Correction = HOLM, margin: float | None = None
) -> tuple[list[list[Ranked]], list[str]]:
    """One ranking per model, shots and schedule that has at least `FEWEST` policies to rank.

    Args:
        margin: in the metric's unit, within which policies are tested to be of the full cache; None: they are not.

    Returns:
        The rankings, best first, a policy that is not causal and the full cache at the end; and one sentence for each thing
        that was left out.
    """
    rankings: list[list[Ranked]] = []
    notes: list[str] = []
    for model, shots, part in grid.by_model():
        for variant, one in part.by_variant():
            for schedule in one.schedules:
                some = one.with_schedule(schedule)
                where = f"{model}, {shots}-shot" + (f", schedule {schedule}" if len(part.schedules) > 1 else "")
                where += f", {variant}" if variant else ""
                budgets, found, incomplete = _competitors(some)
                comparer = Comparer(some)
                rows = _ranked(found, comparer, pair, (model, shots, schedule), some.higher_is_better)
                if sum(r.rank is not None for r in rows) < FEWEST:
                    continue
                if incomplete:
                    notes.append(
                        f"{where}: not ranked, because a task or one of the budgets {budgets} is missing: "
                        f"{', '.join(incomplete)}."
                    )
                if margin is not None:
                    rows = _against_full(rows, found, some, comparer, margin)
                rankings.append([*rows, *_full(some, rows[0], (model, shots, schedule))])
                notes += comparer.problems
    return _corrected(rankings, correction), list(dict.fromkeys(notes))


def ranking_frame(rankings: list[list[Ranked]]) -> pd.DataFrame:
    """`ranking.csv`: one row per policy and ranking, unrounded, in the metric's own unit."""
    rows = []
    for row in (r for ranking in rankings for r in ranking):
        line = {
            k: getattr(row, k) for k in ("model", "shots", "schedule", "rank", "policy", "label", "factor", "causal")
        }
        line["factor"] = row.factor.replace(DASH, "")
        line |= row.means | {"mean": row.mean}
        for name in ("best", "control"):
            difference: Difference | None = getattr(row, f"to_{name}")
            for part in ("value", "low", "high", "p"):
                line[f"to_{name}:{part}"] = None if difference is None else getattr(difference, part)
            adjusted: Adjusted | None = getattr(row, f"p_{name}")
            if adjusted is not None:
                line |= {f"to_{name}:{k}": v for k, v in adjusted.columns.items()}
        if row.within is not None and row.p_within is not None and row.to_full is not None:
            line |= {f"to_full:{k}": getattr(row.to_full, k) for k in ("value", "low", "high")}
            line |= {"margin": row.within.margin, "within": row.verdict}
            line |= {f"within:{k}": v for k, v in row.p_within.columns.items()}
        rows.append(line)
    frame = pd.DataFrame(rows)
    return frame.astype({"rank": "Int64"}) if len(frame) else frame


def _competitors(part: Grid) -> tuple[str, list[Competitor], list[str]]:
    """The budgets that at least half of the policies have, in words, the policies that have them all, and others' labels.

    The policies come in the order of the ranking, those that are not causal at the end.
    """
    groups: dict[tuple[str, ...], dict[str, SystemResults]] = {}
    for s in part.systems():
        if not s.is_full:
            groups.setdefault((s.policy, s.settings, s.factor, s.variant), {})[s.budget] = s
    complete = {k: [b for b, s in g.items() if s.average(part.tasks) is not None] for k, g in groups.items()}
    every = list(dict.fromkeys(s.budget for s in part.systems() if not s.is_full))
    budgets = [b for b in every if 2 * sum(b in has for has in complete.values()) >= len(complete)]
    found, incomplete = [], []
    for key, group in groups.items():
        if budgets and set(budgets) <= set(complete[key]):
            averages = {b: group[b].average(part.tasks) or 0.0 for b in budgets}
            found.append(Competitor({b: group[b] for b in budgets}, averages))
        else:
            incomplete.append(_named(next(iter(group.values()))))
    sign = -1 if part.higher_is_better else 1
    return ", ".join(budgets), sorted(found, key=lambda c: (not c.first.causal, sign * c.mean)), incomplete


def _ranked(
    found: Sequence[Competitor], comparer: Comparer, pair: tuple[str, str], place: tuple[str, int, str], higher: bool
) -> list[Ranked]:
    """The rows of competitors that come in the order of the ranking."""
    sign = -1 if higher else 1
    fair = [c for c in found if c.first.causal]
    control = next((c for c in fair if c.first.policy == pair[1]), None)
    rows: list[Ranked] = []
    for c in found:
        mine = 1 + sum(sign * other.mean < sign * c.mean for other in fair) if c.first.causal else None
        row = Ranked(
            *place,
            policy=c.first.policy,
            label=c.first.short_label,
            factor=c.first.factor,
            causal=c.first.causal,
            rank=mine,
            means=dict(c.means),
            mean=c.mean,
        )
        if c.first.causal:
            row = replace(row, to_best=_against(comparer, c, fair[0]), to_control=_against(comparer, c, control))
        rows.append(row)
    return rows


def _against_full(
    rows: Sequence[Ranked], found: Sequence[Competitor], part: Grid, comparer: Comparer, margin: float
) -> list[Ranked]:
    """The rows of these competitors, those of causal policies with their tests against the full cache."""
    full = next((s for s in part.systems() if s.is_full and set(part.tasks) <= set(s.keys)), None)
    if full is None:
        return list(rows)
    tested = []
    for row, c in zip(rows, found, strict=True):
        if row.causal:
            sides = [s.keys for s in c.systems.values()], [full.keys] * len(c.systems)
            row = replace(row, to_full=comparer.over_budgets(*sides), within=comparer.within(*sides, margin))
        tested.append(row)
    return tested


def _corrected(rankings: Sequence[Sequence[Ranked]], correction: Correction) -> list[list[Ranked]]:
    """Each ranking is a table; differences are one kind of test, equivalence is another."""
    rows = [row for ranking in rankings for row in ranking]
    tables = [(row.model, i) for i, ranking in enumerate(rankings) for row in ranking]
    differences = [*(r.to_best for r in rows), *(r.to_control for r in rows)]
    of_differences = correction.adjusted([None if d is None else d.p for d in differences], [*tables, *tables])
    equivalences = [None if r.within is None else r.within.p_equivalent for r in rows]
    of_equivalence = correction.adjusted(equivalences, tables)
    to_best, to_control = of_differences[: len(rows)], of_differences[len(rows) :]
    tests = zip(rows, to_best, to_control, of_equivalence, strict=True)
    made = iter([replace(r, p_best=best, p_control=control, p_within=within) for r, best, control, within in tests])
    return [[next(made) for _ in ranking] for ranking in rankings]


def _against(comparer: Comparer, one: Competitor, other: Competitor | None) -> Difference | None:
    if other is None or other is one:
        return None
    return comparer.over_budgets(*([s.keys for s in c.systems.values()] for c in (one, other)))


def _full(part: Grid, like: Ranked, place: tuple[str, int, str]) -> list[Ranked]:
    """The full cache, for reference: the same at each budget."""
    complete = [s for s in part.systems() if s.is_full and s.average(part.tasks) is not None]
    return [
        Ranked(*place, s.policy, s.short_label, DASH, True, None, dict.fromkeys(like.means, value), value)
        for s in complete[:1]
        if (value := s.average(part.tasks)) is not None
    ]


def _named(system: SystemResults) -> str:
    return system.short_label if system.factor == DASH else f"{system.short_label} (factor {system.factor})"
