"""Published claims compared with measured results, each with a verdict and the reason for it.

Figures (one accuracy each) are compared with the published number; headlines and the shape of the results (order of
policies, difference by budget, place of the best factor) with paired tests on our own documents. docs/statistics.md
gives the rules in words.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd

from a2sf.analysis.comparisons.pairs import Comparer
from a2sf.analysis.results.grid import DEFAULT_PAIR, Grid, SystemResults
from a2sf.analysis.statistics.equivalence import Within, points, verdict
from a2sf.analysis.statistics.paired import Difference, holm
from a2sf.analysis.statistics.texts import CONFIDENCE, Z

TOLERANCE = 0.01
"""A figure that is this close (one point of accuracy) to the published one is the same figure."""
MARGIN = 0.01
"""Within which two systems are as good as each other, if no other margin is given."""
PUBLISHED_DTYPE = "float16"
ALPHA = 1 - CONFIDENCE
Row = Mapping[Hashable, Any]
NO_CELL = "the sweep has no such cell"


class Verdict(StrEnum):
    """What became of a claim."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    EQUAL = "equal within the margin"
    UNCLEAR = "not distinguishable at this n"
    PROTOCOL = "protocol differs"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Claim:
    """One claim and its verdict.

    Attributes:
        claim: what was published, in words.
        published, measured: the numbers, as shares; None where a claim has none or nothing was measured.
        why: the reason for the verdict, one sentence.
        source: where the claim was published.
    """

    claim: str
    verdict: Verdict
    why: str
    published: float | None = None
    measured: float | None = None
    source: str = ""


def check_figures(published: pd.DataFrame, grid: Grid | None, why_not: Mapping[str, str]) -> list[Claim]:
    """Every published accuracy against the cell with the same model, policy, budget, factor, shots and task.

    Args:
        published: as runs/reference/a2sf_authors_0shot.csv.
        grid: what was measured; None where nothing was.
        why_not: model -> why a cell of it that is missing was not run; `NO_CELL` for a model that is not there.
    """
    measured = {} if grid is None else {_place(row): row for row in grid.frame.to_dict("records")}
    claims = []
    for row in published.to_dict("records"):
        text = f"{row['model']} {row['policy']}"
        text += "" if float(row["budget_ratio"]) >= 1 else f" at budget {row['budget_ratio']:g}"
        text += f", {row['task']}, {row['shots']}-shot"
        found = measured.get(_place(row))
        if found is None:
            why = why_not.get(row["model"], NO_CELL)
            claims.append(Claim(text, Verdict.NOT_RUN, why, row["value"], source=row["source"]))
            continue
        became, why = _figure(row, found)
        claims.append(Claim(text, became, why, row["value"], found["value"], row["source"]))
    return claims


@dataclass(frozen=True)
class Gain:
    """A difference at one budget, with its tests against the margin."""

    budget: str
    difference: Difference
    within: Within


def check_headline(row: Row, grid: Grid | None, why_not: Mapping[str, str], margin: float = MARGIN) -> Claim:
    """A claim of the form "up to +x points over the earlier methods", on the average over the tasks it names.

    Args:
        row: of runs/reference/a2sf_headlines.csv.
        why_not: as for `check_figures`.
        margin: within which the two are as good as each other.
    """
    text, published, source = f"{row['model']}: {row['claim']}", float(str(row["value"])), str(row["source"])
    parts = [] if grid is None else grid.by_model()
    part = next((p for model, shots, p in parts if (model, shots) == (row["model"], row["shots"])), None)
    others = str(row["others"]).split("/")
    gains = _gains(part, str(row["first"]), others, margin) if part is not None else []
    if part is None or not gains:
        return Claim(text, Verdict.NOT_RUN, why_not.get(str(row["model"]), NO_CELL), published, source=source)
    index = max(range(len(gains)), key=lambda i: gains[i].difference.value)
    best, corrected = gains[index].difference, holm([g.difference.p for g in gains])[index]
    if how := protocol_differs(part, set(str(row["tasks"]).split("/"))):
        return Claim(text, Verdict.PROTOCOL, how, published, best.value, source)
    gain = f"the largest gain is {_points(best)} at budget {gains[index].budget}"
    if best.high < published:
        return Claim(text, Verdict.NOT_REPRODUCED, f"{gain}, below the claim.", published, best.value, source)
    if corrected > ALPHA:
        why = f"{gain}, not significantly different from zero ({p_words(corrected)}, Holm); {_within(gains)[index][1]}."
        return Claim(text, Verdict.UNCLEAR, why, published, best.value, source)
    return Claim(text, Verdict.REPRODUCED, f"{gain}, {p_words(corrected)} (Holm).", published, best.value, source)


