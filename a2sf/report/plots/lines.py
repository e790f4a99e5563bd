"""Which systems a plot draws, and their values: lines of policies across budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from a2sf.analysis.results.errors import estimate_of
from a2sf.analysis.results.grid import AVERAGE, DEFAULT_PAIR, Grid, SystemResults
from a2sf.analysis.results.labels import DASH
from a2sf.analysis.statistics.intervals import Estimate, averaged
from a2sf.report.plots.style import MOST, Line, Style, spread


def chosen_lines(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> list[Line]:
    """At most `MOST` lines, the full cache's with them: the pair's, then the best on average, not causal ones last."""
    lines, column = lines_of(part), score_columns(part)[-1]
    room = MOST - any(s.is_full for s in part.systems())
    sign = -1 if part.higher_is_better else 1

    def order(line: Line) -> tuple[bool, bool, float]:
        scores = [estimated(s, column, part).value for s in line.systems if column in available_columns(s, part)]
        mean = sign * float(np.mean(scores)) if scores else math.inf
        return line.policy not in pair, not line.systems[0].causal, mean

    chosen = {line.label for line in sorted(lines, key=order)[:room]}
    return [line for line in lines if line.label in chosen]


def left_out(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> list[str]:
    """The labels of the lines that `chosen_lines` leaves out."""
    chosen = {line.label for line in chosen_lines(part, pair)}
    return [line.label for line in lines_of(part) if line.label not in chosen]


def lines_of(part: Grid) -> list[Line]:
    """Pruned policies across budgets; of several forgetting factors the best on average, and the label says so."""
    column = score_columns(part)[-1]
    by_policy: dict[str, list[SystemResults]] = {}
    for s in part.systems():
        if not s.is_full:
            by_policy.setdefault(s.label, []).append(s)
    lines = []
    for label, systems in by_policy.items():
        factors = list(dict.fromkeys(s.factor for s in systems))
        if factors == [DASH]:
            lines.append(Line(label, systems[0].policy, systems))
            continue
        per_factor = {f: [s for s in systems if s.factor == f] for f in factors}
        most = max(map(len, per_factor.values()))
        means = {
            f: np.mean(
                [estimated(s, column, part).value for s in group if column in available_columns(s, part)] or [math.nan]
            )
            for f, group in per_factor.items()
            if len(group) == most
        }
        best = (max if part.higher_is_better else min)(means, key=lambda f: means[f])
        more = f", best of {len(factors)}" if len(factors) > 1 else ""
        lines.append(Line(f"{label} (factor {best}{more})", systems[0].policy, per_factor[best]))
    return lines


def score_columns(part: Grid) -> list[str]:
    return [*part.tasks, AVERAGE] if len(part.tasks) > 1 else part.tasks


def available_columns(system: SystemResults, part: Grid) -> list[str]:
    average = [AVERAGE] if set(part.tasks) <= set(system.rows) else []
    return [*system.rows, *average]


def estimated(system: SystemResults, column: str, part: Grid) -> Estimate:
    """Value, standard error and interval on a task or the average, in the metric's own unit."""
    if column != AVERAGE:
        return estimate_of(system.rows[column])
    return averaged([estimate_of(system.rows[t]) for t in part.tasks], system.weights(part.tasks))


def draw_line(
    axis: Axes,
    points: Sequence[tuple[float, Estimate]],
    style: Style,
    label: str,
    percent: bool,
    alpha: float = 0.13,
    bars: bool = False,
) -> None:
    """Estimates at their places, with their intervals as a band or as bars; no interval where none is known."""
    if not points:
        return
    x = np.array([at for at, _ in points])
    value, low, high = (100 if percent else 1) * np.array([(e.value, e.low, e.high) for _, e in points]).T
    axis.plot(x, value, color=style.colour, marker=style.marker, ms=5, ls=style.dash, lw=1.5, label=label)
    spread(axis, x, low, high, style.colour, alpha, bars)


def mean_measure(system: SystemResults, measure: str) -> float:
    return float(np.mean([getattr(r, measure) for r in system.rows.values()]))


def swept_factors(part: Grid) -> list[SystemResults]:
    """Systems of the policies that ran with several forgetting factors."""
    with_factor = [s for s in part.systems() if not math.isnan(s.factor_value)]
    counts = pd.Series({(s.policy, s.factor_value): 1 for s in with_factor}, dtype=int)
    several = {p for p, n in counts.groupby(level=0).size().items() if n > 1} if with_factor else set()
    return [s for s in with_factor if s.policy in several]
