"""Runs of three harnesses in one form, their documents matched, and what is said of a margin."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control

from a2sf.analysis.comparisons.runs import compare_runs, with_labels
from a2sf.analysis.runs.read import read_runs
from a2sf.analysis.runs.run import Document, Run, TaskRun, pair, variance_of_drawn_difference, variance_of_draws
from a2sf.analysis.statistics.equivalence import average_within_margin, tango_score, within_margin
from a2sf.analysis.statistics.paired import holm, mcnemar_p
from a2sf.analysis.statistics.texts import TextClusters
from a2sf.commands import compare
from a2sf.errors import ConfigError, UserError
from a2sf.report.tables.runs import comparison_table
from a2sf.store.archive import read_sweep
from tests.sweep_fixture import Plan, write_sweep

pytestmark = pytest.mark.usefixtures("few_flips")

QUESTIONS = [f"What is {i} plus {i}?" for i in range(40)]


def lm_eval_file(folder, right, task="sums", metric="acc", filtered="none", questions=QUESTIONS):
    """lm-eval's file of a task's documents, as its version 0.4.13 writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "doc_id": i,
            "doc": {"question": q, "answer": str(2 * i)},
            "target": str(2 * i),
            "arguments": {"gen_args_0": {"arg_0": f"Question: {q}\nAnswer:", "arg_1": " 4"}},
            "resps": [[["-1.0", "False"]]],
            "filtered_resps": [["-1.0", "False"]],
            "filter": filtered,
            "metrics": [metric],
            "doc_hash": f"hash-{q}",
            "prompt_hash": "p",
            "target_hash": "t",
            metric: float(x),
        }
        for i, (q, x) in enumerate(zip(questions, right, strict=True))
    ]
    file = folder / f"samples_{task}_2026-11-29T08-00-00.123456.jsonl"
    with file.open("a") as out:
        out.write("".join(json.dumps(line) + "\n" for line in lines))
    return file


