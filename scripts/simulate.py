"""Coverage and level of every estimator of docs/statistics.md, by simulation; `--write` puts the table there.

    python scripts/simulate.py            # prints the table, in about five minutes on one core
    python scripts/simulate.py --write    # and writes it into docs/statistics.md

The random numbers are the same every time. Coverage: how often a 95 % interval contains the true value. Level: how often a
test at 5 % is significant although its null hypothesis is true.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy import stats

from a2sf import atomic
from a2sf.analysis.statistics import paired
from a2sf.analysis.statistics.equivalence import average_within_margin, within_margin
from a2sf.analysis.statistics.families import benjamini_hochberg, e_bh
from a2sf.analysis.statistics.intervals import averaged, of_documents
from a2sf.analysis.statistics.paired import (
    average_difference,
    bootstrap_means,
    holm,
    interval,
    mcnemar_p,
    paired_difference,
)
from a2sf.analysis.statistics.pooled import Changes, pool_tasks
from a2sf.analysis.statistics.texts import TextClusters
from a2sf.sweep.sequential import PairedMean

PAGE = Path(__file__).parents[1] / "docs" / "statistics.md"
BEGIN, END = "<!-- simulation:begin -->", "<!-- simulation:end -->"
ROUNDS = 2000
SIGN_FLIPS = 10_000
"""Of each test: 100,000 would take ten times as long, and change a p-value by less than 0.01."""
TOGETHER = 0.7
"""Probability that a document changes as its text does, where documents share texts."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: the estimator.
        case: documents, texts and truth.
        coverage, level: shares of the rounds; None: it has no interval, or makes no test.
    """

    what: str
    case: str
    coverage: float | None
    level: float | None
    rounds: int

    @property
    def written(self) -> str:
        def percent(share: float | None) -> str:
            return "" if share is None else f"{100 * share:.1f} %"

        return f"| {self.what} | {self.case} | {percent(self.coverage)} | {percent(self.level)} |"


def rows(rounds: int = ROUNDS) -> Iterator[Row]:
    """All lines of the table."""
    for make in (single_scores, differences, averages, closeness, equivalence, families, early_stopping, over_models):
        yield from make(rounds)


def single_scores(rounds: int) -> Iterator[Row]:
    for n, p in ((30, 0.6), (30, 0.9), (100, 0.8), (400, 0.8)):
        draw = _right(n, p)
        yield _covered("score of a task: Wilson", f"{n} documents, {100 * p:.0f} % right", draw, p, rounds)
    for texts, each in ((20, 4), (50, 4)):
        draw = _right_in_texts(texts, each, 0.7)
        what = "score, shared texts: Wilson, effective n"
        yield _covered(
            what, f"{texts} texts of {each}, 70 % right", draw, 0.7, rounds, TextClusters.keyed(_of(texts, each))
        )
    for n in (30, 100):
        draw = _skewed(n)
        yield _covered("score of another metric: Student's t", f"{n} documents, skewed", draw, 0.25, rounds)
    hits = 0
    rng = np.random.default_rng(1)
    for _ in range(rounds):
        parts = [of_documents(_right(30, p)(rng), TextClusters.independent(30)) for p in (0.6, 0.75, 0.9)]
        found = averaged(parts)
        hits += found.low <= 0.75 <= found.high
    yield Row("average of scores: MOVER", "3 tasks of 30 documents, 60 to 90 % right", hits / rounds, None, rounds)


def differences(rounds: int) -> Iterator[Row]:
    what = "difference on a task: Bonett and Price, exact McNemar"
    for n, flips, d in ((30, 0.3, 0.1), (100, 0.1, 0.04), (100, 0.3, 0.1), (400, 0.15, 0.03)):
        case = f"{n} documents, {100 * flips:.0f} % flips, difference {100 * d:g}"
        yield _tested(what, case, lambda n=n, f=flips: _flips(n, f), d, rounds, TextClusters.independent(n))
    for texts, each in ((20, 4), (50, 4)):
        what = "the same, shared texts: effective n, flips of whole texts"
        case = f"{texts} texts of {each}, 30 % flips, difference 10"
        keyed = TextClusters.keyed(_of(texts, each))
        yield _tested(what, case, lambda t=texts, e=each: _flips_in_texts(t, e, 0.3), 0.1, rounds, keyed)
    what = "difference of another metric: bootstrap-t"
    kinds = (("normal", _normal_change), ("skewed", _skewed_change), ("skewed, 20 % change", _rare_change))
    for n in (30, 100, 400):
        for name, make in kinds:
            case = f"{n} documents, {name}"
            yield _tested(what, case, lambda n=n, m=make: m(n), 0.1, rounds, TextClusters.independent(n), binary=False)
    case, keyed = "20 texts of 4, normal", TextClusters.keyed(_of(20, 4))
    what = "the same, shared texts: bootstrap and flips of whole texts"
    few = max(1, rounds // 4)  # each text differs from all others, so that flips take long
    yield _tested(what, case, lambda: _normal_in_texts(20, 4), 0.1, few, keyed, binary=False)


def averages(rounds: int) -> Iterator[Row]:
    what = "difference of an average: paired bootstrap, sign flips"
    for tasks, n, flips in ((3, 30, 0.3), (3, 100, 0.15), (6, 100, 0.15)):
        rng = np.random.default_rng(2)
        hits = false = 0
        few = max(1, rounds // 4)
        for _ in range(few):
            found = average_difference([_flips(n, flips)(rng, 0.05) for _ in range(tasks)])
            hits += found.low <= 0.05 <= found.high
            false += average_difference([_flips(n, flips)(rng, 0.0) for _ in range(tasks)]).p <= 0.05
        case = f"{tasks} tasks of {n} documents, {100 * flips:.0f} % flips"
        yield Row(what, case, hits / few, false / few, few)
    rng, keyed = np.random.default_rng(3), [TextClusters.keyed(_of(20, 4))] * 2
    hits, false, few = 0, 0, max(1, rounds // 4)
    for _ in range(few):
        found = average_difference([_flips_in_texts(20, 4, 0.3)(rng, 0.1) for _ in range(2)], keyed)
        hits += found.low <= 0.1 <= found.high
        false += average_difference([_flips_in_texts(20, 4, 0.3)(rng, 0.0) for _ in range(2)], keyed).p <= 0.05
    yield Row("the same, shared texts", "2 tasks of 20 texts of 4", hits / few, false / few, few)

    rng = np.random.default_rng(12)
    hits = false = 0
    for _ in range(few):
        hits += (found := average_difference([_skewed_change(30)(rng, 0.1) for _ in range(3)])).low <= 0.1 <= found.high
        false += average_difference([_skewed_change(30)(rng, 0.0) for _ in range(3)]).p <= 0.05
    what = "difference of an average of another metric: bootstrap-t"
    yield Row(what, "3 tasks of 30 documents, skewed", hits / few, false / few, few)

    rng = np.random.default_rng(13)
    hits = false = 0
    for _ in range(few):
        found = average_difference([_flips_at_budgets(100, 0.15)(rng, 0.04) for _ in range(3)])
        hits += found.low <= 0.04 <= found.high
        false += average_difference([_flips_at_budgets(100, 0.15)(rng, 0.0) for _ in range(3)]).p <= 0.05
    what = "difference of a mean over budgets (ranking): bootstrap-t"
    yield Row(what, "3 tasks of 100 documents, 3 budgets, 15 % flips", hits / few, false / few, few)


def closeness(rounds: int) -> Iterator[Row]:
    """Means of measures of closeness: percentiles of the bootstrap."""
    few = max(1, rounds // 4)
    for n in (30, 100, 400):
        rng, hits = np.random.default_rng(14), 0
        for _ in range(few):
            low, high = interval(bootstrap_means(_skewed_change(n)(rng, 0.1)))
            hits += low <= 0.1 <= high
        yield Row(
            "closeness to the full cache: percentiles of the bootstrap", f"{n} documents, skewed", hits / few, None, few
        )


def equivalence(rounds: int) -> Iterator[Row]:
    """One-sided tests at 5 % where the true difference is the margin."""
    for n, flips, margin in ((60, 0.2, 0.1), (300, 0.15, 0.05), (1000, 0.1, 0.02)):
        rng = np.random.default_rng(4)
        false = 0
        for _ in range(rounds):
            change = _flips(n, flips)(rng, margin)
            false += within_margin(change.clip(0, 1), (-change).clip(0, 1), margin).p_not_better <= 0.05
        case = f"{n} documents, {100 * flips:.0f} % flips, margin {100 * margin:g}"
        yield Row("within a margin, a task: Tango (one-sided)", case, None, false / rounds, rounds)
    keyed = TextClusters.keyed(_of(50, 4))
    rng = np.random.default_rng(5)
    false = 0
    for _ in range(rounds):
        change = _flips_in_texts(50, 4, 0.3)(rng, 0.1)
        false += average_within_margin([change], [keyed], 0.1).p_not_better <= 0.05
    yield Row(
        "within a margin, shared texts: t, cluster-robust (one-sided)",
        "50 texts of 4, 30 % flips, margin 10",
        None,
        false / rounds,
        rounds,
    )
    rng = np.random.default_rng(6)
    false = 0
    for _ in range(rounds):
        changes = [_flips(100, 0.15)(rng, 0.03) for _ in range(6)]
        false += average_within_margin(changes, [TextClusters.independent(100)] * 6, 0.03).p_not_better <= 0.05
    case = "6 tasks of 100 documents, 15 % flips, margin 3"
    yield Row("within a margin, an average: Tango's variances (one-sided)", case, None, false / rounds, rounds)
    kinds = (("normal", _normal_change), ("skewed", _skewed_change), ("skewed to the other side", _mirrored_change))
    for n in (30, 100):
        for name, make in kinds:
            rng, false = np.random.default_rng(15), 0
            for _ in range(rounds):
                change = make(n)(rng, 0.2)
                false += within_margin(change, 0 * change, 0.2).p_not_better <= 0.05
            what = "within a margin, another metric: t, bootstrap-t (one-sided)"
            yield Row(what, f"{n} documents, {name}", None, false / rounds, rounds)


def families(rounds: int) -> Iterator[Row]:
    """Any false finding of a family (Holm), and the mean share of false findings (Benjamini and Hochberg)."""
    rng = np.random.default_rng(7)
    any_false, share = 0, 0.0
    mcnemar = lru_cache(None)(mcnemar_p)
    gc.freeze()  # statsmodels collects garbage in every call, which would take most of the time
    for _ in range(rounds):
        flips = rng.binomial(100, 0.2, 10)
        up = rng.binomial(flips, [0.5] * 8 + [0.9] * 2)
        p = [mcnemar(int(g), int(f - g)) for g, f in zip(up, flips, strict=True)]
        any_false += min(holm(p)[:8]) <= 0.05
        found = np.array(benjamini_hochberg(p)) <= 0.05
        share += found[:8].sum() / max(1, found.sum())
    case = "10 tests of 100 documents, 2 real differences"
    yield Row("any false finding: Holm", case, None, any_false / rounds, rounds)
    yield Row("share of false findings: Benjamini and Hochberg", case, None, share / rounds, rounds)


def early_stopping(rounds: int) -> Iterator[Row]:
    few = max(1, rounds // 5)
    rng = np.random.default_rng(8)
    population = _flips(200, 0.2)(rng, 0.05)
    wrong = 0
    for _ in range(few):
        watch = PairedMean(len(population))
        for value in rng.permutation(population):
            watch.see([float(value)])
            low, high = watch.interval
            if not low - 1e-9 <= population.mean() <= high + 1e-9:
                wrong += 1
                break
    yield Row("early stopping: wrong at any document", "200 documents, 20 % flips", 1 - wrong / few, None, few)

    rng, share = np.random.default_rng(16), 0.0
    none, some = (np.repeat([1.0, -1.0, 0.0], counts) for counts in ((10, 10, 80), (30, 2, 68)))
    for _ in range(few):
        e_values = [_stopped(rng.permutation(of)) for of in (none, none, none, some)]
        found = np.array(e_bh(e_values))
        share += found[:3].sum() / max(1, found.sum())
    case = "4 tasks of 100 documents, 1 real difference"
    yield Row("share of false findings over tasks: e-BH", case, None, share / few, few)


def _stopped(values: np.ndarray) -> float:
    """The e-value of a comparison that stops when its interval excludes zero."""
    watch = PairedMean(len(values))
    for value in values:
        watch.see([float(value)])
        if watch.interval[0] > 0 or watch.interval[1] < 0:
            break
    return watch.e_value


def over_models(rounds: int) -> Iterator[Row]:
    """Half of what makes a document flip is the same in all models."""
    for k, spread in ((2, 0.0), (2, 0.05), (3, 0.0), (3, 0.05), (5, 0.05)):
        rng, few = np.random.default_rng(9), max(1, rounds // 4)
        hits = these = false = 0
        for _ in range(few):
            found, mean_here = _pooled(rng, k, 0.04, spread)
            hits += found.low <= 0.04 <= found.high
            these += found.here_low <= mean_here <= found.here_high
            false += _pooled(rng, k, 0.0, spread)[0].p <= 0.05
        case = f"{k} models, 100 documents, spread of models {100 * spread:g}"
        yield Row("difference over models like these", case, hits / few, false / few, few)
        if spread:
            yield Row("difference over these models", case, these / few, None, few)
    for k, spread in ((3, 0.05), (5, 0.05)):
        rng, few, hits = np.random.default_rng(17), max(1, rounds // 4), 0
        for _ in range(few):
            *changes, another = _in_models(rng, k + 1, 0.04, spread)[0]
            found = pool_tasks([changes])
            hits += found.next_low <= another.values.mean() <= found.next_high
        case = f"{k} models, 100 documents, spread of models {100 * spread:g}"
        yield Row("what another model shows on these documents", case, hits / few, None, few)


def _pooled(rng: np.random.Generator, k: int, mean: float, spread: float):
    changes, mean_here = _in_models(rng, k, mean, spread)
    return pool_tasks([changes]), mean_here


def _in_models(rng: np.random.Generator, k: int, mean: float, spread: float) -> tuple[list[Changes], float]:
    """The changes in k models, and the mean of their true differences."""
    n, flips = 100, 0.3
    true = np.clip(mean + spread * rng.standard_normal(k), -0.25, 0.25)
    latent = math.sqrt(0.5) * rng.standard_normal(n) + math.sqrt(0.5) * rng.standard_normal((k, n))
    up, down = (stats.norm.isf((flips + sign * true) / 2)[:, None] for sign in (1, -1))
    change = (latent > up).astype(float) - (latent < -down)
    keys = [str(i) for i in range(n)]
    return [Changes(c, keys) for c in change], float(true.mean())


def _covered(
    what: str,
    case: str,
    draw: Callable[[np.random.Generator], np.ndarray],
    truth: float,
    rounds: int,
    texts: TextClusters | None = None,
) -> Row:
    rng = np.random.default_rng(10)
    hits = 0
    for _ in range(rounds):
        values = draw(rng)
        found = of_documents(values, texts or TextClusters.independent(len(values)))
        hits += found.low <= truth <= found.high
    return Row(what, case, hits / rounds, None, rounds)


def _tested(
    what: str,
    case: str,
    make: Callable[[], Callable[[np.random.Generator, float], np.ndarray]],
    difference: float,
    rounds: int,
    texts: TextClusters,
    binary: bool = True,
) -> Row:
    """Coverage where the true difference is `difference`, and level where there is none."""
    rng, draw = np.random.default_rng(11), make()
    hits = false = 0
    for _ in range(rounds):
        for truth in (difference, 0.0):
            change = draw(rng, truth)
            first, second = (change.clip(0, 1), (-change).clip(0, 1)) if binary else (change, 0 * change)
            found = paired_difference(first, second, texts)
            if truth:
                hits += found.low <= truth <= found.high
            else:
                false += found.p <= 0.05
    return Row(what, case, hits / rounds, false / rounds, rounds)


def _of(texts: int, each: int) -> Sequence[str]:
    return [str(i // each) for i in range(texts * each)]


def _right(n: int, p: float) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: (rng.random(n) < p).astype(float)


def _right_in_texts(texts: int, each: int, p: float) -> Callable[[np.random.Generator], np.ndarray]:
    def draw(rng: np.random.Generator) -> np.ndarray:
        of_text, alone = rng.random((texts, 1)) < p, rng.random((texts, each)) < p
        return np.where(rng.random((texts, each)) < TOGETHER, of_text, alone).astype(float).ravel()

    return draw


def _skewed(n: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.beta(0.5, 1.5, n)


def _flips(n: int, flips: float) -> Callable[[np.random.Generator, float], np.ndarray]:
    def draw(rng: np.random.Generator, d: float) -> np.ndarray:
        return rng.choice([1.0, -1.0, 0.0], n, p=[(flips + d) / 2, (flips - d) / 2, 1 - flips])

    return draw


def _flips_in_texts(texts: int, each: int, flips: float) -> Callable[[np.random.Generator, float], np.ndarray]:
    def draw(rng: np.random.Generator, d: float) -> np.ndarray:
        of_text, alone = _flips(texts, flips)(rng, d)[:, None], _flips(texts * each, flips)(rng, d)
        return np.where(rng.random((texts, each)) < TOGETHER, of_text, alone.reshape(texts, each)).ravel()

    return draw


def _normal_change(n: int) -> Callable[[np.random.Generator, float], np.ndarray]:
    return lambda rng, d: d + 0.5 * rng.standard_normal(n)


def _normal_in_texts(texts: int, each: int) -> Callable[[np.random.Generator, float], np.ndarray]:
    def draw(rng: np.random.Generator, d: float) -> np.ndarray:
        return (d + 0.4 * rng.standard_normal((texts, 1)) + 0.3 * rng.standard_normal((texts, each))).ravel()

    return draw


def _skewed_change(n: int) -> Callable[[np.random.Generator, float], np.ndarray]:
    return lambda rng, d: d + 0.5 * (rng.exponential(1.0, n) - 1)


def _mirrored_change(n: int) -> Callable[[np.random.Generator, float], np.ndarray]:
    return lambda rng, d: d - 0.5 * (rng.exponential(1.0, n) - 1)


def _flips_at_budgets(n: int, flips: float) -> Callable[[np.random.Generator, float], np.ndarray]:
    """Each document's mean over three budgets, at each of which it changes as at the first with a probability of 70 %."""

    def draw(rng: np.random.Generator, d: float) -> np.ndarray:
        first = _flips(n, flips)(rng, d)
        others = [np.where(rng.random(n) < TOGETHER, first, _flips(n, flips)(rng, d)) for _ in range(2)]
        return np.mean([first, *others], axis=0)

    return draw


