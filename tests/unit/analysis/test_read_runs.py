"""What is read of other harnesses' files, and what is refused or said of odd ones."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from a2sf.analysis.comparisons.runs import compare_runs
from a2sf.analysis.runs.read import read_runs
from a2sf.commands import compare
from a2sf.errors import ConfigError, UserError
from tests.unit.analysis.test_compare_runs import QUESTIONS, answers, inspect_log, lm_eval_file

pytestmark = pytest.mark.usefixtures("few_flips")
ROOT = Path(__file__).parents[3]
RIVERS = [f"Name the river number {i}." for i in range(40)]


def rewritten(file, change):
    """lm-eval's file with each sample changed by a function of its number and itself."""
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    for i, sample in enumerate(samples):
        change(i, sample)
    file.write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
    return file


def with_zstandard(path):
    """The same zip archive with members of method 93, which Python's zipfile cannot write before 3.14."""
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, pa.compress(content, codec="zstd", asbytes=True))
        infos = archive.infolist()
        start = archive.fp.tell()  # of the directory that closing writes
    data = bytearray(path.read_bytes())
    for info in infos:
        for place, method, size in ((info.header_offset, 8, 22), (start, 10, 24)):
            struct.pack_into("<H", data, place + method, 93)
            struct.pack_into("<L", data, place + size, len(members[info.filename]))
        start += 46 + len(info.filename)
    path.write_bytes(data)
    return path


def test_logs_of_present_versions_of_inspect_ai_are_compressed_by_zstandard(tmp_path):
    a, b = answers(0.8, 1), answers(0.6, 2)
    plain = inspect_log(tmp_path / "plain.eval", a)
    packed = with_zstandard(inspect_log(tmp_path / "packed.eval", b))
    with zipfile.ZipFile(packed) as archive:
        assert {i.compress_type for i in archive.infolist()} == {93}
    (row,) = compare_runs([*read_runs(plain), *read_runs(packed)]).rows
    assert (row.difference.n, row.value) == (40, pytest.approx(b.mean()))


def test_equal_sample_ids_of_other_questions_are_no_pairs(tmp_path):
    a = inspect_log(tmp_path / "a.eval", answers(0.8, 1))
    b = inspect_log(tmp_path / "b.eval", answers(0.6, 2), task="rivers", questions=RIVERS)
    with pytest.raises(UserError, match="no document of one run is in the other"):
        compare_runs([*read_runs(a), *read_runs(b)])
    moved = inspect_log(tmp_path / "c.eval", answers(0.6, 2)[::-1], questions=QUESTIONS[::-1])  # ids of another order
    made = compare_runs([*read_runs(a), *read_runs(moved)])
    assert made.rows[0].difference.gained == int((answers(0.6, 2) > answers(0.8, 1)).sum())
    assert made.notes == ["c, sums: documents are matched by their text."]


def test_a_directory_with_a_log_of_each_task_is_one_run(tmp_path):
    for name, share in (("full", 0.9), ("pruned", 0.5)):
        (tmp_path / name).mkdir()
        inspect_log(tmp_path / name / "1.eval", answers(share, 1))
        inspect_log(tmp_path / name / "2.eval", answers(share, 2), task="rivers", questions=RIVERS)
    made = compare_runs([run for name in ("full", "pruned") for run in read_runs(tmp_path / name)])
    assert [(r.task, r.run, r.difference.n) for r in made.rows] == [
        ("sums", "pruned", 40),
        ("rivers", "pruned", 40),
        ("average", "pruned", 80),
    ]
    inspect_log(tmp_path / "full" / "3.eval", answers(0.5, 3))  # the task again: another system
    assert [r.label for r in read_runs(tmp_path / "full")] == ["1", "2", "3"]
    (tmp_path / "one").mkdir()
    inspect_log(tmp_path / "one" / "2026-11-30T10-00-00_sums_x.eval", answers(0.5, 1))
    assert [r.label for r in read_runs(tmp_path / "one")] == ["one"]


def test_samples_without_a_score_and_unfinished_logs_are_reported(tmp_path):
    log = inspect_log(tmp_path / "a.eval", answers(0.8, 1))
    with zipfile.ZipFile(log) as archive:
        members = {n: json.loads(archive.read(n)) for n in archive.namelist()}
    members["header.json"]["status"] = "cancelled"
    members["samples/3_epoch_1.json"]["scores"]["match"]["value"] = "unknown"
    with zipfile.ZipFile(log, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, json.dumps(content))
    (run,) = read_runs(log)
    assert len(run.tasks["sums"].documents) == 39
    assert run.notes == (
        "a: 1 of 40 samples have no score that is a number, and are left out.",
        "a: the status of this log is cancelled, so that samples may be missing.",
    )
    other = inspect_log(tmp_path / "b.eval", answers(0.6, 2))
    assert [*run.notes] == compare_runs([run, *read_runs(other)]).notes[:2]