def check_shape(
    grid: Grid, policies: Collection[str], factors: tuple[float, float] = (0.1, 0.3), margin: float = MARGIN
) -> list[Claim]:
    """The shape of the published results on whatever model was run: order, differences, place of the best factor.

    Args:
        policies: those with published figures; of others no order was claimed.
        factors: the range in which the published best factors lie.
        margin: within which two systems are as good as each other.
    """
    claims: list[Claim] = []
    first, second = DEFAULT_PAIR
    for model, shots, part in grid.by_model():
        systems = [s for s in part.systems() if s.average(part.tasks) is not None]
        where = f"{model}, {shots}-shot"
        gains = _gains(part, first, [second], margin)
        for gain, p, within in zip(gains, holm([g.difference.p for g in gains]), _within(gains), strict=True):
            text = f"{where}: {first} above {second} at budget {gain.budget}"
            claims.append(_sign_claim(text, gain.difference, p, *within))
        if not gains:
            claims.append(Claim(f"{where}: {first} above {second}", Verdict.NOT_RUN, "no common budget was run."))
        claims += _order(where, part, [s for s in systems if s.policy in policies], margin)
        claims += check_factor(part, factors)
    return claims


def check_factor(grid: Grid, factors: tuple[float, float] = (0.1, 0.3)) -> list[Claim]:
    """Only the place of the best factor, for a sweep over factors; arguments as for `check_shape`."""
    claims = []
    for model, shots, part in grid.by_model():
        systems = [s for s in part.systems() if s.policy == DEFAULT_PAIR[0] and s.average(part.tasks) is not None]
        claims.append(_best_factor(f"{model}, {shots}-shot", part, systems, factors))
    return claims


def _figure(published: Row, found: Row) -> tuple[Verdict, str]:
    value, claimed = float(str(found["value"])), float(str(published["value"]))
    n, claimed_n = int(str(found["n"])), int(str(published["n"]))
    differs = [f"{n} documents, published {claimed_n}"] if n != claimed_n else []
    if found["dtype"] != PUBLISHED_DTYPE:
        differs.append(f"{found['dtype']}, published {PUBLISHED_DTYPE}")
    gap = f"{100 * (value - claimed):+.1f} points from the published figure"
    if differs:
        return Verdict.PROTOCOL, f"{'; '.join(differs)} ({gap})."
    if abs(value - claimed) <= TOLERANCE + 1e-9:
        return Verdict.REPRODUCED, f"{gap}, within {100 * TOLERANCE:g}."
    error = float(np.sqrt(value * (1 - value) / n + claimed * (1 - claimed) / claimed_n))
    if abs(value - claimed) <= Z * error:
        return (
            Verdict.UNCLEAR,
            f"{gap}; with {n} documents a difference below {100 * Z * error:.1f} is not significant.",
        )
    return Verdict.NOT_REPRODUCED, f"{gap}, more than the sampling error of {n} documents ({100 * Z * error:.1f})."