def _rare_change(n: int) -> Callable[[np.random.Generator, float], np.ndarray]:
    """A fifth of the documents changes, all in one direction, which a constant makes up for."""
    return lambda rng, d: d + (rng.random(n) < 0.2) * rng.exponential(1.0, n) - 0.2


def table(found: Sequence[Row]) -> str:
    """The table in Markdown, with the Monte Carlo error."""
    fewest = min(r.rounds for r in found)
    error = 100 * math.sqrt(0.95 * 0.05 / fewest)
    head = ["| estimator | case | coverage | level |", "|:--|:--|--:|--:|"]
    lines = [*head, *(r.written for r in found)]
    most = max(r.rounds for r in found)
    end = [
        f"{fewest:,} to {most:,} rounds for each line; Monte Carlo error (one standard error) of 95 % or 5 %: at most",
        f"{error:.1f} points. Sign-flip tests have 10,000 draws here. Made by `python scripts/simulate.py --write`.",
    ]
    return "\n".join([*lines, "", *end])


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of most lines")
    parser.add_argument("--write", action="store_true", help="put the table into docs/statistics.md")
    args = parser.parse_args(arguments)
    paired.SIGN_FLIPS = SIGN_FLIPS  # of this process; not on import, which would change the tests of who imports it
    found = []
    for row in rows(args.rounds):
        print(row.written, flush=True)
        found.append(row)
    text = table(found)
    print(text.rsplit("\n", 1)[1])
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        atomic.write(PAGE, f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
