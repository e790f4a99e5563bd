"""report.html: one file, no network, and everything a sweep has to say."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from statsmodels.stats.proportion import proportion_confint

from a2sf.analysis.comparisons.pairs import compare_pair
from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.selection import Selection
from a2sf.commands import tables
from a2sf.report.output import TableOptions, show
from a2sf.report.page import documents as page_documents
from a2sf.store.runs import is_cell, load_sweep
from tests.page import embedded
from tests.sweep_fixture import Plan, write_sweep

pytestmark = pytest.mark.usefixtures("few_flips")


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
    show([directory], Selection(), TableOptions())
    return directory


@pytest.fixture(scope="module")
def page(sweep: Path) -> Outline:
    outline = Outline()
    outline.feed((sweep / "report.html").read_text())
    return outline


def test_loads_nothing_from_elsewhere(page: Outline, sweep: Path) -> None:
    assert all(a.startswith(("data:", "#")) for a in page.addresses)
    html = (sweep / "report.html").read_text()
    assert not re.search(r"@import|url\(", html)
    assert len(html) < 2_500_000  # most of it is the charting library, packed


def test_numbers_are_the_results(page: Outline, sweep: Path) -> None:
    head, *rows = page.tables[0]
    assert head[:5] == ["Policy", "Budget", "Factor", "arc_easy", "piqa"]
    for stored in load_sweep(sweep):
        c = stored.cell
        budget = f"{c['budget']['ratio']:g}" if c["budget"] else "–"  # noqa: RUF001
        (row,) = [r for r in rows if r[:2] == [c["policy_label"], budget]]
        assert row[head.index(c["task"])].rstrip("↓") == f"{100 * stored.metrics['acc']['value']:.1f}"


def test_tells_what_was_run_and_what_failed(sweep: Path) -> None:
    text = (sweep / "report.html").read_text()
    for part in (
        "arc_easy (120), piqa (150)",
        "git.commit",
        "evaluate.py -m +sweep=test",
        "2 cells did not finish",
        "<strong>tiny-x</strong>",
    ):
        assert part in text
    assert "RuntimeError: &lt;out&gt; of memory" in text
    assert "cannot be read" in text


def test_charts_have_the_results_with_intervals_n_and_chance(sweep: Path) -> None:
    data = embedded(sweep / "report.html", "charts")
    (part,) = data["parts"]
    assert part["columns"] == ["arc_easy", "piqa", "average"]
    assert part["chance"] == {"arc_easy": 0.5, "piqa": 0.5, "average": 0.5}  # two choices each
    systems = {(s["policy"], s["budget"]): s for s in data["systems"]}
    for stored in load_sweep(sweep):
        c, metric = stored.cell, stored.metrics["acc"]
        budget = f"{c['budget']['ratio']:g}" if c["budget"] else "\N{EN DASH}"
        value, low, high, n = systems[c["policy_label"], budget]["scores"][c["task"]]
        assert value == pytest.approx(metric["value"], abs=1e-5)
        wilson = proportion_confint(round(value * n), n, method="wilson")
        assert (low, high) == pytest.approx(wilson, abs=1e-4)
        assert n == metric["n"]
    (comparison,) = [c for c in compare_pair(gather([sweep]))[0] if (c.task, c.budget) == ("average", "0.2")]
    difference = systems["A2SF", "0.2"]["difference"]["average"]
    assert difference[:3] == pytest.approx(
        [getattr(comparison.difference, k) for k in ("value", "low", "high")], abs=1e-5
    )
    assert systems["A2SF", "0.2"]["close"]["average"]["agreement"][0] < 1
    assert systems["Full cache", "\N{EN DASH}"]["close"] == {}


def test_documents_have_every_systems_answers(sweep: Path) -> None:
    data, browse = (embedded(sweep / "report.html", name) for name in ("charts", "documents"))
    assert [(e["task"], e["total"], len(e["documents"])) for e in browse] == [
        ("arc_easy", 120, 120),
        ("piqa", 150, 150),
    ]
    cells = {
        (c.cell["policy_label"], str((c.cell["budget"] or {}).get("ratio")), c.cell["task"]): c
        for c in load_sweep(sweep)
    }
    for entry in browse:
        assert len(entry["answers"]) == 7
        for number, answers in entry["answers"].items():
            system = data["systems"][int(number)]
            budget = "None" if system["full"] else system["budget"]
            documents = cells[system["policy"], budget, entry["task"]].documents
            assert [d["context"] for d in entry["documents"]] == documents["context"].tolist()
            assert [a["prediction"] for a in answers] == documents["prediction"].tolist()
            assert [a["value"] for a in answers] == documents["metric/acc"].tolist()
            assert answers[3]["logs"] == pytest.approx(list(documents["loglikelihoods"][3]), abs=0.01)


def test_documents_that_one_system_gained_are_those_of_the_paired_test(sweep: Path) -> None:
    data, browse = (embedded(sweep / "report.html", name) for name in ("charts", "documents"))
    number = {(s["policy"], s["budget"]): str(i) for i, s in enumerate(data["systems"])}
    (comparison,) = [c for c in compare_pair(gather([sweep]))[0] if (c.task, c.budget) == ("piqa", "0.2")]
    (entry,) = [e for e in browse if e["task"] == "piqa"]
    pairs = [*zip(*(entry["answers"][number[p, "0.2"]] for p in ("A2SF", "H2O")), strict=True)]
    assert sum(a["value"] > b["value"] for a, b in pairs) == comparison.difference.gained
    assert sum(a["value"] < b["value"] for a, b in pairs) == comparison.difference.lost


def test_a_page_without_room_has_the_documents_on_which_systems_differ(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_documents, "ANSWERS", 14 * 30)
    monkeypatch.setattr(page_documents, "BEGINNING", 5)
    monkeypatch.setattr(page_documents, "END", 10)
    show([sweep], Selection(), TableOptions(out=tmp_path, plots=False))
    (entry, _) = embedded(tmp_path / "report.html", "documents")
    assert (entry["total"], len(entry["documents"])) == (120, 30)
    assert all(len({a[i]["prediction"] for a in entry["answers"].values()}) == 2 for i in range(30))
    context = entry["documents"][0]["context"]
    assert (context[:7], context[-9:]) == ("Quest\n[", "?\nAnswer:")
    assert "characters left out" in context


def test_the_report_opens_in_the_browser(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    tables.main([str(sweep), "--no-plots", "--open", "--out", str(tmp_path)])
    assert opened == [(tmp_path / "report.html").as_uri()]
    with pytest.raises(SystemExit):
        tables.main([str(sweep), "--open", "--no-report"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_note_tells_of_rounding_in_bfloat16(tmp_path: Path, dtype: str, few_flips: None) -> None:
    plan = Plan(policies=("full", "h2o"), budgets=(0.2,), documents={"piqa": 20}, extra={"dtype": dtype})
    write_sweep(tmp_path / "s", plan)
    shown = show([tmp_path / "s"], Selection(), TableOptions(plots=False))
    found = [note for note in shown.notes if note.startswith("In bfloat16, a difference of about a point")]
    assert len(found) == (dtype == "bfloat16")
    assert (tmp_path / "s" / "report.html").read_text().count("a difference of about a point") == len(found)
