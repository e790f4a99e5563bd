"""Differences pooled over models: against scipy and statsmodels, by simulation, and from results on disk to files."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.meta_analysis import combine_effects

from a2sf.analysis.claims.models import check_over_models
from a2sf.analysis.claims.verdicts import Verdict
from a2sf.analysis.comparisons.pooled import ALL, compare_over_models, over_models_frame
from a2sf.analysis.comparisons.runs_over_models import compare_runs_over_models, with_models
from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.grid import AVERAGE
from a2sf.analysis.results.labels import MINUS
from a2sf.analysis.runs.read import read_runs
from a2sf.analysis.statistics.pooled import SMALLEST, Changes, covariance_of, pool, pool_tasks
from a2sf.analysis.statistics.texts import TextClusters
from a2sf.commands import compare as compare_command
from a2sf.commands import tables as tables_command
from a2sf.errors import UserError
from tests.sweep_fixture import Plan, write_sweep

pytestmark = pytest.mark.usefixtures("few_flips")

MODELS = ("large", "small", "tiny")


def test_models_that_differ_much_are_a_plain_sample() -> None:
    values = np.array([0.05, -0.01, 0.12, 0.03])
    found = pool(values, np.diag(np.full(4, 1e-8)), 1000)
    expected = stats.ttest_1samp(values, 0)
    interval = expected.confidence_interval()
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.p == pytest.approx(expected.pvalue)
    assert found.tau == pytest.approx(values.std(ddof=1), rel=1e-3)
    ahead = stats.t.ppf(0.975, 3) * values.std(ddof=1) * math.sqrt(1 + 1 / 4)
    assert (found.next_low, found.next_high) == (
        pytest.approx(values.mean() - ahead),
        pytest.approx(values.mean() + ahead),
    )


def test_heterogeneity_is_that_of_statsmodels() -> None:
    values, variance = np.array([0.08, 0.01, -0.03]), np.full(3, 0.02**2)
    found, known = pool(values, np.diag(variance), 500), combine_effects(values, variance, method_re="pm")
    assert found.tau**2 == pytest.approx(known.tau2)
    assert found.i2 == pytest.approx(known.i2)
    assert found.p_equal == pytest.approx(known.test_homogeneity().pvalue)
    assert (found.low, found.high) == tuple(pytest.approx(x) for x in known.conf_int(use_t=True)[3])  # HKSJ


def test_models_with_equal_answers_are_no_more_than_one() -> None:
    change = np.random.default_rng(1).choice([1.0, -1.0, 0.0], 200, p=[0.12, 0.05, 0.83])
    keys = [str(i) for i in range(200)]
    found = pool_tasks([[Changes(change, keys)] * 3])
    error = math.sqrt(change.var(ddof=1) / 200)
    assert found.here_high - found.value == pytest.approx(stats.t.ppf(0.975, 199) * error, rel=0.02)
    assert (found.tau, found.i2) == (0.0, 0.0)


def test_the_covariance_is_by_documents_whatever_their_order() -> None:
    rng = np.random.default_rng(2)
    keys = np.array([str(i) for i in range(50)])
    a, b = rng.normal(size=50), rng.normal(size=50)
    mixed = rng.permutation(50)
    found = covariance_of([Changes(a, keys.tolist()), Changes(b[mixed], keys[mixed].tolist())])
    assert found == pytest.approx(np.cov(a, b) / 50)
    apart = covariance_of([Changes(a, keys.tolist()), Changes(b, [f"other {k}" for k in keys])])
    assert apart[0, 1] == 0


def test_documents_that_share_texts_count_as_texts() -> None:
    rng = np.random.default_rng(3)
    change = np.repeat(rng.normal(size=20), 4)
    keys = [str(i // 4) for i in range(80)]
    of_texts = Changes(change, keys)
    assert of_texts.variance == pytest.approx(TextClusters.keyed(keys).standard_error(change) ** 2)
    assert of_texts.variance > 3 * Changes(change, [str(i) for i in range(80)]).variance


def test_no_flip_is_not_certainty() -> None:
    keys = [str(i) for i in range(60)]
    found = pool_tasks([[Changes(np.zeros(60), keys)] * 2])
    assert (found.value, found.p) == (0.0, 1.0)
    assert found.here_low < -0.01 < 0.01 < found.here_high
    assert found.next_low is None  # two models


def test_p_values_at_the_edges() -> None:
    assert pool(np.array([0.1, 0.1]), np.zeros((2, 2)), 10).p == SMALLEST
    assert pool(np.array([0.1, -0.1]), np.eye(2) * 1e-4, 10).p == 1.0


@pytest.mark.parametrize(("models", "tau"), [(2, 0.0), (3, 0.05), (5, 0.05)])
def test_the_interval_covers(models: int, tau: float) -> None:
    """With common documents: half of what makes a document flip is the same in all models."""
    rng = np.random.default_rng(4)
    n, flips, mean, rounds = 100, 0.3, 0.03, 500
    covered = 0
    for _ in range(rounds):
        true = np.clip(mean + tau * rng.standard_normal(models), -0.25, 0.25)
        latent = math.sqrt(0.5) * rng.standard_normal(n) + math.sqrt(0.5) * rng.standard_normal((models, n))
        up, down = (stats.norm.isf((flips + s * true) / 2)[:, None] for s in (1, -1))
        change = (latent > up).astype(float) - (latent < -down)
        found = pool_tasks([[Changes(c, [str(i) for i in range(n)]) for c in change]])
        covered += found.low <= mean <= found.high
    assert covered / rounds >= 0.935


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    policies = ("full", "window", "h2o", "a2sf")
    for i, model in enumerate(MODELS):
        noise = {"full": 0.0, "window": 4.0 + i, "h2o": 2.0 + i, "a2sf": 1.0}
        write_sweep(root / model, Plan(model=model, seed=i + 1, policies=policies, noise=noise))
    return [root / m for m in MODELS]


def test_the_pair_and_the_full_cache_are_compared_over_models(sweeps: list[Path]) -> None:
    of_pair, of_full, notes = compare_over_models(gather(sweeps))
    assert not notes
    assert [(o.budget, o.task) for o in of_pair] == [
        (b, t) for b in ("0.2", "0.5") for t in ("arc_easy", "piqa", AVERAGE)
    ]
    assert {(o.first, o.second) for o in of_full} == {(p, "Full cache") for p in ("Window", "H2O", "A2SF")}
    for o in [*of_pair, *of_full]:
        assert list(o.by_model) == list(MODELS)
        assert o.pooled.value == pytest.approx(np.mean([d.value for d in o.by_model.values()]))
        assert o.pooled.low <= o.pooled.here_low <= o.pooled.value <= o.pooled.here_high <= o.pooled.high
        assert o.adjusted.p >= o.pooled.p
    averages = [o for o in of_pair if o.task == AVERAGE]
    least = min(averages, key=lambda o: o.pooled.p)
    assert least.adjusted.p == pytest.approx(min(1.0, 2 * least.pooled.p))  # the two rows of the table


def test_one_model_has_nothing_to_pool(sweeps: list[Path]) -> None:
    assert compare_over_models(gather(sweeps[:1])) == ([], [], [])


def test_a_task_that_a_model_lacks_is_named(sweeps: list[Path], tmp_path: Path) -> None:
    write_sweep(tmp_path / "other", Plan(model="other", seed=9, documents={"piqa": 150}))
    of_pair, _, notes = compare_over_models(gather([*sweeps, tmp_path / "other"]))
    assert {o.task for o in of_pair} == {"piqa"}
    assert notes == ["Not pooled over models, because a model lacks them: arc_easy."]


def test_tables_and_plots_of_several_models(sweeps: list[Path], tmp_path: Path, capsys) -> None:
    tables_command.main([*map(str, sweeps), "--out", str(tmp_path), "--no-report"])
    shown = capsys.readouterr().out
    assert f"Over 3 models: A2SF {MINUS} H2O, 0-shot (points)" in shown
    text = (tmp_path / "tables" / "tables.md").read_text()
    assert f"### Over 3 models: each policy {MINUS} full cache" in text
    assert "large, small, tiny; each model counts once" in text
    assert "n = 270 documents in each model." in text
    drawn = re.sub(r"\s+", " ", (tmp_path / "plots" / "forest.svg").read_text())
    assert "average over tasks; n = 270 documents in each model; intervals: 95 %" in drawn
    assert (tmp_path / "plots" / "forest.png").is_file()
    frame = pd.read_csv(tmp_path / "tables" / "models.csv")
    of_all = frame[frame["model"] == ALL]
    assert len(frame) == 4 * len(of_all)
    assert of_all["value"].to_numpy() == pytest.approx(
        frame[frame["model"] != ALL].groupby(["first", "second", "budget", "task"], sort=False)["value"].mean()
    )


def test_finished_runs_are_pooled_as_tables_are(sweeps: list[Path], tmp_path: Path, capsys) -> None:
    compare_command.main([*map(str, sweeps), "--out", str(tmp_path)])
    assert f"Over 3 models: each run {MINUS} Full cache" in capsys.readouterr().out
    assert (tmp_path / "forest.png").is_file()
    ours = pd.read_csv(tmp_path / "models.csv")
    _, of_full, _ = compare_over_models(gather(sweeps))
    theirs = over_models_frame(of_full)
    one = ours[(ours["first"] == "H2O 0.2") & (ours["model"] == ALL)].set_index("task")
    two = theirs[(theirs["first"] == "H2O") & (theirs["budget"] == "0.2") & (theirs["model"] == ALL)].set_index("task")
    for column in ("value", "low", "high", "p", "here_low", "here_high", "tau", "next_low"):
        assert one[column].to_dict() == pytest.approx(two[column].to_dict())


def test_the_user_names_the_models_of_runs(sweeps: list[Path]) -> None:
    runs = [r for s in sweeps[:2] for r in read_runs(s)]
    given = ["a"] * (len(runs) // 2) + ["b"] * (len(runs) // 2)
    named = with_models(runs, given)
    assert named[0].label == f"{runs[0].label} a"
    rows, notes = compare_runs_over_models(named)
    assert not notes
    assert all(list(r.by_model) == ["a", "b"] for r in rows)
    with pytest.raises(UserError, match="--models gives 1 names for"):
        with_models(runs, ["a"])


def test_one_verdict_over_models(sweeps: list[Path]) -> None:
    (claim,) = check_over_models(gather(sweeps))
    assert claim.claim == "large, small, tiny, 0-shot: a2sf above h2o, over the models"
    of_pair, _, _ = compare_over_models(gather(sweeps))
    assert claim.measured == pytest.approx(np.mean([o.pooled.value for o in of_pair if o.task == AVERAGE]))
    assert "budgets 0.2, 0.5" in claim.why
    assert check_over_models(gather(sweeps[:1])) == []


def test_verdicts_over_models(tmp_path: Path) -> None:
    """The same strong effect in each of five models, and the same the other way round."""
    places = []
    for i in range(5):
        noise = {"full": 0.0, "h2o": 6.0, "a2sf": 0.1}
        places.append(tmp_path / f"m{i}")
        plan = Plan(model=f"m{i}", seed=10 * i, policies=tuple(noise), noise=noise, budgets=(0.2,))
        write_sweep(places[-1], replace(plan, extra={"dtype": "float16"}))
    grid = gather(places)
    assert [c.verdict for c in check_over_models(grid)] == [Verdict.REPRODUCED]
    assert [c.verdict for c in check_over_models(grid, ("h2o", "a2sf"))] == [Verdict.NOT_REPRODUCED]
    figures = grid.frame[["model", "policy", "budget_ratio", "shots", "task", "value"]].assign(source="paper")
    assert [c.verdict for c in check_over_models(grid, published=figures)] == [Verdict.REPRODUCED]
    figures["value"] += 0.5 * (figures["policy"] == "a2sf")
    assert [c.verdict for c in check_over_models(grid, published=figures)] == [Verdict.NOT_REPRODUCED]


def test_a_published_mean_over_models(sweeps: list[Path]) -> None:
    grid = gather(sweeps)
    frame = grid.frame[grid.frame["policy"].isin(["a2sf", "h2o"])]
    figures = frame[["model", "policy", "budget_ratio", "shots", "task", "value"]].assign(source="paper")
    (claim,) = check_over_models(grid, published=figures)
    assert claim.published == pytest.approx(claim.measured)
    assert claim.verdict is Verdict.PROTOCOL  # float32
    assert "float32 instead of float16" in claim.why
    (not_run,) = check_over_models(None, published=figures)
    assert not_run.verdict is Verdict.NOT_RUN
    assert not_run.published == claim.published


def test_intervals_of_shares_end_where_a_difference_of_shares_does():
    keys = [str(i) for i in range(40)]
    up, down = np.repeat([1.0, 0.0], 20), np.repeat([0.0, -1.0], 20)
    found = pool_tasks([[Changes(up, keys), Changes(down, keys)]])
    assert (found.low, found.high) == (-1.0, 1.0)  # Student's t of one degree of freedom is 12.7
    numbers = pool_tasks([[Changes(3 * up, keys), Changes(3 * down, keys)]])
    assert numbers.high > 1
