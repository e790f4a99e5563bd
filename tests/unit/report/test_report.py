"""report.html: one file, no network, and everything a sweep has to say."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from a2sf.analysis.collect import Selection, gather
from a2sf.analysis.flips import flipped, flips
from a2sf.experiments.runs import is_cell, load_sweep
from a2sf.report.html import FLIPS_SHOWN
from a2sf.report.output import Options, show
from tests.sweep_fixture import Plan, write_sweep


class Outline(HTMLParser):
    """Tables as lists of rows of texts, and every address the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.addresses: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "demo"
    write_sweep(directory, Plan())
    (directory / "failures").mkdir()
    failure = {
        "cell": {"name": "tiny-x", "task": "piqa"},
        "error": "RuntimeError: <out> of memory",
        "traceback": "Traceback …",
        "time": "noon",
    }
    (directory / "failures" / "a.json").write_text(json.dumps(failure))
    (directory / "failures" / "b.json").write_text("{")
    finished = next(f for f in directory.iterdir() if is_cell(f)).name
    (directory / "failures" / f"{finished}.json").write_text("{}")  # failed once, then finished
    show([directory], Selection(), Options())
    return directory


@pytest.fixture(scope="module")
def page(sweep: Path) -> Outline:
    outline = Outline()
    outline.feed((sweep / "report.html").read_text())
    return outline


def test_loads_nothing_from_elsewhere(page: Outline, sweep: Path) -> None:
    assert all(a.startswith(("data:", "#")) for a in page.addresses)
    assert sum(a.startswith("data:image/svg+xml") for a in page.addresses) == 3  # one factor only: no factor plots
    assert not re.search(r"@import|url\(", (sweep / "report.html").read_text())


def test_numbers_are_the_results(page: Outline, sweep: Path) -> None:
    head, *rows = page.tables[0]
    assert head[:5] == ["Policy", "Budget", "Factor", "arc_easy", "piqa"]
    for stored in load_sweep(sweep):
        c = stored.cell
        budget = f"{c['budget']['ratio']:g}" if c["budget"] else "–"  # noqa: RUF001
        (row,) = [r for r in rows if r[:2] == [c["policy_label"], budget]]
        assert row[head.index(c["task"])].rstrip("†") == f"{100 * stored.metrics['acc']['value']:.1f}"


def test_tells_what_was_run_and_what_failed(sweep: Path) -> None:
    text = (sweep / "report.html").read_text()
    for told in (
        "arc_easy (120), piqa (150)",
        "git.commit",
        "evaluate.py -m +sweep=test",
        "2 cells did not finish",
        "<strong>tiny-x</strong>",
    ):
        assert told in text
    assert "RuntimeError: &lt;out&gt; of memory" in text
    assert "cannot be read" in text


def test_flipped_documents_are_told_with_choices(sweep: Path) -> None:
    shown, total = flips(gather([sweep]), limit=8)
    assert 0 < len(shown) <= 8 < total
    documents = {(c.cell["policy"], c.cell["task"], c.path.name): c.documents for c in load_sweep(sweep)}
    for flip in shown:
        own = [
            d for (p, t, name), d in documents.items() if (p, t) == ("a2sf", flip.task) and f"-{flip.budget}-" in name
        ]
        row = own[0].iloc[flip.doc_id]
        assert (row["prediction"] == flip.gold) == flip.gained
        assert list(row["loglikelihoods"]) == flip.first_logs
        assert flip.first_prediction != flip.second_prediction
    text = (sweep / "report.html").read_text()
    assert text.count("lead moved by") == FLIPS_SHOWN
    assert f"{total - FLIPS_SHOWN} more are left out" in text
    assert "which &lt;one&gt; &amp; why?" in text


def test_flips_are_counted_as_the_test_counts_them(sweep: Path) -> None:
    cells = {c.path.name: c for c in load_sweep(sweep)}
    a, b = cells["tiny-a2sf-0.2-0.1-piqa-0"], cells["tiny-h2o-0.2-piqa-0"]
    frame = flipped(a, b)
    right = [c.documents["metric/acc"].to_numpy() for c in (a, b)]
    assert frame["gained"].sum() == ((right[0] == 1) & (right[1] == 0)).sum()
    assert (~frame["gained"]).sum() == ((right[0] == 0) & (right[1] == 1)).sum()
    assert frame["size"].is_monotonic_decreasing
