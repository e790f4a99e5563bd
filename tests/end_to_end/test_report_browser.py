"""The report in headless Chromium: loads without network and errors, fits a phone, filters, shows numbers and documents."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from a2sf.analysis.results.selection import Selection
from a2sf.engine.trace import Trace, save
from a2sf.report.output import TableOptions, show
from a2sf.store.runs import TRACES, write_cell
from tests.sweep_fixture import Plan, write_sweep

pytestmark = pytest.mark.full
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
wait = pytest.importorskip("selenium.webdriver.support.wait", reason="selenium is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("runs") / "demo"
    cells = write_sweep(directory, Plan(factors=(0.1, 0.9)))
    for c in cells:
        if c.cell["task"] == "piqa" and c.cell["policy"] in ("h2o", "a2sf"):
            save(c.path / TRACES, [traced(d, c.cell["policy"]) for d in range(150)])
    show([directory], Selection(), TableOptions(plots=False))
    return (directory / "report.html").as_uri()


def traced(document: int, policy: str) -> Trace:
    """Eight tokens of a prompt and two after it; H2O retains the first four, A2SF the last four."""
    evicted = [10] * 4 + [6] * 6 if policy == "h2o" else [6] * 6 + [10] * 4
    steps = np.array([[evicted]] * 2, np.int32)
    mass = np.full(steps.shape, 0.5, np.float32)
    return Trace(document, tuple(f" t{i}" for i in range(10)), 8, steps, mass, mass)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sweep of a task that generates text."""
    runs = tmp_path_factory.mktemp("runs")
    for stored in write_sweep(runs / "choices", Plan(documents={"story": 8}, budgets=(0.2,))):
        n, policy = len(stored.documents), stored.cell["policy"]
        documents = stored.documents.assign(
            choices=[[]] * n,
            gold=-1,
            prediction=-1,
            loglikelihoods=[[]] * n,
            target=[f"<gold> {i}" for i in range(n)],
            generated=[f"the same, then {policy} <b>{i}</b>" for i in range(n)],
            thinking=[f"we think {'the same' if i else policy}" for i in range(n)],
            thinking_tokens=3,
            tokens=[[5, 6, 7, len(policy), i] for i in range(n)],
            continuation_tokens=[[2]] * n,
            finish="stop" if policy == "h2o" else "length",
            ended=policy == "h2o",
            **{"extracted,strict": [f"{policy} <i>" for _ in range(n)], "metric/exact_match,strict": 0.5},
        )
        result = {k: v for k, v in stored.result.items() if k not in ("checksums", "schema_version")}
        result["notes"] = [{"text": "a_note_without_a_space_" * 8}]
        score = {"value": 0.5, "stderr": 0.1, "n": n, "higher_is_better": True}
        result["metrics"] = {"exact_match,strict": score}
        cell = write_cell(runs / "s" / stored.path.name, result, documents, "policy: x\n")
        if policy in ("h2o", "a2sf"):
            save(cell.path / TRACES, [traced(d, policy) for d in range(2)])
    show([runs / "s"], Selection(), TableOptions(plots=False))
    return (runs / "s" / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["http://*", "https://*"]})
    yield driver
    driver.quit()


