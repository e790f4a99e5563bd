"""Traces of a sweep: means per layer, overlap of the two policies, pictures; policies may have said different things."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.selection import Selection
from a2sf.engine.trace import Trace, overlap, save
from a2sf.report.output import TableOptions, show
from a2sf.report.traced import PICTURES, comparable, read_traces, trace_frame, trace_pictures
from a2sf.store.runs import TRACES
from tests.page import embedded
from tests.sweep_fixture import Plan, write_sweep

pytestmark = pytest.mark.usefixtures("few_flips")

TOKENS, BUDGET = 12, 4


def trace(document: int, newest: bool, end: str = " end") -> Trace:
    """Two layers, one KV head; evicts the oldest token, or always the newest but one."""
    late = [TOKENS if p < BUDGET - 1 else p + 1 for p in range(TOKENS)]
    steps = late if newest else [min(p + BUDGET, TOKENS) for p in range(TOKENS)]
    evicted_at = np.array([[steps]] * 2, np.int32)
    received = np.full(evicted_at.shape, 0.5, np.float32)
    return Trace(document, (*(f" t{i}" for i in range(TOKENS - 1)), end), 10, evicted_at, received, received / 5)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    cells = write_sweep(tmp_path / "s", Plan(policies=("full", "h2o", "a2sf"), documents={"piqa": 20, "copa": 20}))
    for c in cells:
        if c.cell["task"] == "piqa" and c.cell["policy"] != "full":
            save(c.path / TRACES, [trace(d, c.cell["policy"] == "a2sf") for d in range(4)])
    return tmp_path / "s"


def test_means_per_layer(sweep: Path) -> None:
    frame = trace_frame(read_traces(gather([sweep], Selection())))
    assert len(frame) == 2 * 2 * 2  # policies, budgets, layers
    row = frame[(frame["policy"] == "A2SF") & (frame["budget"] == "0.2") & (frame["layer"] == 1)].iloc[0]
    assert (row["documents"], row["evicted"], row["age"]) == (4, TOKENS - BUDGET, 1.0)
    assert row["mass"] == pytest.approx(0.5)
    assert row["lost"] == pytest.approx(0.1)
    assert row["overlap"] == pytest.approx(overlap(trace(0, True), trace(0, False))[0])
    assert (frame[frame["policy"] == "H2O"]["overlap"] == 1).all()
    assert row["mass_half"] == pytest.approx(0)  # the documents are equal


def test_half_the_interval_of_a_layer(sweep: Path) -> None:
    """By hand, of documents that differ; a single document has none."""
    groups = read_traces(gather([sweep], Selection()))
    ((place, by_policy), *_) = groups.items()
    of_a2sf = next(key for key in by_policy if key[0] == "a2sf")
    lost = [0.1, 0.2, 0.4]
    traces = {d: replace(trace(d, True), lost=np.full_like(trace(d, True).lost, x)) for d, x in enumerate(lost)}
    frame = trace_frame({place: {of_a2sf: traces}})
    low, high = stats.t.interval(0.95, 2, np.mean(lost), stats.sem(lost))
    assert frame["lost_half"].tolist() == pytest.approx([(high - low) / 2] * len(frame))
    assert frame["overlap_half"].isna().all()
    assert trace_frame({place: {of_a2sf: {0: traces[0]}}})["lost_half"].isna().all()


def test_files_and_pictures(sweep: Path) -> None:
    shown = show([sweep], Selection(), TableOptions())
    assert len(pd.read_csv(sweep / "tables" / "traces.csv")) == 8
    pictures = [f for f in shown.files if f.name.startswith("kept-tiny-piqa-0shot-0.2-doc") and f.suffix == ".svg"]
    assert len(pictures) == 3
    assert "A2SF" in pictures[0].read_text()
    assert len(trace_pictures(read_traces(gather([sweep], Selection())), sweep / "more")) <= 2 * PICTURES
    entry = next(e for e in embedded(sweep / "report.html", "documents") if e["traces"])
    shown = entry["traces"][0]
    assert len(shown["pieces"]) == len(shown["share"]) == TOKENS
    assert {0.0, 1.0} == set(shown["share"])  # both layers retain the same


def test_a_sweep_without_traces_shows_none(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", Plan(documents={"piqa": 10}))
    traces = read_traces(gather([tmp_path / "s"], Selection()))
    assert trace_frame(traces).empty
    assert trace_pictures(traces, tmp_path) == []


def test_policies_that_generated_different_text_are_compared_on_the_prompt() -> None:
    a, b = comparable(trace(0, True, " yes"), trace(0, False, " no"))
    assert len(a.pieces) == a.context == 10
    assert a.evicted_at.shape == (2, 1, 10)
    assert np.isfinite(overlap(a, b)).all()
    same = trace(0, True)
    assert comparable(same, same) == [same, same]
