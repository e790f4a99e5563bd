"""One verdict on a claim over several models: the pair's difference on the mean over budgets and tasks, pooled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from a2sf.analysis.claims.verdicts import ALPHA, Claim, Verdict, p_words, protocol_differs
from a2sf.analysis.comparisons.pooled import changes_of, pool_over_tasks
from a2sf.analysis.results.grid import DEFAULT_PAIR, Grid, SystemResults
from a2sf.analysis.statistics.pooled import Pooled
from a2sf.errors import UserError

TOO_FEW = "fewer than two of these models were run with both policies."


@dataclass(frozen=True)
class _Common:
    """What several models have in common: the pair's systems at the same budgets, with one factor for all."""

    parts: dict[str, Grid]
    systems: dict[str, list[tuple[SystemResults, SystemResults]]]
    tasks: list[str]

    @property
    def budgets(self) -> list[str]:
        return [first.budget for first, _ in next(iter(self.systems.values()))]


def check_over_models(
    grid: Grid | None, pair: tuple[str, str] = DEFAULT_PAIR, published: pd.DataFrame | None = None
) -> list[Claim]:
    """For each number of shots with two or more models: is the pair's first policy above the second, over the models?

    The difference is the mean over budgets and tasks that all models have, pooled by random effects. Of several forgetting
    factors the one that is best on average over budgets and models is taken for all of them.

    Args:
        grid: what was measured; None where nothing was.
        published: figures, as runs/reference/a2sf_authors_0shot.csv; only their models count then.
    """
    claims = []
    wanted = None if published is None else set(published["model"])
    shots_of = set() if grid is None else set(grid.frame["shots"])
    for shots in sorted(shots_of if published is None else set(published["shots"])):
        parts = {} if grid is None else {m: p for m, s, p in grid.by_model() if s == shots and p.cells}
        parts = parts if wanted is None else {m: p for m, p in parts.items() if m in wanted}
        if len(parts) < 2 and published is None:
            continue
        value, source = (None, "") if published is None else _published(published, shots, pair)
        common = _common(parts, pair)
        models = sorted(common.parts if common is not None else wanted or parts)
        text = f"{', '.join(models)}, {shots}-shot: {pair[0]} above {pair[1]}, over the models"
        if common is None:
            claims.append(Claim(text, Verdict.NOT_RUN, TOO_FEW, value, source=source))
            continue
        claims.append(_claim(text, common, value, source))
    return claims


def _claim(text: str, common: _Common, published: float | None, source: str) -> Claim:
    try:
        pooled = pool_over_tasks(
            [
                [
                    changes_of(common.parts[m], [a.keys[t] for a, _ in pairs], [b.keys[t] for _, b in pairs])
                    for t in common.tasks
                ]
                for m, pairs in common.systems.items()
            ]
        )
    except (UserError, KeyError) as error:
        return Claim(text, Verdict.NOT_RUN, f"it cannot be paired: {error}", published, source=source)
    if pooled is None:
        return Claim(text, Verdict.NOT_RUN, "a task has a single document or text.", published, source=source)
    why = f"{_words(pooled)} on the mean over the budgets {', '.join(common.budgets)}"
    if published is not None:
        differs = {how for p in common.parts.values() if (how := protocol_differs(p, set(common.tasks)))}
        if differs:
            why = f"{'; '.join(sorted(differs))} ({why})."
            return Claim(text, Verdict.PROTOCOL, why, published, pooled.value, source)
    if pooled.p > ALPHA:
        verdict = Verdict.UNCLEAR
    elif pooled.value < 0 or (published is not None and pooled.high < published):
        verdict = Verdict.NOT_REPRODUCED
    else:
        verdict = Verdict.REPRODUCED
    return Claim(text, verdict, f"{why}.", published, pooled.value, source)


def _words(p: Pooled) -> str:
    def points(*values: float) -> str:
        return ", ".join(f"{100 * v:+.1f}" for v in values)

    text = f"{points(p.value)} points; models like these [{points(p.low, p.high)}], {p_words(p.p)}; "
    text += f"these models [{points(p.here_low, p.here_high)}]; standard deviation between models {100 * p.tau:.1f}"
    return text


def _common(parts: Mapping[str, Grid], pair: tuple[str, str]) -> _Common | None:
    found: dict[str, dict[tuple[str, ...], tuple[SystemResults, SystemResults]]] = {}
    for model, part in parts.items():
        systems = part.systems(pair)
        seconds = {(s.budget, s.variant): s for s in reversed(systems) if s.policy == pair[1]}
        found[model] = {
            (s.settings, s.factor, s.variant, s.budget): (s, second)
            for s in systems
            if s.policy == pair[0] and (second := seconds.get((s.budget, s.variant))) is not None
        }
    found = {m: systems for m, systems in found.items() if systems}
    if len(found) < 2:
        return None
    places = set.intersection(*map(set, found.values()))
    tasks = [t for t in next(iter(parts.values())).tasks if all(t in p.tasks for p in parts.values())]
    complete = [
        place
        for place in next(iter(found.values()))  # in the order of budgets
        if place in places and all({*tasks} <= {*s.keys} for two in (f[place] for f in found.values()) for s in two)
    ]
    if not complete or not tasks:
        return None
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for place in complete:
        groups.setdefault(place[:3], []).append(place)

    def mean(places: list[tuple[str, ...]]) -> float:
        return float(np.mean([f[p][0].average(tasks) or 0.0 for f in found.values() for p in places]))

    best = max(groups.values(), key=lambda places: (len(places), mean(places)))
    systems_of = {m: [f[p] for p in best] for m, f in found.items()}
    return _Common({m: parts[m] for m in found}, systems_of, tasks)


def _published(figures: pd.DataFrame, shots: int, pair: tuple[str, str]) -> tuple[float | None, str]:
    """The published difference: its mean over models, budgets and tasks."""
    of_shots = figures[figures["shots"] == shots]
    place = ["model", "budget_ratio", "task"]
    best = [of_shots[of_shots["policy"] == policy].groupby(place)["value"].max() for policy in pair]
    difference = (best[0] - best[1]).dropna()
    source = ", ".join(of_shots["source"].unique()) if len(of_shots) else ""
    return (float(difference.mean()) if len(difference) else None), source
