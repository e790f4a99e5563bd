"""Policies ranked by the mean over tasks and budgets, with paired tests against the best and the pair's control."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean

import pandas as pd

from a2sf.analysis.comparisons.pairs import Comparer
from a2sf.analysis.results.grid import DEFAULT_PAIR, Grid, System
from a2sf.analysis.results.labels import DASH
from a2sf.analysis.statistics.paired import Difference, holm

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
        p_best, p_control: p-values of both, Holm-corrected over the table.
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
    p_best: float | None = None
    p_control: float | None = None


@dataclass(frozen=True)
class Competitor:
    """The systems of one policy, settings and factor, by budget."""

    systems: dict[str, System]
    means: dict[str, float]

    @property
    def first(self) -> System:
        return next(iter(self.systems.values()))

    @property
    def mean(self) -> float:
        return fmean(self.means.values())


def rank(grid: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> tuple[list[list[Ranked]], list[str]]:
    """One ranking per model, shots and schedule that has at least `FEWEST` policies to rank.

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
                rankings.append([*rows, *_full(some, rows[0], (model, shots, schedule))])
                notes += comparer.problems
    return rankings, list(dict.fromkeys(notes))


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
            line[f"to_{name}:p_holm"] = getattr(row, f"p_{name}")
        rows.append(line)
    frame = pd.DataFrame(rows)
    return frame.astype({"rank": "Int64"}) if len(frame) else frame


def _competitors(part: Grid) -> tuple[str, list[Competitor], list[str]]:
    """The budgets that at least half of the policies have, in words, those that have them all, and the labels of others."""
    groups: dict[tuple[str, ...], dict[str, System]] = {}
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
    return ", ".join(budgets), found, incomplete


def _ranked(
    found: list[Competitor], comparer: Comparer, pair: tuple[str, str], place: tuple[str, int, str], higher: bool
) -> list[Ranked]:
    sign = -1 if higher else 1
    found = sorted(found, key=lambda c: (not c.first.causal, sign * c.mean))
    fair = [c for c in found if c.first.causal]
    control = next((c for c in fair if c.first.policy == pair[1]), None)
    rows: list[Ranked] = []
    for c in found:
        mine = 1 + sum(sign * other.mean < sign * c.mean for other in fair) if c.first.causal else None
        row = Ranked(
            *place,
            c.first.policy,
            c.first.short_label,
            c.first.factor,
            c.first.causal,
            mine,
            dict(c.means),
            mean=c.mean,
        )
        if c.first.causal:
            row = replace(row, to_best=_against(comparer, c, fair[0]), to_control=_against(comparer, c, control))
        rows.append(row)
    tests = [(i, name) for i, r in enumerate(rows) for name in ("best", "control") if getattr(r, f"to_{name}")]
    for (i, name), p in zip(tests, holm([getattr(rows[i], f"to_{n}").p for i, n in tests]), strict=True):
        rows[i] = replace(rows[i], p_best=p) if name == "best" else replace(rows[i], p_control=p)
    return rows


def _against(comparer: Comparer, one: Competitor, other: Competitor | None) -> Difference | None:
    if other is None or other is one:
        return None
    return comparer.over_budgets(*([s.keys for s in c.systems.values()] for c in (one, other)))


def _full(part: Grid, like: Ranked, place: tuple[str, int, str]) -> list[Ranked]:
    """The full cache, for reference: the same at each budget."""
    complete = [s for s in part.systems() if s.is_full and s.average(part.tasks) is not None]
    return [
        Ranked(*place, s.policy, s.short_label, DASH, True, None, dict.fromkeys(like.means, value), mean=value)
        for s in complete[:1]
        if (value := s.average(part.tasks)) is not None
    ]


def _named(system: System) -> str:
    return system.short_label if system.factor == DASH else f"{system.short_label} (factor {system.factor})"