def inspect_log(path, right, task="inspect_evals/sums", questions=QUESTIONS, epochs=1, scorer="match"):
    """A log of inspect_ai in its `.eval` format: a zip archive with a header and a file for each sample and epoch."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "header.json", json.dumps({"version": 2, "status": "success", "eval": {"task": task, "model": "m"}})
        )
        for i, (question, grades) in enumerate(zip(questions, right, strict=True)):
            for epoch in range(epochs):
                grade = grades[epoch] if epochs > 1 else grades
                sample = {
                    "id": i + 1,
                    "epoch": epoch + 1,
                    "input": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}],
                    "target": str(2 * i),
                    "metadata": {"book": i // 4},
                    "scores": {scorer: {"value": "C" if grade else "I", "answer": "4"}},
                }
                archive.writestr(f"samples/{i + 1}_epoch_{epoch + 1}.json", json.dumps(sample))
    return path


def answers(share, seed):
    return (np.random.default_rng(seed).random(len(QUESTIONS)) < share).astype(int)


def test_two_runs_of_lm_eval(tmp_path):
    a, b = answers(0.8, 1), answers(0.5, 2)
    lm_eval_file(tmp_path / "full" / "model", a)
    lm_eval_file(tmp_path / "pruned" / "model", b)
    runs = [run for name in ("full", "pruned") for run in read_runs(tmp_path / name)]
    assert [r.label for r in runs] == ["full", "pruned"]
    (row,) = compare_runs(runs).rows
    gained, lost = int((b > a).sum()), int((b < a).sum())
    assert (row.difference.gained, row.difference.lost, row.difference.n) == (gained, lost, 40)
    assert row.difference.value == pytest.approx(b.mean() - a.mean())
    assert row.difference.p == row.adjusted.p == pytest.approx(mcnemar_p(gained, lost))


def test_a_longer_run_is_compared_on_the_documents_that_both_have(tmp_path):
    lm_eval_file(tmp_path / "few", answers(0.8, 1)[:25], questions=QUESTIONS[:25])
    lm_eval_file(tmp_path / "all", answers(0.5, 2))
    made = compare_runs([*read_runs(tmp_path / "few"), *read_runs(tmp_path / "all")])
    assert made.rows[0].difference.n == 25
    assert made.notes == [
        "all, sums: 25 documents are compared, matched by doc_hash; without a partner are 0 of few and 15 of all."
    ]


def test_filters_are_metrics_and_the_newest_file_counts(tmp_path):
    old = lm_eval_file(tmp_path, answers(0.5, 1), metric="exact_match", filtered="strict-match")
    old.rename(old.with_name(old.name.replace("2026", "2025")))
    file = lm_eval_file(tmp_path, right := answers(0.8, 2), metric="exact_match", filtered="strict-match")
    lm_eval_file(tmp_path, np.ones(40), metric="exact_match", filtered="flexible-extract")
    (run,) = read_runs(tmp_path)
    assert run.tasks["sums"].metrics == ["exact_match,strict-match", "exact_match,flexible-extract"]
    assert [d.values["exact_match,strict-match"] for d in run.tasks["sums"].documents] == [[float(x)] for x in right]
    assert read_runs(file)[0].tasks.keys() == {"sums"}


def test_inspect_ai_against_lm_eval_by_the_questions_text(tmp_path):
    a, b = answers(0.8, 1), answers(0.6, 2)
    lm_eval_file(tmp_path / "lm_eval", a)
    log = inspect_log(tmp_path / "log.eval", b)
    made = compare_runs([*read_runs(tmp_path / "lm_eval"), *read_runs(log)])
    assert made.rows[0].difference.value == pytest.approx(b.mean() - a.mean())
    assert made.metrics == {"sums": "acc / match"}
    assert made.notes == ["log, sums: documents are matched by their text."]


def test_sampled_answers_count_with_their_mean_and_their_share_of_the_error(tmp_path):
    rng = np.random.default_rng(0)
    level = rng.random(40)
    right = (rng.random((40, 8)) < level[:, None]).astype(int)
    one = inspect_log(tmp_path / "one.eval", answers(0.5, 1))
    eight = inspect_log(tmp_path / "eight.eval", right.tolist(), epochs=8)
    runs = [*read_runs(one), *read_runs(eight)]
    (row,) = compare_runs(runs).rows
    assert row.value == pytest.approx(right.mean())
    within = (right.var(axis=1, ddof=1) / 8).mean() / 40
    assert variance_of_draws(runs[1].tasks["sums"].documents, "match") == pytest.approx(within)
    assert row.draws == pytest.approx(within / (right.mean(axis=1).var(ddof=1) / 40))
    assert variance_of_draws(runs[0].tasks["sums"].documents, "match") is None


def test_the_drawn_part_of_a_differences_error():
    """Whether answers of two systems are drawn with the same random numbers, or independently."""
    rng = np.random.default_rng(0)
    p, q, n, k = rng.random(50), rng.random(50), 50, 4

    def documents(values):
        return [Document(values={"m": list(v)}) for v in values]

    for together in (True, False):
        means, parts, uneven = [], [], []
        for _ in range(300):
            u = rng.random((n, k))
            first = (u < p[:, None]).astype(float)
            second = ((u if together else rng.random((n, k))) < q[:, None]).astype(float)
            means.append((second - first).mean())
            parts.append(variance_of_drawn_difference(documents(first), documents(second), ("m", "m")))
            uneven.append(variance_of_drawn_difference(documents(first), documents(second[:, :3]), ("m", "m")))
        assert np.mean(parts) == pytest.approx(np.var(means, ddof=1), rel=0.2)
        if not together:
            assert np.mean(uneven) > np.mean(parts)
    single = documents(np.ones((n, 1)))
    assert variance_of_drawn_difference(single, single, ("m", "m")) is None


def test_documents_of_one_book_are_a_cluster(tmp_path):
    log = inspect_log(tmp_path / "a.eval", answers(0.5, 1)), inspect_log(tmp_path / "b.eval", answers(0.6, 2))
    plain = compare_runs([run for path in log for run in read_runs(path)]).rows[0]
    clustered = compare_runs([run for path in log for run in read_runs(path, "book")]).rows[0]
    assert plain.difference.value == clustered.difference.value
    assert plain.difference.p != clustered.difference.p


def test_a_sweep_is_a_run_for_each_system_the_full_cache_first(tmp_path):
    directory = tmp_path / "s"
    write_sweep(directory, Plan())
    runs = read_runs(directory)
    assert runs[0].label == "Full cache"
    assert len(runs) == len({r.label for r in runs}) > 2
    made = compare_runs(runs, margin=0.05)
    stored = {(s.cell["policy"], s.cell["task"]): s for s in read_sweep(directory)}
    assert {r.task for r in made.rows} == {task for _, task in stored} | {"average"}
    assert {r.verdict for r in made.rows} <= {"yes", "no", "not shown"}


def test_documents_that_come_twice_are_matched_in_their_order():
    a = TaskRun("t", tuple(Document(hash="same", values={"acc": [x]}) for x in (0.0, 1.0)))
    b = TaskRun("t", tuple(Document(hash="same", values={"acc": [x]}) for x in (1.0, 1.0, 0.0)))
    found = pair(a, b)
    assert [d.values["acc"][0] for d in found.second] == [1.0, 1.0]
    assert (found.only_first, found.only_second) == (0, 1)


def test_the_command_writes_tables(tmp_path, capsys):
    for name, share in (("full", 0.8), ("pruned", 0.7)):
        for task in ("sums", "more"):
            lm_eval_file(tmp_path / name, answers(share, len(name)), task=task)
    compare.main([str(tmp_path / "full"), str(tmp_path / "pruned"), "--margin", "20", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "Runs against full: acc (%)" in said
    assert (
        " ".join(said.split()).count("Holm-corrected over the 3 tests of this table") == 2
    )  # differences, and the margin
    assert "average" in said
    assert max(map(len, said.splitlines()[:8])) <= 80
    assert "| sums | pruned | 40 |" in (tmp_path / "out" / "compare.md").read_text()
    assert r"\toprule" in (tmp_path / "out" / "compare.tex").read_text()
    frame = pd.read_csv(tmp_path / "out" / "compare.csv")
    assert len(frame) == 3
    assert frame["detectable"].between(0.05, 0.5).all()  # also of the average
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "<title>Runs against full</title>" in page
    assert page.count("<svg") == 1  # the differences with their intervals
    assert page.count("Holm-corrected over the 3 tests of this table") == 2
    assert "<dt>pruned</dt>" in page
    assert (tmp_path / "out" / "differences.png").is_file()


def test_no_model_and_no_torch_are_imported(tmp_path):
    for name, seed in (("full", 1), ("pruned", 2), ("full2", 3), ("pruned2", 4)):
        lm_eval_file(tmp_path / name, answers(0.7, seed))
    names = ["full", "pruned", "full2", "pruned2"]
    code = (
        "import sys; from a2sf.commands import compare; "
        f"compare.main({[*names, '--labels', 'a,b,a,b', '--models', 'x,x,y,y', '--margin', '5', '--out', 'out']}); "
        "print('loaded', sorted({'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)))"
    )
    made = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert made.stdout.splitlines()[-1] == "loaded []"
    assert (tmp_path / "out" / "forest.svg").is_file()


def test_a_run_may_be_called_as_a_column(tmp_path):
    for name in ("Value", "b"):
        lm_eval_file(tmp_path / name, answers(0.7, len(name)))
    made = compare_runs([run for name in ("Value", "b") for run in read_runs(tmp_path / name)])
    frame = comparison_table(made).frame
    assert frame["Value (first run)"][0] == f"{100 * answers(0.7, 5).mean():.1f}"
    assert frame["Value"][0] == f"{100 * answers(0.7, 1).mean():.1f}"


def test_the_family_and_the_method_of_correction_are_chosen_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["full", "a", "b", "full2", "a2", "b2"]
    for seed, name in enumerate(names):
        lm_eval_file(tmp_path / name, answers(0.9 if "full" in name else 0.6, seed))
    common = [*names, "--labels", "full,a,b,full,a,b", "--models", "x,x,x,y,y,y", "--margin", "20", "--out", "out"]
    made = {}
    for family, method in (("model", "holm"), ("table", "fdr")):
        compare.main([*common, "--family", family, "--correction", method])
        made[family, method] = pd.read_csv("out/compare.csv"), Path("out/compare.md").read_text()
    capsys.readouterr()
    frame, text = made["model", "holm"]
    x, y = frame[frame["tests"] == 2], frame[frame["tests"] == 3]
    assert [*x["p_holm"], *y["p_holm"]] == pytest.approx([*holm([*x["p"]]), *holm([*y["p"]])])
    assert text.count("Holm-corrected over the tests of each model (2 to 3)") == 2  # differences, and the margin
    assert "Holm-corrected over the 2 tests of this model" in text  # pooled over the models
    frame, text = made["table", "fdr"]
    assert frame["p_fdr"].tolist() == pytest.approx(false_discovery_control(frame["p"]).tolist())
    assert (frame["tests"] == 5).all()
    assert "p_equivalent_fdr" in frame
    assert "p (FDR)" in text
    assert text.count("false discovery rate (Benjamini and Hochberg)") == 3
    assert "Holm" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "a"], "nowhere does not exist; give a cell or sweep"),
        (["empty", "a"], "empty holds no results with documents"),
        (["a"], "a is one run"),
        (["a", "b", "--metric", "akk"], "sums has no metric akk for each document; it has acc"),
        (["a", "b", "--margin", "0"], "--margin=0.0 is not allowed: give a number of points above 0"),
        (["a", "b", "--labels", "x"], "--labels gives 1 names for 2 runs"),
        (["a", "other"], "no document of one run is in the other"),
        (["a", "broken.eval"], r"broken\.eval cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.eval").write_text("nothing")
    lm_eval_file(tmp_path / "a", answers(0.5, 1))
    lm_eval_file(tmp_path / "b", answers(0.5, 2))
    lm_eval_file(tmp_path / "other", answers(0.5, 2), questions=[f"Who was number {i}?" for i in range(40)])
    with pytest.raises((UserError, ConfigError), match=message):
        compare.main(arguments)


def test_equal_names_are_distinguished_by_their_folders(tmp_path):
    runs = [Run("model", "x", {}), Run("model", "y", {}), Run("other", "z", {})]
    assert [r.label for r in with_labels(runs, None)] == ["model (x)", "model (y)", "other"]


# ---- equivalence


def test_tangos_statistic_at_no_difference_is_mcnemars():
    assert tango_score([(14, 6, 50)], 0.0) == pytest.approx((14 - 6) / np.sqrt(14 + 6))


def test_few_documents_show_nothing_and_many_show_equivalence():
    same = np.tile([1.0, 0.0], 20)
    assert within_margin(same, same, 0.01).p_equivalent > 0.05
    many = np.tile([1.0, 0.0], 2000)
    assert within_margin(many, many, 0.01).p_equivalent < 0.001


def test_documents_of_a_single_text_show_nothing():
    """Their error is not known, however many there are."""
    values = np.linspace(0, 1, 50)
    one = TextClusters(np.zeros(50, int))
    assert within_margin(values, values + 0.01, 0.1, one).p_equivalent == 1.0
    assert average_within_margin([values - values[::-1]], [one], 0.5).p_equivalent == 1.0


def test_equal_answers_to_few_documents_are_no_proof():
    few, many = ([np.zeros(n)] * 2 for n in (5, 500))
    assert average_within_margin(few, [TextClusters.independent(5)] * 2, 0.01).p_equivalent > 0.05
    assert average_within_margin(many, [TextClusters.independent(500)] * 2, 0.01).p_equivalent < 0.01


def drawn(rng, n, difference, flips, clusters=None):
    """Right-or-wrong answers of two systems whose true difference is given; each cluster has one pair of answers."""
    size = n if clusters is None else clusters
    kind = rng.choice(3, size, p=[(flips + difference) / 2, (flips - difference) / 2, 1 - flips])
    kind = kind if clusters is None else np.repeat(kind, n // clusters)
    base = rng.integers(0, 2, len(kind)).astype(float)
    return np.where(kind == 0, 1.0, np.where(kind == 1, 0.0, base)), np.where(
        kind == 0, 0.0, np.where(kind == 1, 1.0, base)
    )


@pytest.mark.parametrize(("n", "flips", "clusters"), [(60, 0.2, None), (300, 0.12, None), (200, 0.25, 50)])
def test_the_level_of_equivalence_is_kept_at_the_margin(n, flips, clusters):
    """A true difference of exactly the margin is called smaller in at most 5 % of samples (and some simulation error)."""
    rng = np.random.default_rng(3)
    texts = None if clusters is None else TextClusters(np.repeat(np.arange(clusters), n // clusters))
    wrong = [within_margin(*drawn(rng, n, -0.1, flips, clusters), 0.1, texts).p_not_worse < 0.05 for _ in range(2000)]
    assert np.mean(wrong) < 0.065


def test_the_power_of_equivalence_is_not_nothing():
    rng = np.random.default_rng(4)
    shown = [within_margin(*drawn(rng, 400, 0.0, 0.1), 0.05).p_equivalent < 0.05 for _ in range(300)]
    assert np.mean(shown) > 0.7


@pytest.mark.parametrize(
    ("tasks", "n", "margin", "flips", "size"),
    [
        (3, 100, 0.01, 0.01, 1),
        (6, 200, 0.01, 0.02, 1),
        (3, 100, 0.05, 0.2, 1),
        (3, 100, 0.05, 0.06, 4),
        (1, 200, 0.05, 0.06, 4),
    ],
)
def test_the_level_of_an_average_is_kept_if_few_answers_flip(tasks, n, margin, flips, size):
    """`size` documents share a text and flip together. The error of few flips alone would be too small."""
    rng = np.random.default_rng(7)
    texts = [TextClusters(np.repeat(np.arange(n // size), size))] * tasks
    p = [(flips - margin) / 2, (flips + margin) / 2, 1 - flips]

    def shown() -> bool:
        changes = [np.repeat(rng.choice([1.0, -1.0, 0.0], n // size, p=p), size) for _ in range(tasks)]
        return average_within_margin(changes, texts, margin).p_not_worse < 0.05

    assert np.mean([shown() for _ in range(1500)]) < 0.065
