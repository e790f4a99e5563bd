"""Documents that share a text: whole texts are flipped and resampled, everywhere that results are paired."""

from __future__ import annotations

import dataclasses
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from a2sf.analysis.comparisons.against import compare_against
from a2sf.analysis.comparisons.fidelity import fidelity_frame
from a2sf.analysis.comparisons.pairs import Comparer, compare_pair
from a2sf.analysis.comparisons.ranking import rank
from a2sf.analysis.results.documents import texts_of
from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.selection import Selection
from a2sf.analysis.statistics import paired
from a2sf.analysis.statistics.paired import average_difference, bootstrap_means, paired_difference, standard_error
from a2sf.analysis.statistics.texts import TextClusters, tail_of
from a2sf.errors import UserError
from a2sf.report.output import TableOptions, show
from a2sf.report.tables.cells import legend
from a2sf.report.tables.layout import build_tables
from a2sf.report.tables.summaries import comparison_tables
from a2sf.report.tables.write import markdown
from a2sf.store.runs import StoredCell, write_cell
from a2sf.sweep.early_stopping import Comparisons
from a2sf.sweep.stopping_rule import StoppingRule
from tests.sweep_fixture import Plan, write_sweep

OF_FOUR = TextClusters(np.repeat(np.arange(25), 4))


def correlated(rng: np.random.Generator, texts: TextClusters, flips: float, shared: float) -> np.ndarray:
    """Changes of -1, 0 or 1 that are 0 on average; a document takes its text's with probability `shared`."""
    shares = [flips / 2, flips / 2, 1 - flips]
    of_text = rng.choice([1.0, -1.0, 0.0], texts.number, p=shares)[texts.of]
    return np.where(rng.random(len(texts.of)) < shared, of_text, rng.choice([1.0, -1.0, 0.0], len(texts.of), p=shares))


@pytest.mark.full
@pytest.mark.parametrize(
    "texts", [TextClusters(np.repeat(np.arange(40), 5)), TextClusters(np.repeat(np.arange(30), range(1, 31)) % 29)]
)
def test_level_and_coverage_with_correlated_documents(texts: TextClusters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "SIGN_FLIPS", 4000)  # p-values near 0.05 within 0.004
    rng = np.random.default_rng(11)
    rounds, wrong, covered, unclustered = 250, 0, 0, 0
    for _ in range(rounds):
        change = correlated(rng, texts, 0.3, 0.7)
        base = np.where(change < 0, 1.0, 0.0)
        d = paired_difference(base + change, base, texts)
        wrong += d.p <= 0.05
        covered += d.low <= 0 <= d.high
        unclustered += paired_difference(base + change, base).p <= 0.05
    assert 0.01 <= wrong / rounds <= 0.085
    assert 0.92 <= covered / rounds <= 0.99
    assert unclustered / rounds > 0.15  # what it would be with documents taken for independent


@pytest.mark.full
def test_level_and_coverage_of_an_average_over_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "SIGN_FLIPS", 4000)  # p-values near 0.05 within 0.004
    rng = np.random.default_rng(12)
    rounds, wrong, covered = 250, 0, 0
    texts = [TextClusters(np.repeat(np.arange(k), 4)) for k in (15, 25)]
    for _ in range(rounds):
        d = average_difference([correlated(rng, t, 0.3, 0.7) for t in texts], texts)
        wrong += d.p <= 0.05
        covered += d.low <= 0 <= d.high
    assert 0.01 <= wrong / rounds <= 0.085
    assert 0.915 <= covered / rounds <= 0.985


def test_few_texts_by_hand() -> None:
    """Sums of texts 3, 1, -1 and 0: of the 8 signs of the first three, those with an absolute sum of at least 3."""
    texts = TextClusters(np.array([0, 0, 0, 1, 1, 2, 3, 3]))
    change = np.array([1, 1, 1, 1, 0, -1, 1, -1], float)
    sums = [abs(3 * a + b + c) >= 3 for a, b, c in product((1, -1), repeat=3)]
    d = paired_difference(np.maximum(change, 0), np.maximum(-change, 0), texts)
    assert d.p == pytest.approx(np.mean(sums)) == average_difference([change], [texts]).p
    assert (d.gained, d.lost, d.n, d.value) == (5, 2, 8, pytest.approx(3 / 8))