def resize(browser: Any, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def opened(browser: Any, address: str, width: int = 1280) -> None:
    """Load a page and wait for its script."""
    resize(browser, width)
    browser.get(address)
    wait.WebDriverWait(browser, 60).until(lambda b: b.execute_script("return document.body.dataset.ready") == "yes")


@pytest.mark.parametrize("width", [390, 1280])
def test_loads_and_fits(browser: Any, page: str, width: int) -> None:
    opened(browser, page, width)
    assert browser.find_element("tag name", "h1").text == "demo"
    assert titles(browser) == [
        "average of 2 tasks (n = 270, chance 50.0)",
        "arc_easy (n = 120, chance 50.0)",
        "piqa (n = 150, chance 50.0)",
    ]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []
    fetched = "return performance.getEntriesByType('resource').filter(e => !/^(data|blob):/.test(e.name)).length"
    assert browser.execute_script(fetched) == 0


def titles(browser: Any) -> list[str]:
    """The titles of the charts."""
    return [t.text for t in browser.find_elements("css selector", "#panels .gtitle")]


def choose(browser: Any, select: str, text: str) -> None:
    """Choose an option by the beginning of its text."""
    code = """const select = document.getElementById(arguments[0]);
    select.value = [...select.options].find(o => o.text.startsWith(arguments[1])).value;
    select.dispatchEvent(new Event("change"));"""
    browser.execute_script(code, select, text)


def tick(browser: Any, kind: str, value: str) -> None:
    """Click one checkbox of a filter."""
    box = browser.find_element("css selector", f"#filters details[data-kind={kind}]")
    if not box.get_property("open"):
        box.find_element("tag name", "summary").click()
    box.find_element("css selector", f"input[value='{value}']").click()


def drawn(browser: Any) -> list[list[Any]]:
    """Name, numbers and texts of every line of the first chart."""
    code = "return [...document.querySelector('.panel').data].map(t => [t.name, t.y, t.text])"
    return browser.execute_script(code)


def test_charts_show_numbers_and_every_choice_draws(browser: Any, page: str) -> None:
    opened(browser, page)
    lines = drawn(browser)
    (a2sf,) = [text for name, _, text in lines if name == "A2SF|0.1"]
    assert not any(name == "A2SF|0.9" for name, *_ in lines)  # the worse factor is chosen with a click
    for part in ("budget 0.2", "n = 270", "tokens retained", "factor 0.1", "% ["):
        assert part in a2sf[0]
    assert any(text[0] == "chance level 50.0" for _, _, text in lines)
    for y in browser.execute_script("return [...document.getElementById('chart-y').options].map(o => o.text)"):
        choose(browser, "chart-y", y)
        assert titles(browser), y
    choose(browser, "chart-y", "acc")
    for x in ("tokens retained", "tokens/s", "forgetting factor", "budget"):
        choose(browser, "chart-x", x)
        assert len(titles(browser)) == 3, x
        if x == "forgetting factor":
            names = {name for name, *_ in drawn(browser) if name}
            assert names == {f"{p}, budget {b}" for p in ("A2SF", "H2O") for b in ("0.2", "0.5")}
    assert browser.get_log("browser") == []


def test_filters_reach_charts_tables_and_documents(browser: Any, page: str) -> None:
    opened(browser, page)
    rows = """return [...document.querySelectorAll('#tables tbody tr:not(.reference)')].filter(r => !r.hidden)
    .map(r => r.cells[0].textContent + r.cells[1].textContent)"""
    before = browser.execute_script(rows)
    tick(browser, "policy", "Window")
    tick(browser, "budget", "0.5")
    assert browser.execute_script(rows) == [r for r in before if "Window" not in r and "0.5" not in r]
    assert not any((name or "").startswith("Window") for name, *_ in drawn(browser))
    tick(browser, "task", "arc_easy")
    assert titles(browser) == ["average of 2 tasks (n = 270, chance 50.0)", "piqa (n = 150, chance 50.0)"]
    heads = "return [...document.querySelectorAll('#tables th')].filter(h => !h.hidden).map(h => h.textContent)"
    assert "arc_easy" not in browser.execute_script(heads)
    systems = browser.execute_script("return [...document.getElementById('doc-a').options].map(o => o.text)")
    assert systems == ["Full cache", "H2O, budget 0.2", "A2SF, factor 0.1, budget 0.2", "A2SF, factor 0.9, budget 0.2"]
    tick(browser, "shots", "0")
    assert titles(browser) == []
    assert browser.get_log("browser") == []


def unfolded(browser: Any) -> Any:
    """The first document of the list, after a click on it."""
    first = browser.find_elements("css selector", "#doc-list details")[0]
    first.find_element("tag name", "summary").click()
    wait.WebDriverWait(browser, 60).until(lambda b: len(first.find_elements("xpath", "./*")) > 1)
    return first


def test_a_document_under_two_systems(browser: Any, page: str) -> None:
    opened(browser, page)
    choose(browser, "doc-task", "piqa")
    choose(browser, "doc-a", "A2SF, factor 0.1, budget 0.2")
    choose(browser, "doc-b", "H2O, budget 0.2")
    choose(browser, "doc-show", "A scores higher")
    first = unfolded(browser)
    assert "acc A 1, B 0" in first.find_element("tag name", "summary").text
    body = first.text
    assert "which <one> & why?" in body
    assert body.count("chosen") == 2
    assert "gold" in body
    for name, retained in (("A", [" t6", " t7"]), ("B", [" t0", " t1", " t2", " t3"])):
        index = "AB".index(name)
        strips = first.find_elements("css selector", ".pair > div")[index].find_elements("css selector", ".tokens")
        assert len(strips) == 2  # the prompt, and what came after it
        spans = strips[0].find_elements("tag name", "span")
        dark = [
            s.get_property("textContent") for s in spans if s.value_of_css_property("text-decoration-line") == "none"
        ]
        assert dark == retained
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [390, 1280])
def test_generated_texts_side_by_side(browser: Any, generated: str, width: int) -> None:
    opened(browser, generated, width)
    choose(browser, "doc-show", "all documents")
    choose(browser, "doc-a", "A2SF")
    choose(browser, "doc-b", "H2O")
    first = unfolded(browser)
    assert "<gold> 0" in first.text
    for summary in first.find_elements("css selector", ".pair summary"):
        assert summary.text == "Thinking (3 tokens)"
        summary.click()
    marked = [m.text for m in first.find_elements("css selector", ".generated mark")]
    # the thinking differs already, so that all of the answer comes after the first difference
    assert marked == ["a2sf", "the same, then a2sf <b>0</b>", "h2o", "the same, then h2o <b>0</b>"]
    assert "The first 3 tokens are the same." in first.text
    assert "Extracted answer: a2sf <i>" in first.text
    assert "5 tokens, cut off at the limit of tokens." in first.text
    assert "5 tokens, ended by a stop sequence." in first.text
    assert [d.text for d in first.find_elements("css selector", ".divider")] == [
        "generated after 8 tokens of the prompt"
    ] * 2
    assert first.find_element("css selector", ".scale").text.endswith("0 %20 %40 %60 %80 %100 %")
    wait.WebDriverWait(browser, 60).until(
        lambda b: len(first.find_elements("css selector", ".panel .heatmaplayer")) == 2
    )
    assert len(first.find_elements("css selector", ".panel .cbtitle")) == 2  # a scale each
    assert len(first.find_elements("css selector", ".panel .shapelayer path")) == 4  # where the prompt ends
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    second = browser.find_elements("css selector", "#doc-list details:not(.pair details)")[1]
    second.find_element("tag name", "summary").click()
    wait.WebDriverWait(browser, 60).until(lambda b: len(second.find_elements("xpath", "./*")) > 1)
    answers = second.find_elements("css selector", ".pair > div > .generated")
    assert [a.text.startswith("the same, then ") for a in answers] == [True, True]
    assert [m.text for m in second.find_elements("css selector", ".pair > div > .generated mark")] == [
        "a2sf <b>1</b>",
        "h2o <b>1</b>",
    ]
    assert browser.get_log("browser") == []