def _gains(part: Grid, first: str, others: Sequence[str], margin: float) -> list[Gain]:
    """At each budget, `first` (its best factor over all budgets) minus the best of `others`, averaged over tasks."""
    complete = [s for s in part.systems() if s.average(part.tasks) is not None]
    candidates = _one_factor([s for s in complete if s.policy == first], part)
    comparer = Comparer(part)
    gains = []
    for system in candidates:
        rivals = [
            s for s in complete if s.policy in others and (s.budget, s.variant) == (system.budget, system.variant)
        ]
        if rivals:
            best = max(rivals, key=lambda s: s.average(part.tasks) or 0.0)
            difference = comparer.average(system.keys, best.keys)
            within = comparer.within([system.keys], [best.keys], margin)
            if difference is not None and within is not None:
                gains.append(Gain(system.budget, difference, within))
    return gains


def _within(gains: Sequence[Gain]) -> list[tuple[str, str]]:
    """Of each gain `yes`, `no` or `not shown`, Holm-corrected over all, and the same as a clause."""
    found = []
    for gain, p in zip(gains, holm([g.within.p_equivalent for g in gains]), strict=True):
        answer = verdict(p, gain.difference, gain.within.margin)
        found.append((answer, f"within {points(gain.within.margin)}: {answer}"))
    return found


def _one_factor(systems: list[SystemResults], part: Grid) -> list[SystemResults]:
    """The systems of one forgetting factor, the best on average: choosing one per budget would flatter the method."""
    groups: dict[tuple[str, ...], list[SystemResults]] = {}
    for s in systems:
        groups.setdefault((s.settings, s.factor, s.variant), []).append(s)
    return max(groups.values(), key=lambda g: (len(g), np.mean([s.average(part.tasks) or 0.0 for s in g])), default=[])


def _sign_claim(text: str, difference: Difference, p: float, equal: str, clause: str) -> Claim:
    gain = f"{_points(difference)}, {p_words(p)} (Holm); {clause}"
    if p > ALPHA:
        return Claim(text, Verdict.EQUAL if equal == "yes" else Verdict.UNCLEAR, f"{gain}.", measured=difference.value)
    if difference.value > 0:
        return Claim(text, Verdict.REPRODUCED, f"{gain}.", measured=difference.value)
    return Claim(text, Verdict.NOT_REPRODUCED, f"the opposite: {gain}.", measured=difference.value)


def _order(where: str, part: Grid, systems: list[SystemResults], margin: float) -> list[Claim]:
    """Both of the default pair above the remaining pruned policies, on the mean over budgets."""
    claims = []
    comparer = Comparer(part)
    rest = [p for p in dict.fromkeys(s.policy for s in systems if not s.is_full) if p not in DEFAULT_PAIR]
    for better in DEFAULT_PAIR:
        for worse in rest:
            first, second = (
                {(s.budget, s.variant): s.keys for s in _one_factor([s for s in systems if s.policy == p], part)}
                for p in (better, worse)
            )
            shared = [place for place in first if place in second]
            sides = [first[place] for place in shared], [second[place] for place in shared]
            differences = [d for a, b in zip(*sides, strict=True) if (d := comparer.average(a, b)) is not None]
            if not differences:
                continue
            corrected = holm([d.p for d in differences])
            higher = [d.value > 0 for d, p in zip(differences, corrected, strict=True) if p <= ALPHA]
            mean = float(np.mean([d.value for d in differences]))
            why = f"higher at {sum(higher)}, lower at {len(higher) - sum(higher)}, "
            why += f"no significant difference at {len(differences) - len(higher)} of {len(differences)} budgets; "
            why += f"{100 * mean:+.1f} points on their mean"
            equal, clause = _mean_within(comparer, *sides, margin)
            found = Verdict.EQUAL if equal == "yes" else Verdict.UNCLEAR
            if higher:
                found = Verdict.REPRODUCED if all(higher) else Verdict.NOT_REPRODUCED
            claims.append(Claim(f"{where}: {better} above {worse}", found, f"{why}{clause}.", measured=mean))
    return claims


