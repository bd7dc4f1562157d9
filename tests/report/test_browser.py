"""The page in a real browser: what hover, keyboard and clicks do, and that it fits a phone."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from made_runs import all_runs

from moesteer.report.write_report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
REQUIRED = os.environ.get("MOESTEER_REQUIRE_CHROMIUM") == "1"
MISSING = "these tests look at the page in Chromium: apt-get install chromium"

if CHROMIUM is None and not REQUIRED:
    pytest.skip(MISSING, allow_module_level=True)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    assert CHROMIUM is not None, MISSING
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    page, _ = write_report(all_runs(folder), folder / "report.html")
    return page.as_uri()


class Watched:
    """An open page, with what it complained of and asked for."""

    def __init__(self, browser: "Browser", address: str, width: int = 1280, scheme: str = "light"):
        self.page: Page = browser.new_page(
            viewport={"width": width, "height": 800},
            color_scheme="dark" if scheme == "dark" else "light",
        )
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)


@pytest.fixture
def opened(browser: "Browser", address: str) -> Iterator[Watched]:
    watched = Watched(browser, address)
    yield watched
    watched.page.close()
    assert watched.complaints == []
    assert watched.requests == [address]


CELL = 'rect[data-told^="layer 1, expert 2:"]'


def test_hover_shows_what_a_cell_says(opened: Watched):
    told = opened.page.locator("#told")
    assert not told.is_visible()
    opened.page.hover(CELL)
    assert told.is_visible()
    assert (told.text_content() or "").startswith("layer 1, expert 2: +0.800 (+0.700 … +0.900)")
    opened.page.click(CELL)  # which gives its figure the focus, but not by keyboard
    opened.page.hover("h1")
    assert not told.is_visible()


def test_the_keyboard_walks_over_the_cells(opened: Watched):
    told, page = opened.page.locator("#told"), opened.page
    plot = page.locator(".plot", has=page.locator(CELL)).first
    # by Tab, as a reader does: from what comes before it
    plot.evaluate(
        "plot => { const a = document.createElement('a'); a.href = '#x'; plot.before(a) }"
    )
    page.locator('a[href="#x"]').focus()
    page.keyboard.press("Tab")
    assert (told.text_content() or "").startswith("layer 1, expert 0:")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert (told.text_content() or "").startswith("layer 1, expert 2:")
    page.keyboard.press("ArrowDown")
    assert (told.text_content() or "").startswith("layer 3, expert 2:")
    page.keyboard.press("ArrowDown")  # the last row
    assert (told.text_content() or "").startswith("layer 3, expert 2:")
    page.keyboard.press("Escape")
    assert not told.is_visible()


def test_words_say_what_a_method_makes_of_them(opened: Watched):
    told, page = opened.page.locator("#told"), opened.page
    text = page.locator(".shaded").first
    text.locator("span[data-told]").nth(1).hover()
    assert re.match(r"man: [+−]\d", told.text_content() or "")
    text.evaluate(
        "text => { const a = document.createElement('a'); a.href = '#y'; text.before(a) }"
    )
    page.locator('a[href="#y"]').focus()
    page.keyboard.press("Tab")
    assert (told.text_content() or "").startswith("A: ")
    page.keyboard.press("ArrowRight")
    assert (told.text_content() or "").startswith("man: ")
    page.hover("h1")  # the keyboard's word stays
    assert (told.text_content() or "").startswith("man: ")


def test_a_heading_sorts_its_table(opened: Watched):
    page = opened.page
    caption = "Scores of all 8 experts"
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    table = page.locator("table", has=page.locator("caption", has_text=caption)).first
    heading = table.locator("thead th", has_text="score")
    column = [th.text_content() for th in table.locator("thead th").all()].index("score")

    def scores() -> list[float]:
        cells = [row.locator("th, td").nth(column) for row in table.locator("tbody tr").all()]
        return [float(cell.get_attribute("data-value") or "nan") for cell in cells]

    before = scores()
    assert before != sorted(before, reverse=True)
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert scores() == sorted(before, reverse=True)
    heading.locator("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert scores() == sorted(before)


def test_texts_are_sorted_from_a(opened: Watched):
    page = opened.page
    table = page.locator("table", has=page.locator("caption", has_text="Proof that")).first
    table.locator("thead button", has_text="arm").click()
    names = [row.locator("th").text_content() or "" for row in table.locator("tbody tr").all()]
    assert names == sorted(names)
    assert len(names) == 5


def wide(page: "Page") -> list["Locator"]:
    return page.locator(".plot, .scroll").all()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_without_scrolling_sideways(
    browser: "Browser", address: str, scheme: str
):
    watched = Watched(browser, address, width=380, scheme=scheme)
    page = watched.page
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    boxes = [box.evaluate("(b) => b.scrollWidth > b.clientWidth") for box in wide(page)]
    assert any(boxes), "wide figures scroll within their box"
    assert watched.complaints == []
    page.close()


COLOURS = """
() => {
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
  };
  document.getElementById("told").hidden = false;
  return [...document.querySelectorAll("body *")]
    .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .filter((e) => !e.matches("script, style, title, desc, text.on"))
    .map((e) => [getComputedStyle(e)[e.closest("svg") ? "fill" : "color"], behind(e), e.outerHTML]);
}
"""


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of "rgb(r, g, b)", or of "color(srgb r g b)", from 0 to 1."""
    full = 1 if colour.startswith("color") else 255
    parts = [float(part) / full for part in re.findall(r"\d[\d.e-]*", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: "Browser", address: str, scheme: str):
    watched = Watched(browser, address, scheme=scheme)
    colours = watched.page.evaluate(COLOURS)
    assert len(colours) > 500
    for ink, ground, where in {
        (ink, ground): (ink, ground, e) for ink, ground, e in colours
    }.values():
        lighter, darker = sorted((luminance(ink), luminance(ground)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (ink, ground, where[:80])
    watched.page.close()


def test_the_page_prints(browser: "Browser", address: str, tmp_path: Path):
    watched = Watched(browser, address)
    assert watched.page.pdf().startswith(b"%PDF")
    watched.page.emulate_media(media="print")
    assert not watched.page.locator("nav").is_visible()
    watched.page.close()
