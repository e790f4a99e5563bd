"""The worked example of docs/statistics.md, every number of it: `--write` puts it there.

python scripts/worked_example.py --write
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from a2sf import atomic
from a2sf.analysis.comparisons.pairs import Comparer, compare_pair
from a2sf.analysis.results.flips import flips_of
from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.grid import AVERAGE, Grid, SystemResults
from a2sf.analysis.results.labels import MINUS
from a2sf.analysis.statistics.intervals import of_documents
from a2sf.analysis.statistics.paired import Difference
from a2sf.analysis.statistics.pooled import pool
from a2sf.analysis.statistics.power import documents_needed, mcnemar_power, smallest_average, smallest_difference
from a2sf.analysis.statistics.texts import TextClusters
from a2sf.report.tables.summaries import p_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "statistics.md"
BEGIN, END = "<!-- example:begin -->", "<!-- example:end -->"
SWEEP = ROOT / "runs" / "reference" / "smollm2-135m.a2sf.zip"
TASK, BUDGET = "piqa", "0.2"
THREE = np.array([0.021, 0.004, 0.013])
"""Made-up differences of three models."""


def example(grid: Grid) -> str:
    """The example in Markdown.

    Args:
        grid: of the reference sweep, 0-shot.
    """
    systems = {s.policy: s for s in grid.systems() if s.is_full or s.budget == BUDGET}
    comparer = Comparer(grid)
    found, _ = compare_pair(grid)
    here = {c.task: c for c in found if c.budget == BUDGET}
    task, average = here[TASK], here[AVERAGE]
    tests = len(found)
    lines = [_score(grid, systems["full"]), "", _better(task.difference, task.adjusted.p, tests)]
    lines.append(
        f"On the average over the {len(grid.tasks)} tasks it is {_points(average.difference)}, "
        f"{_p(average.adjusted.p)}."
    )
    lines += ["", _as_good(comparer, systems), "", _documents(grid, average.difference.n), "", _models()]
    return "\n".join("\n".join(textwrap.wrap(line, 150)) for line in lines)


def _score(grid: Grid, full: SystemResults) -> str:
    values = grid.cells[full.keys[TASK]].documents["metric/acc"].to_numpy(float)
    one = of_documents(values, TextClusters.independent(len(values)))
    return (
        f"**One score.** On {TASK}, {int(values.sum())} of {len(values)} documents are right with the full cache: "
        f"{100 * one.value:.1f} %, and the interval is {100 * one.low:.1f} to {100 * one.high:.1f} % (Wilson)."
    )


def _better(d: Difference, corrected: float, tests: int) -> str:
    return (
        f"**Is A2SF better than H2O?** At budget {BUDGET}, {d.gained} of {d.n} documents are right with A2SF alone and "
        f"{d.lost} with H2O alone: a difference of {_points(d)}. McNemar's {_p(d.p)}; after Holm's correction over the "
        f"{tests} tests of the table (seven budgets; six tasks and their average) {_p(corrected)}. These documents "
        f"would have shown a difference of {100 * (d.detectable or 0):.1f} points with 80 % power."
    )


def _as_good(comparer: Comparer, systems: dict[str, SystemResults]) -> str:
    a2sf, full = systems["a2sf"].keys, systems["full"].keys
    d = comparer.average(a2sf, full)
    p = {}
    for margin in (1, 10):
        within = comparer.within([a2sf], [full], margin / 100)
        assert within is not None
        p[margin] = _p(within.p_equivalent)
    assert d is not None
    return (
        f"**Is A2SF at budget {BUDGET} as good as the full cache?** On the average over tasks the difference is "
        f"{_points(d)}. That it is within 1 point is not shown ({p[1]}). A margin of 10 points would give {p[10]}, "
        f"and would say little."
    )


def _documents(grid: Grid, n: int) -> str:
    found, sizes = flips_of(grid.cells_shown), grid.frame.groupby("task")["n"].max()
    share, of_task = found[TASK].share, int(sizes[TASK])
    assert share is not None
    least, many = smallest_difference(of_task, share), documents_needed(0.02, share)
    mean = smallest_average([int(sizes[t]) for t in grid.tasks], [found[t].share or 0.0 for t in grid.tasks])
    assert least is not None
    assert many is not None
    assert mean is not None
    power = mcnemar_power(of_task, share, 0.02)
    return (
        f"**How many documents?** Two systems at one budget differ on {100 * share:.1f} % of the documents of {TASK} "
        f"on average. So {of_task} documents show a difference of {100 * least:.1f} points with 80 % power, and a "
        f"true one of 2 points in {100 * power:.0f} % of such experiments; 2 points need {many:,} documents. The "
        f"average over the {len(sizes)} tasks ({n:,} documents) shows {100 * mean:.1f} points."
    )


def _models() -> str:
    errors = np.full(3, 0.006**2)
    shared = 0.3 * 0.006**2
    p = pool(THREE, np.diag(errors - shared) + shared, 1000)
    assert p.next_low is not None
    assert p.next_high is not None
    listed = ", ".join(f"{100 * v:+.1f}" for v in THREE)
    return (
        f"**Three models.** Differences of {listed} points, each with a standard error of 0.6 and a correlation of "
        f"the errors of 0.3 by the common documents, have the mean {100 * p.value:+.1f}. In these models it lies in "
        f"{_interval(p.here_low, p.here_high)}, in models like these in {_interval(p.low, p.high)} ({_p(p.p)}): three "
        f"models say little about others. τ is {100 * p.tau:.1f} points and I² {100 * p.i2:.0f} %. Another such model "
        f"would show {_interval(p.next_low, p.next_high)} on these documents."
    )


def _points(d: Difference) -> str:
    return f"{100 * d.value:+.1f} points {_interval(d.low, d.high)}".replace("-", MINUS)


def _interval(low: float, high: float) -> str:
    return f"[{100 * low:+.1f}, {100 * high:+.1f}]".replace("-", MINUS)


def _p(p: float) -> str:
    text = p_text(p)
    return f"p {text[0]} {text[1:]}" if text.startswith("<") else f"p = {text}"


def block() -> str:
    """What stands in the page, from the reference sweep."""
    return example(gather([SWEEP]).by_model()[0][2])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put it into docs/statistics.md")
    args = parser.parse_args(arguments)
    text = block()
    print(text)
    if args.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        atomic.write(PAGE, f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