def _mean_within(
    comparer: Comparer, a: Sequence[Mapping[str, str]], b: Sequence[Mapping[str, str]], margin: float
) -> tuple[str, str]:
    """As `_within`, of the mean over budgets; nothing where budgets have different documents."""
    difference, within = comparer.over_budgets(a, b), comparer.within(a, b, margin)
    if difference is None or within is None:
        return "", ""
    answer = verdict(within.p_equivalent, difference, margin)
    return answer, f", within {points(margin)}: {answer}"


def _best_factor(where: str, part: Grid, systems: list[SystemResults], factors: tuple[float, float]) -> Claim:
    """Whether the best factor lies in the published range, and is significantly better than the best outside of it."""
    text = f"{where}: the best forgetting factor lies from {factors[0]:g} to {factors[1]:g}"
    budgets = set.intersection(*({s.budget for s in g} for g in _by_factor(systems).values())) if systems else set()
    groups = {f: [s for s in g if s.budget in budgets] for f, g in _by_factor(systems).items()}
    inside = [f for f in groups if factors[0] <= f <= factors[1]]
    outside = [f for f in groups if f not in inside]
    if not inside or not outside or not budgets:
        return Claim(text, Verdict.NOT_RUN, "factors inside and outside that range have to be run at the same budgets.")
    means = {f: float(np.mean([s.average(part.tasks) or 0.0 for s in g])) for f, g in groups.items()}
    best = max(means, key=lambda f: means[f])
    rival = max(outside if best in inside else inside, key=lambda f: means[f])
    comparer = Comparer(part)
    pairs = [(a, b) for a in groups[best] for b in groups[rival] if (a.budget, a.variant) == (b.budget, b.variant)]
    tests = [d for d in (comparer.average(a.keys, b.keys) for a, b in pairs) if d is not None]
    if not tests:
        return Claim(text, Verdict.NOT_RUN, "the per-document files are missing.", measured=best)
    p = min((p for d, p in zip(tests, holm([d.p for d in tests]), strict=True) if d.value > 0), default=1.0)
    side = "inside" if best in inside else "outside"
    why = f"the best is {best:g}, {side} ({100 * means[best]:.1f}); {rival:g} reaches {100 * means[rival]:.1f}, "
    why += f"{p_words(p)} at the clearest budget (Holm)."
    if p > ALPHA:
        return Claim(text, Verdict.UNCLEAR, why, measured=best)
    return Claim(text, Verdict.REPRODUCED if best in inside else Verdict.NOT_REPRODUCED, why, measured=best)


def _by_factor(systems: list[SystemResults]) -> dict[float, list[SystemResults]]:
    groups: dict[float, list[SystemResults]] = {}
    for s in systems:
        if not np.isnan(s.factor_value):
            groups.setdefault(s.factor_value, []).append(s)
    return groups


def protocol_differs(part: Grid, tasks: set[str]) -> str:
    """How a grid differs from the published protocol; "" where it does not."""
    differs = []
    if missing := tasks - set(part.tasks):
        differs.append(f"tasks not run: {', '.join(sorted(missing))}")
    if more := set(part.tasks) - tasks:
        differs.append(f"other tasks: {', '.join(sorted(more))}")
    limits = part.frame["limit"].dropna().unique()
    if len(limits):
        differs.append(f"only {', '.join(f'{v:g}' for v in limits)} documents of each task")
    if other := set(part.frame["dtype"].dropna()) - {PUBLISHED_DTYPE}:
        differs.append(f"{', '.join(sorted(other))} instead of {PUBLISHED_DTYPE}")
    return "; ".join(differs)


def p_words(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _points(d: Difference) -> str:
    return f"{100 * d.value:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"


def _place(row: Row) -> tuple[object, ...]:
    """What a published figure and a cell have in common."""
    factor = pd.to_numeric(str(row["forgetting_factor"]), errors="coerce")
    budget = pd.to_numeric(str(row["budget_ratio"]), errors="coerce")
    key = (row["model"], row["policy"], None if pd.isna(budget) else round(float(budget), 6))
    return (*key, None if pd.isna(factor) else round(float(factor), 6), row["shots"], row["task"])