def test_a_scorer_with_several_values_gives_a_metric_for_each(tmp_path):
    log = inspect_log(tmp_path / "a.eval", answers(0.8, 1))
    with zipfile.ZipFile(log) as archive:
        members = {n: json.loads(archive.read(n)) for n in archive.namelist()}
    for name, content in members.items():
        if name.startswith("samples/"):
            content["scores"]["match"]["value"] = {"precise": 0.5, "right": "C"}
    with zipfile.ZipFile(log, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, json.dumps(content))
    (run,) = read_runs(log)
    assert run.tasks["sums"].metrics == ["match/precise", "match/right"]
    with pytest.raises(UserError, match="sums has the metrics match/precise, match/right; choose one with --metric"):
        compare_runs([run, run])


def test_the_folders_of_two_models_are_two_runs(tmp_path):
    for model, seed in (("A", 1), ("B", 2)):
        lm_eval_file(tmp_path / "out" / model, answers(0.6, seed))
    assert [r.label for r in read_runs(tmp_path / "out")] == ["A", "B"]


def test_of_several_files_of_a_task_the_newest_counts_and_is_named(tmp_path):
    old = lm_eval_file(tmp_path / "a", np.zeros(40))
    old.rename(old.with_name(old.name.replace("2026", "2025")))
    new = lm_eval_file(tmp_path / "a", np.ones(40))
    lm_eval_file(tmp_path / "b", np.ones(40))
    made = compare_runs([*read_runs(tmp_path / "a"), *read_runs(tmp_path / "b")])
    assert made.rows[0].reference == 1.0
    assert made.notes == [f"a: sums has 2 files; the newest, {new.name}, is compared."]


def test_line_separators_of_unicode_are_part_of_a_text(tmp_path):
    def change(i, sample):
        sample["target"] = "one\u2028two\u0085three"

    file = rewritten(lm_eval_file(tmp_path, answers(0.6, 2)), change)
    assert len(read_runs(file)[0].tasks["sums"].documents) == 40


def test_samples_of_versions_that_name_no_metrics(tmp_path):
    def change(i, sample):
        del sample["metrics"], sample["filter"]

    file = rewritten(lm_eval_file(tmp_path, answers(0.6, 2)), change)
    assert read_runs(file)[0].tasks["sums"].metrics == ["acc"]


def test_the_metric_that_both_runs_have_is_compared(tmp_path):
    def change(i, sample):
        sample["metrics"].append("exact_match")
        sample["exact_match"] = float(i % 2)

    rewritten(lm_eval_file(tmp_path / "a", answers(0.8, 1)), change)
    lm_eval_file(tmp_path / "b", answers(0.6, 2), metric="exact_match")
    for order in ("ab", "ba"):
        made = compare_runs([run for name in order for run in read_runs(tmp_path / name)])
        assert made.metrics == {"sums": "exact_match"}
        assert {made.rows[0].value, made.rows[0].reference} == {0.5, answers(0.6, 2).mean()}


def test_a_metric_that_a_document_lacks_is_not_replaced_by_another(tmp_path):
    def change(i, sample):
        sample["metrics"].append("exact_match")
        sample["exact_match"] = 1.0
        if i == 3:
            sample["acc"] = float("nan")

    lm_eval_file(tmp_path / "a", answers(0.8, 1))
    rewritten(lm_eval_file(tmp_path / "b", answers(0.6, 2)), change)
    for requested in (None, "acc"):
        with pytest.raises(UserError, match="acc is a number in 39 of 40 documents only"):
            compare_runs([run for name in "ab" for run in read_runs(tmp_path / name)], requested)