def test_more_texts_than_can_be_enumerated_have_the_same_distribution() -> None:
    sums = np.random.default_rng(3).choice([-3.0, -1.0, 1.0, 3.0], 40)
    texts = TextClusters(np.repeat(np.arange(40), 4))
    change = np.concatenate([[np.sign(s)] * int(abs(s)) + [0.0] * (4 - int(abs(s))) for s in sums])
    distribution = np.ones(1)  # of the sum of random signs, by convolution
    for s in abs(sums).astype(int):
        step = np.zeros(2 * s + 1)
        step[[0, -1]] = 0.5
        distribution = np.convolve(distribution, step)
    totals = np.arange(len(distribution)) - int(abs(sums).sum())
    exact = distribution[abs(totals) >= abs(sums.sum())].sum()
    assert average_difference([change], [texts]).p == pytest.approx(exact, abs=0.006)


def test_texts_of_one_document_change_nothing() -> None:
    rng = np.random.default_rng(5)
    first, second = rng.integers(0, 2, (2, 80)).astype(float)
    apart = TextClusters.keyed([f"t{i}" for i in range(80)])
    assert not apart.shared
    assert paired_difference(first, second, apart) == paired_difference(first, second)
    assert average_difference([first - second], [apart]) == average_difference([first - second])
    assert (bootstrap_means(first, 1, apart) == bootstrap_means(first, 1)).all()
    assert standard_error(first, apart) == standard_error(first)


def test_documents_that_say_the_same_count_once() -> None:
    """The documents of each text are equal: error, interval and power are those of one document per text."""
    rng = np.random.default_rng(6)
    once = rng.choice([1.0, -1.0, 0.0], 25, p=[0.3, 0.2, 0.5])
    change = once[OF_FOUR.of]
    assert OF_FOUR.standard_error(change) == pytest.approx(standard_error(once))
    assert OF_FOUR.effective_share(change) == pytest.approx(1 / 4, abs=0.02)
    means = bootstrap_means(np.stack([change, 2 * change], 1), 0, OF_FOUR)
    assert means[:, 0] == pytest.approx(bootstrap_means(once, 0), abs=1e-6)
    assert means[:, 1] == pytest.approx(2 * means[:, 0], abs=1e-6)
    base = np.where(change < 0, 1.0, 0.0)
    d, apart = paired_difference(base + change, base, OF_FOUR), paired_difference(base + change, base)
    assert d.high - d.low > 1.8 * (apart.high - apart.low)
    assert d.detectable > 1.8 * apart.detectable  # type: ignore[operator]


def test_one_text_tells_nothing() -> None:
    one = TextClusters(np.zeros(6, int))
    d = paired_difference(np.ones(6), np.zeros(6), one)
    assert (d.p, d.low, d.high, d.detectable) == (1.0, -1.0, 1.0, 1.0)
    of_shares = paired_difference(np.full(6, 0.5), np.zeros(6), one)
    assert of_shares.p == 1.0
    assert math.isnan(of_shares.low)
    assert math.isnan(tail_of([one]))
    assert math.isnan(standard_error(np.arange(6.0), one))