def test_how_long_the_texts_are(browser: Any, generated: str) -> None:
    opened(browser, generated)
    choose(browser, "chart-y", "tokens generated")
    (panel,) = browser.find_elements("css selector", "#panels .panel")
    code = "return arguments[0].data.map(t => [t.name, t.x[0], t.x.length, t.text[50]])"
    lines = {name: (first, n, text) for name, first, n, text in browser.execute_script(code, panel)}
    assert {"Full cache", "H2O", "A2SF"} <= set(lines)
    assert lines["H2O"][:2] == (5, 101)
    assert "50 % of the texts have at most 5 tokens" in lines["H2O"][2]
    assert "cut off 0.0 %" in lines["H2O"][2]
    assert "cut off 100.0 %" in lines["A2SF"][2]
    assert browser.get_log("browser") == []


def column(table: Any, index: int) -> list[str]:
    rows = table.find_elements("css selector", "tbody tr:not(.reference)")
    return [row.find_elements("tag name", "td")[index].text for row in rows]


def test_sorts_by_number_and_by_word(browser: Any, page: str) -> None:
    opened(browser, page)
    table = browser.find_element("css selector", "table.sortable")
    heads = table.find_elements("css selector", "th button")
    names = [h.text for h in heads]
    differences = names.index("Δ full")
    heads[differences].click()
    shown = column(table, differences)
    values = [float(t.replace("\N{MINUS SIGN}", "-")) for t in shown[:-1]]
    assert values == sorted(values, reverse=True)
    assert shown[-1] == "\N{EN DASH}"  # a missing number stays last
    heads[differences].click()
    values = [float(t.replace("\N{MINUS SIGN}", "-")) for t in column(table, differences)[:-1]]
    assert values == sorted(values)
    heads[0].click()
    assert column(table, 0) == sorted(column(table, 0))
    assert table.find_elements("css selector", "th")[0].get_attribute("aria-sort") == "ascending"
    assert browser.get_log("browser") == []