def test_shares_and_other_numbers_are_not_averaged(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c", "d"):
        lm_eval_file(tmp_path / name, answers(0.7, ord(name)))
        lm_eval_file(tmp_path / name, 5 + rng.random(40), task="texts", metric="rouge")
    made = compare_runs([run for name in "ab" for run in read_runs(tmp_path / name)])
    assert [r.task for r in made.rows] == ["sums", "texts"]
    assert made.notes == ["No average over tasks: the metric is a share in sums, and not in texts."]
    names = [str(tmp_path / n) for n in "abcd"]
    compare.main([*names, "--labels", "x,y,x,y", "--models", "m,m,n,n", "--out", str(tmp_path / "out")])
    assert "average" not in (tmp_path / "out" / "models.csv").read_text()


def test_a_field_that_no_document_has_is_refused_and_one_of_some_is_reported(tmp_path, capsys):
    def change(i, sample):
        if i < 20:
            sample["doc"]["passage"] = f"passage {i // 4}"

    for name, seed in (("a", 1), ("b", 2)):
        rewritten(lm_eval_file(tmp_path / name, answers(0.7, seed)), change)
        lm_eval_file(tmp_path / name, answers(0.7, seed), task="rivers", questions=RIVERS)
    with pytest.raises(ConfigError, match="--cluster=pasage is not allowed: no document has this field"):
        compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--cluster", "pasage"])
    compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--cluster", "passage"])
    said = " ".join(capsys.readouterr().out.split())
    assert "No document of rivers has the field passage, so that they count singly." in said
    # documents without the field share nothing: 20 in 5 texts, and 20 alone
    assert "Documents share texts (sums: 40 documents in 25 texts)" in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", json.dumps({"results": {"sums": {"acc,none": 0.5}}}), "results.json holds no documents"),
        ("list.json", "[]", "list.json holds no documents"),
        ("samples_sums_2026-11-29T08-00-00.1.jsonl", "", "has 0 documents, and none has a metric"),
        ("samples_sums_2026-11-29T08-00-00.1.jsonl", "[1]\n", "cannot be read"),
    ],
)
def test_files_without_documents_are_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    lm_eval_file(tmp_path / "a", answers(0.5, 1))
    with pytest.raises(UserError, match=message):
        compare_runs([*read_runs(tmp_path / "a"), *read_runs(tmp_path / name)])


def test_the_screen_shows_the_whole_name_of_each_run(tmp_path, capsys):
    names = [f"a run with a long name and shots {i}" for i in range(3)]
    for i, name in enumerate(names):
        lm_eval_file(tmp_path / name, answers(0.5, i))
    compare.main([str(tmp_path / n) for n in names])
    said = capsys.readouterr().out
    assert names[1] in said.splitlines()
    assert names[2] in said.splitlines()


def test_runs_with_different_shots_or_task_versions_are_named(tmp_path):
    """lm-eval's results file beside the samples says them."""
    runs = []
    for shots, version in ((0, 1.0), (5, 2.0)):
        file = lm_eval_file(tmp_path / f"shots{shots}", answers(0.8, 1))
        results = {"n-shot": {"sums": shots}, "versions": {"sums": version}}
        file.with_name(file.name.replace("samples_sums", "results").removesuffix("l")).write_text(json.dumps(results))
        runs += read_runs(file.parent)
    notes = compare_runs(runs).notes
    assert "shots5, sums: different shots: 0 in shots0, 5 in shots5." in notes
    assert "shots5, sums: different task version: 1.0 in shots0, 2.0 in shots5." in notes


@pytest.mark.parametrize(("metric", "score"), [("perplexity", None), ("middle", 1.0)])
def test_numbers_of_which_a_score_is_not_the_mean_are_not_compared(tmp_path, metric, score):
    """lm-eval logs log-likelihoods of a perplexity; of other scores its results file says that they are not the mean."""
    runs = []
    for name, share in (("a", 0.8), ("b", 0.6)):
        lm_eval_file(tmp_path / name, answers(share, 1), metric=metric)
        file = lm_eval_file(tmp_path / name, answers(share, 1))
        if score is not None:
            results = {"results": {"sums": {f"{metric},none": score, "acc,none": float(np.mean(answers(share, 1)))}}}
            file.with_name(file.name.replace("samples_sums", "results").removesuffix("l")).write_text(
                json.dumps(results)
            )
        runs += read_runs(tmp_path / name)
    assert compare_runs(runs).metrics == {"sums": "acc"}
    with pytest.raises(UserError, match=f"sums has no metric {metric} for each document; it has acc"):
        compare_runs(runs, metric=metric)


def test_the_full_cache_has_no_schedule_in_its_name():
    runs = read_runs(ROOT / "runs/reference/findings/heldout_methods.a2sf.zip")
    assert runs[0].label == "Full cache"
    assert "H2O 0.2 of context prompt" in [run.label for run in runs]