@pytest.mark.parametrize(
    ("texts", "known"), [([2], False), ([4], False), ([5], True), ([2, 2], False), ([2] * 7, True)]
)
def test_a_percentile_that_no_resampling_reaches_is_no_interval(texts, known):
    """It would be the range of the texts' means: with two texts that is no 95 % interval."""
    of = [TextClusters.keyed([i // 3 for i in range(3 * n)]) for n in texts]
    assert math.isnan(tail_of(of)) != known
    rng = np.random.default_rng(0)
    changes = [rng.normal(size=3 * n) for n in texts]
    found = average_difference(changes, of)
    assert math.isnan(found.low) == math.isnan(found.high) != known
    assert 0 < found.p <= 1


def test_texts_of_different_tasks_are_different_texts() -> None:
    joined = TextClusters.joined([TextClusters(np.array([0, 0, 1])), TextClusters(np.array([0, 1, 1]))])
    assert joined.of.tolist() == [0, 0, 1, 2, 3, 3]


PLAN = Plan(policies=("full", "window", "h2o", "a2sf"), budgets=(0.2, 0.5), documents={"arc_easy": 60, "piqa": 80})


def with_texts(cells: list[StoredCell], directory: Path, size: int = 4, tasks: tuple[str, ...] = ("piqa",)) -> None:
    """The same cells in another sweep, with the texts of some tasks' documents, `size` documents each."""
    for stored in cells:
        result = {k: v for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
        documents = stored.documents
        if stored.cell["task"] in tasks:
            documents = documents.assign(cluster=[f"text {i // size}" for i in range(len(documents))])
            result["documents"] = result["documents"] | {"cluster": "passage", "clusters": documents.cluster.nunique()}
        write_cell(directory / stored.path.name, result, documents, "policy: x\n")


@pytest.fixture
def sweeps(few_flips: None, tmp_path: Path) -> tuple[Path, Path]:
    with_texts(write_sweep(tmp_path / "apart", PLAN), tmp_path / "s")
    return tmp_path / "apart", tmp_path / "s"


def test_every_paired_number_goes_through_texts(sweeps: tuple[Path, Path]) -> None:
    plain, clustered = (gather([d]) for d in sweeps)
    for a, b in zip(*(compare_pair(g)[0] for g in (clustered, plain)), strict=True):
        assert (a.difference == b.difference) is (a.task == "arc_easy")
        assert a.difference.value == b.difference.value
    ours, theirs = (fidelity_frame(g)[0].set_index("task") for g in (clustered, plain))
    for measure, task in product(("agreement", "change", "choice_kl"), ("arc_easy", "piqa", "average")):
        assert (ours.loc[task, measure] == theirs.loc[task, measure]).all()
        assert (ours.loc[task, f"{measure}_low"] == theirs.loc[task, f"{measure}_low"]).all() == (task == "arc_easy")
    ranked, plainly = (rank(g)[0][0] for g in (clustered, plain))
    assert [r.mean for r in ranked] == [r.mean for r in plainly]
    assert [r.to_best for r in ranked] != [r.to_best for r in plainly]
    for a, b in zip(*(compare_against(g, ["h2o"])[0] for g in (clustered, plain)), strict=True):
        assert a.difference != b.difference
        assert a.ratios["change"] != b.ratios["change"]
        assert a.ratios["change"].value == b.ratios["change"].value
    of = {p: {s.policy: s.keys for s in g.systems() if s.budget == "0.2"} for p, g in (("a", clustered), ("b", plain))}
    for weighted in (True, False):
        a, b = (
            Comparer(g).group(of[p]["h2o"], of[p]["window"], ["arc_easy", "piqa"], weighted)
            for p, g in (("a", clustered), ("b", plain))
        )
        assert a is not None
        assert b is not None
        assert a.value == b.value
        assert a != b


def test_a_table_says_so_and_its_errors_are_of_texts(sweeps: tuple[Path, Path], tmp_path: Path) -> None:
    sentence = "piqa: 80 documents in 20 texts"
    plain, clustered = (gather([d]) for d in sweeps)
    (table,) = build_tables(clustered)
    assert sentence in legend(table)
    assert "arc_easy:" not in legend(table)
    assert sentence not in markdown(build_tables(plain))
    shown = show([sweeps[1]], Selection(), TableOptions(out=tmp_path / "out", plots=False))
    assert all(sentence in t.legend for t in shown.rankings)
    assert (tmp_path / "out" / "tables" / "tables.md").read_text().count(sentence) >= 4
    assert sentence in (tmp_path / "out" / "report.html").read_text()
    assert sentence in comparison_tables(compare_pair(clustered)[0], True, legend(table))[0].legend
    errors = [g.frame.set_index(["task", "policy", "budget"])["stderr"] for g in (plain, clustered)]
    for place in errors[0].index:
        assert (errors[0][place] == errors[1][place]) == (place[0] == "arc_easy")


def test_results_that_do_not_know_take_it_from_those_that_do(tmp_path: Path) -> None:
    cells = write_sweep(tmp_path / "apart", PLAN)
    with_texts([c for c in cells if c.cell["policy"] != "h2o"], tmp_path / "s")
    with_texts([c for c in cells if c.cell["policy"] == "h2o"], tmp_path / "s", tasks=())
    with_texts(cells, tmp_path / "all")
    some, every = (compare_pair(gather([tmp_path / d]))[0] for d in ("s", "all"))
    assert [c.difference for c in some] == [c.difference for c in every]


def test_two_opinions_about_texts_are_not_paired(tmp_path: Path) -> None:
    cells = write_sweep(tmp_path / "apart", PLAN)
    with_texts([c for c in cells if c.cell["policy"] != "h2o"], tmp_path / "s")
    with_texts([c for c in cells if c.cell["policy"] == "h2o"], tmp_path / "s", size=5)
    found, notes = compare_pair(gather([tmp_path / "s"]))
    assert {c.task for c in found} == {"arc_easy"}
    assert any("data.cluster" in n for n in notes)


def test_results_of_long_tasks_from_before_the_column_are_read_from_their_prompts(tmp_path: Path) -> None:
    cells = write_sweep(tmp_path / "old", dataclasses.replace(PLAN, documents={"long_single": 12}))
    for stored in cells:
        result = {k: v for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
        prompts = [f"Text {i // 4}.\n\nQuestion: which {i}?\nAnswer: The" for i in range(12)]
        write_cell(tmp_path / "s" / stored.path.name, result, stored.documents.assign(context=prompts), "policy: x\n")
    (table,) = build_tables(gather([tmp_path / "s"]))
    assert "long_single: 12 documents in 3 texts" in legend(table)
    assert min(c.difference.p for c in compare_pair(gather([tmp_path / "s"]))[0]) >= 2 / 2**3


def test_a_partition_is_the_same_whatever_its_keys() -> None:
    import pandas as pd

    a, b = pd.DataFrame({"cluster": list("aabb")}), pd.DataFrame({"cluster": list("ddcc")})
    assert texts_of(a, b).number == 2
    assert not texts_of(pd.DataFrame({"doc_id": range(4)})).shared
    for other in ("abab", "abcd", "aaaa"):
        with pytest.raises(UserError, match=r"data\.cluster"):
            texts_of(a, pd.DataFrame({"cluster": list(other)}))


@pytest.mark.parametrize("sizes", [[4] * 20, [1, 7, 2, 4] * 5])
def test_stopping_early_sees_whole_texts_and_bounds_the_documents_mean(sizes: list[int]) -> None:
    rng = np.random.default_rng(1)
    sums = [correlated(rng, TextClusters(np.zeros(n, int)), 0.4, 0.9) for n in sizes]
    truth = np.concatenate(sums).mean()
    missed, runs = 0, 60
    for _ in range(runs):
        watch = Comparisons(StoppingRule(("a", "b"), confidence=0.8), sizes, [("x", "y")])
        for i in rng.permutation(len(sizes)):
            watch.see({"x": sums[i] / 2, "y": -sums[i] / 2})
            (comparison,) = watch.report()
            if not comparison["low"] - 1e-9 <= truth <= comparison["high"] + 1e-9:
                missed += 1
                break
        else:
            assert (comparison["low"], comparison["high"]) == (pytest.approx(truth), pytest.approx(truth))
    assert missed / runs <= 0.2 + 3 * (0.2 * 0.8 / runs) ** 0.5
