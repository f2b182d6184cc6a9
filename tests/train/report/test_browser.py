"""The page in a real browser: nothing is loaded, nothing is wider than a phone, and the table of classes works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from train.report.html import read_records, write_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request

LARGE = 30_000
MILLISECONDS = 600_000  # of an action, at most


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, timeout=MILLISECONDS)
        yield browser
        browser.close()


def open_page(browser: Browser, file: Path, **options: Any) -> tuple[Page, list[str]]:
    """Open a file; return the page and a list of its errors, messages and requests, which grows."""
    events: list[str] = []

    def requested(request: Request) -> None:
        if request.url != file.as_uri() and not request.url.startswith("data:"):
            events.append(request.url)

    page = browser.new_page(reduced_motion="reduce", **options)
    page.set_default_timeout(MILLISECONDS)
    page.on("console", lambda message: events.append(message.text))
    page.on("pageerror", lambda error: events.append(str(error)))
    page.on("request", requested)
    page.goto(file.as_uri())
    return page, events


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_the_page_fits_the_screen_and_loads_nothing(
    width: int, scheme: str, browser: Browser, trained_run: Path
) -> None:
    size = {"width": width, "height": 800}
    page, events = open_page(browser, trained_run / "report.html", viewport=size, color_scheme=scheme)
    assert events == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    columns = {round(box["x"]) for f in page.locator("#method-1 figure").all() if (box := f.bounding_box())}
    assert len(columns) == (1 if width == 390 else 2)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    page.locator("nav a").last.click()
    assert page.evaluate("location.hash") == "#method-2"
    assert page.evaluate("scrollY") > 500
    nav = page.locator("nav").bounding_box()
    assert nav is not None
    assert nav["y"] == 0  # it stays in view


def test_classes_are_sorted_and_found(browser: Browser, trained_run: Path, tmp_path: Path) -> None:
    records = read_records(trained_run)
    for record in records:
        if record["event"] == "data":
            record["class_names"] = ["owl", "Jay", "kite 10", "kite 9", "<b>"]
        elif record["event"] == "result":
            record["accuracy_per_class"] = [0.5, 0.25, 0.0, 1.0, None]
            record["test_counts"] = [20, 20, 20, 20, 0]
    write_page(tmp_path / "page.html", {"run": records}, "birds", "")
    page, events = open_page(browser, tmp_path / "page.html")
    table = page.locator(".classes table")

    def column(number: int) -> list[str]:
        return table.locator(f"tbody tr > :nth-child({number})").all_inner_texts()

    def sort(number: int) -> str | None:
        table.locator(f"thead th:nth-child({number}) button").click()
        return table.locator(f"thead th:nth-child({number})").get_attribute("aria-sort")

    assert column(3) == ["120", "60", "30", "15", "7"]
    assert sort(3) == "ascending"
    assert column(3) == ["7", "15", "30", "60", "120"]
    assert sort(1) == "ascending"
    assert column(1) == ["<b>", "Jay", "kite 9", "kite 10", "owl"]
    assert sort(5) == "descending"
    assert column(5) == ["100.0", "50.0", "25.0", "0.0", "–"]
    table.locator("thead th:nth-child(5) button").press("Enter")  # by the keyboard
    assert column(5) == ["0.0", "25.0", "50.0", "100.0", "–"]
    assert table.locator("[aria-sort]").count() == 1
    page.locator(".classes input").fill("KITE")
    assert column(1) == ["kite 10", "kite 9"]
    page.locator(".classes select").select_option("2")
    assert column(1) == ["kite 9"]
    assert page.locator(".count").inner_text() == "1 of 1 classes shown"
    page.locator(".classes input").fill("heron")
    assert column(1) == []
    assert events == []


def test_the_page_of_many_classes_is_small_and_shows_them_on_demand(
    browser: Browser, trained_run: Path, tmp_path: Path
) -> None:
    records = read_records(trained_run)
    for record in records:
        if record["event"] == "data":
            record["class_names"] = [f"class {k}" for k in range(LARGE)]
        elif record["event"] == "result":
            record["train_counts"] = [LARGE - k for k in range(LARGE)]
            record["test_counts"] = [2] * LARGE
            record["accuracy_per_class"] = [k % 3 / 2 for k in range(LARGE)]
            del record["analysis"]["correct"]  # of other samples
    write_page(tmp_path / "page.html", {"run": records}, "many", "")
    assert (tmp_path / "page.html").stat().st_size < 3e6
    page, events = open_page(browser, tmp_path / "page.html")
    rows = page.locator(".classes tbody tr")
    assert rows.count() == 25
    page.get_by_role("button", name="Show more").click()
    assert rows.count() == 525
    assert "The table has the 20,000 classes with the fewest training samples" in page.inner_text("body")
    page.locator(".classes input").fill("class 29999")
    assert rows.all_inner_texts() == ["class 29999\tfew\t1\t2\t100.0\t100.0"]
    assert events == []


def test_without_scripts_the_page_has_the_overall_table(browser: Browser, trained_run: Path) -> None:
    page, _ = open_page(browser, trained_run / "report.html", java_script_enabled=False)
    records = (json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines())
    accuracies = [100 * record["accuracy"]["overall"] for record in records if record["event"] == "result"]
    words = page.inner_text("#accuracy")
    assert all(f"{accuracy:.1f}" in words for accuracy in accuracies)
    assert "needs JavaScript" in page.inner_text(".classes")
    assert not page.locator(".classes table").is_visible()
