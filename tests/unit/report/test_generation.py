"""Reports of tasks whose answers are written: what flipped, what was kept of what was written, and no empty pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from a2sf.analysis.comparisons.flips import flips
from a2sf.analysis.comparisons.pairs import compare_pair
from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.selection import Selection
from a2sf.engine.trace import Trace
from a2sf.report.lengths import length_figure
from a2sf.report.output import Options, show
from a2sf.report.plots.sweep import by_budget, trade_off
from a2sf.report.traced import picture
from a2sf.store.runs import write_cell
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


def test_what_is_lost_is_shown_as_flipped(tmp_path: Path) -> None:
    sweep = written(tmp_path)
    grid = gather([sweep])
    (comparison,) = compare_pair(grid)[0]
    assert (comparison.difference.gained, comparison.difference.lost) == (4, 0)
    shown, total = flips(grid)
    assert total == 4 == len(shown)
    assert [(f.doc_id, f.gained, f.target, f.first_text) for f in shown][1] == (3, True, "answer <3>", "a2sf wrote & 3")
    show([sweep], Selection(), Options(plots=False))
    html = (sweep / "report.html").read_text(encoding="utf-8")
    for text in ("answer &lt;3&gt;", "a2sf wrote &amp; 3", "h2o wrote &amp; 9"):
        assert text in html
    assert "is known to have flipped" not in html
    assert "lead moved" not in html


def test_texts_that_were_not_stored_are_said(tmp_path: Path) -> None:
    sweep = written(tmp_path, texts=False)
    show([sweep], Selection(), Options(plots=False))
    assert "(texts were not stored)" in (sweep / "report.html").read_text(encoding="utf-8")


def test_a_metric_of_shares_has_no_flips_and_says_why(tmp_path: Path) -> None:
    sweep = written(tmp_path, "f1", shares=True)
    assert flips(gather([sweep])) == ([], 0)
    show([sweep], Selection(), Options(plots=False))
    html = (sweep / "report.html").read_text(encoding="utf-8")
    # a2sf and the full cache are right in all documents, so that theirs alone could be counted
    assert "none is counted as flipped" in html


def test_flips_are_of_the_metric_that_is_shown(tmp_path: Path) -> None:
    cells = write_sweep(tmp_path / "a", Plan(policies=("h2o", "a2sf"), budgets=(0.2,), documents={"piqa": 40}))
    for stored in cells:
        result = {k: v for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
        norm = np.arange(40) % (2 if stored.cell["policy"] == "h2o" else 5) > 0
        documents = stored.documents.assign(**{"metric/acc_norm": norm.astype(float)})
        write_cell(tmp_path / "s" / stored.path.name, result, documents, "policy: x\n")
    for metric in ("acc", "acc_norm"):
        grid = gather([tmp_path / "s"], Selection(metric=metric))
        (comparison,) = compare_pair(grid)[0]
        shown, total = flips(grid)
        assert total == len(shown) == comparison.difference.gained + comparison.difference.lost  # type: ignore[operator]
        assert sum(f.gained for f in shown) == comparison.difference.gained


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
    assert figure.axes[0].get_xlabel() == "tokens/s of the time charged to a cell"
    plt.close(figure)


def trace(more: tuple[str, ...], document: int = 0) -> Trace:
    pieces = ("The ", "question", "? ", *more)
    n = len(pieces)
    gone = np.full((2, 1, n), n)
    return Trace(document, pieces, 3, gone, np.zeros((2, 1, n)), np.zeros((2, 1, n)))


def test_a_picture_goes_on_to_what_each_policy_wrote(tmp_path: Path) -> None:
    picture({"One": trace(("yes ", "indeed")), "Two": trace(("no",))}, tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text(encoding="utf-8")
    for piece in ("indeed", "no", "yes "):
        assert f"<!-- {piece.strip()}" in drawn
    assert "underlined: generated text" in drawn
    picture({"One": trace(("yes",)), "Two": trace(("yes",))}, tmp_path / "q.svg")
    other = Trace(0, ("An", "other", "one"), 3, np.full((2, 1, 3), 3), np.zeros((2, 1, 3)), np.zeros((2, 1, 3)))
    with pytest.raises(ValueError, match="one document"):
        picture({"One": trace(()), "Two": other}, tmp_path / "r.svg")
