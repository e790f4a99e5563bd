"""The report in headless Chromium: it loads without network and errors, sorts, and fits a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from a2sf.analysis.results.selection import Selection
from a2sf.report.output import Options, show
from tests.sweep_fixture import Plan, write_sweep

pytestmark = pytest.mark.full
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("runs") / "demo"
    write_sweep(directory, Plan(factors=(0.1, 0.9)))
    show([directory], Selection(), Options())
    return (directory / "report.html").as_uri()


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


@pytest.mark.parametrize("width", [390, 1280])
def test_loads_and_fits(browser: Any, page: str, width: int) -> None:
    resize(browser, width)
    browser.get(page)
    assert browser.find_element("tag name", "h1").text == "demo"
    loaded = "return [...document.images].every(i => i.complete && i.naturalWidth > 100) && document.images.length"
    assert browser.execute_script(loaded) == 5
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []
    fetched = "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
    assert browser.execute_script(fetched) == 0


def column(table: Any, index: int) -> list[str]:
    return [row.find_elements("tag name", "td")[index].text for row in table.find_elements("css selector", "tbody tr")]


def test_sorts_by_number_and_by_word(browser: Any, page: str) -> None:
    resize(browser, 1280)
    browser.get(page)
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
