"""Reports of tasks whose answers are written: what flipped, what was kept of what was written, and no empty pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from a2sf.analysis.comparisons.pairs import compare_pair
from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.selection import Selection
from a2sf.engine.trace import Trace
from a2sf.report.lengths import length_figure
from a2sf.report.output import TableOptions, show
from a2sf.report.page.documents import _short_enough, cached_map
from a2sf.report.plots.sweep import by_budget, trade_off
from a2sf.report.traced import picture
from a2sf.store.runs import load_sweep, write_cell
from tests.page import embedded
from tests.sweep_fixture import Plan, write_sweep

PLAN = Plan(policies=("full", "h2o", "a2sf"), budgets=(0.2,), documents={"nq_open": 12})


def written(directory: Path, metric: str = "exact_match", shares: bool = False, texts: bool = True) -> Path:
    """A sweep of answers that are written, every third of H2O's wrong."""
    for stored in write_sweep(directory / "choices", PLAN):
        n, policy = len(stored.documents), stored.cell["policy"]
        right = np.ones(n)
        right[::3] = 0.5 if shares else 0.0
        right = right if policy == "h2o" else np.ones(n)
        documents = stored.documents[["doc_id", "doc_hash", "prompt_hash", "context", "context_tokens"]].assign(
            choices=[[]] * n,
            gold=-1,
            prediction=-1,
            loglikelihoods=[[]] * n,
            continuation_tokens=[[3]] * n,
            context_tokens=[[10 * (i + 1)] for i in range(n)],
            target=[f"answer <{i}>" for i in range(n)],
            **{f"metric/{metric}": right},
        )
        if texts:
            documents = documents.assign(generated=[f"{policy} wrote & {i}" for i in range(n)])
        result = {k: v for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
        scored = {"value": right.mean(), "stderr": pd.Series(right).sem(), "n": n, "higher_is_better": True}
        write_cell(directory / "s" / stored.path.name, result | {"metrics": {metric: scored}}, documents, "policy: x\n")
    return directory / "s"


def test_generated_texts_can_be_browsed(tmp_path: Path) -> None:
    sweep = written(tmp_path)
    show([sweep], Selection(), TableOptions(plots=False))
    (entry,) = embedded(sweep / "report.html", "documents")
    assert (entry["documents"][3]["target"], entry["documents"][3]["choices"]) == ("answer <3>", [])
    texts = {a[9]["text"] for a in entry["answers"].values()}
    assert {"a2sf wrote & 9", "h2o wrote & 9"} <= texts
    assert embedded(sweep / "report.html", "charts")["parts"][0]["chance"] == {}


def test_a_page_has_what_was_thought_extracted_and_counted(tmp_path: Path) -> None:
    for stored in load_sweep(written(tmp_path, metric="exact_match,strict")):
        n = len(stored.documents)
        documents = stored.documents.assign(
            tokens=[[5, 6, i] for i in range(n)],
            finish="thinking",
            ended=False,
            thinking="hm",
            thinking_tokens=3,
            **{"extracted,strict": "42", "extracted,loose": "43"},
        )
        result = {k: v for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
        write_cell(tmp_path / "t" / stored.path.name, result, documents, "policy: x\n")
    show([tmp_path / "t"], Selection(), TableOptions(plots=False))
    (entry,) = embedded(tmp_path / "t" / "report.html", "documents")
    for answers in entry["answers"].values():
        shown = {k: answers[4][k] for k in ("count", "ids", "finish", "thinking", "thought", "extracted", "cut")}
        assert shown == {
            "count": 3,
            "ids": [5, 6, 4],
            "finish": "thinking",
            "thinking": "hm",
            "thought": 3,
            "extracted": "42",
            "cut": True,
        }
    (lengths, *_) = embedded(tmp_path / "t" / "report.html", "charts")["written"]
    assert (lengths["n"], lengths["mean"], lengths["cut"], lengths["quantiles"]) == (12, 3, 1, [3] * 101)


@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_a_map_of_what_is_cached_at_each_step(tokens: int) -> None:
    generator = np.random.default_rng(tokens)
    steps = np.arange(tokens) + generator.integers(0, tokens, (2, 3, tokens))
    mass = np.zeros(steps.shape, np.float32)
    trace = Trace(0, ("x",) * tokens, 1, steps.clip(max=tokens).astype(np.int32), mass, mass)
    found = cached_map(trace)
    assert len(found["steps"]) == len(found["positions"]) == min(tokens, 48)
    assert found["steps"][-1] == tokens - 1
    ends = [*found["positions"][1:], tokens]
    for step, row in zip(found["steps"], found["share"], strict=True):
        for first, end, share in zip(found["positions"], ends, row, strict=True):
            if first > step:
                assert share is None
            else:
                kept = trace.evicted_at[..., first:end] > step
                assert share == pytest.approx(100 * kept.mean(), abs=0.51)


def test_long_texts_leave_out_documents_but_not_the_first_twenty() -> None:
    texts = [[{"text": "x" * 100}] * 50, [{"text": "y" * 100, "thinking": "z" * 100}] * 50]
    assert _short_enough(range(50), texts, 300 * 30) == list(range(30))
    assert _short_enough(range(50), texts, 10) == list(range(20))
    assert _short_enough(range(5), [[None] * 5], 0) == list(range(5))


def test_texts_that_were_not_stored_are_missing(tmp_path: Path) -> None:
    sweep = written(tmp_path, texts=False)
    show([sweep], Selection(), TableOptions(plots=False))
    (entry,) = embedded(sweep / "report.html", "documents")
    assert all(a["text"] is None for answers in entry["answers"].values() for a in answers)


def test_documents_are_scored_by_the_metric_that_is_shown(tmp_path: Path) -> None:
    cells = write_sweep(tmp_path / "a", Plan(policies=("h2o", "a2sf"), budgets=(0.2,), documents={"piqa": 40}))
    for stored in cells:
        result = {k: v for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
        norm = np.arange(40) % (2 if stored.cell["policy"] == "h2o" else 5) > 0
        documents = stored.documents.assign(**{"metric/acc_norm": norm.astype(float)})
        result["metrics"]["acc_norm"]["value"] = float(norm.mean())
        write_cell(tmp_path / "s" / stored.path.name, result, documents, "policy: x\n")
    for metric in ("acc", "acc_norm"):
        out = tmp_path / metric
        show([tmp_path / "s"], Selection(metric=metric), TableOptions(out=out, plots=False))
        (comparison,) = compare_pair(gather([tmp_path / "s"], Selection(metric=metric)))[0]
        data, (entry,) = (embedded(out / "report.html", name) for name in ("charts", "documents"))
        number = {s["policy"]: str(i) for i, s in enumerate(data["systems"])}
        pairs = [*zip(*(entry["answers"][number[p]] for p in ("A2SF", "H2O")), strict=True)]
        assert sum(a["value"] > b["value"] for a, b in pairs) == comparison.difference.gained
        assert sum(a["value"] < b["value"] for a, b in pairs) == comparison.difference.lost


def test_no_picture_by_length_without_a_point(tmp_path: Path) -> None:
    grid = gather([written(tmp_path)])
    assert length_figure(grid) is None  # two or three documents a bin
    many = gather([write_wide(tmp_path)])
    figure = length_figure(many)
    assert figure is not None
    assert any(axis.lines for axis in figure.axes)
    plt.close(figure)


def write_wide(directory: Path) -> Path:
    for stored in write_sweep(
        directory / "wide", Plan(policies=("full", "h2o"), budgets=(0.2,), documents={"piqa": 40})
    ):
        result = {k: v for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
        documents = stored.documents.assign(context_tokens=[[100 if i % 2 else 900] for i in range(40)])
        write_cell(directory / "w" / stored.path.name, result, documents, "policy: x\n")
    return directory / "w"


@pytest.mark.parametrize("budgets", [(0.2,), (0.2, 0.5)])
def test_points_of_one_budget_have_bars_where_others_have_bands(tmp_path: Path, budgets: tuple[float, ...]) -> None:
    write_sweep(tmp_path / "s", Plan(policies=("full", "h2o", "a2sf"), budgets=budgets, documents={"piqa": 40}))
    figure = by_budget(gather([tmp_path / "s"]))
    assert figure is not None
    (axis,) = figure.axes
    widths = [
        segment[:, 1].max() - segment[:, 1].min()
        for drawn in axis.collections
        for segment in ([p.vertices for p in drawn.get_paths()])
    ]
    assert len(widths) == 2
    assert min(widths) > 5  # points of accuracy, of 40 documents
    plt.close(figure)


def test_time_that_is_charged_is_not_called_a_measured_speed(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", PLAN)
    figure = trade_off(gather([tmp_path / "s"]))
    assert figure is not None
    assert figure.axes[0].get_xlabel() == "tokens/s of charged time"
    plt.close(figure)


def trace(more: tuple[str, ...], document: int = 0) -> Trace:
    pieces = ("The ", "question", "? ", *more)
    n = len(pieces)
    evicted_at = np.full((2, 1, n), n)
    return Trace(document, pieces, 3, evicted_at, np.zeros((2, 1, n)), np.zeros((2, 1, n)))


def test_a_picture_extends_to_what_each_policy_wrote(tmp_path: Path) -> None:
    picture({"One": trace(("yes ", "indeed")), "Two": trace(("no",))}, tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text(encoding="utf-8")
    for piece in ("indeed", "no", "yes "):
        assert f"<!-- {piece.strip()}" in drawn
    assert "underlined: generated text" in drawn
    picture({"One": trace(("yes",)), "Two": trace(("yes",))}, tmp_path / "q.svg")
    other = Trace(0, ("An", "other", "one"), 3, np.full((2, 1, 3), 3), np.zeros((2, 1, 3)), np.zeros((2, 1, 3)))
    with pytest.raises(ValueError, match="one document"):
        picture({"One": trace(()), "Two": other}, tmp_path / "r.svg")
