"""The report in a real browser: `make test-browser` sets CHROMIUM to the one that it found."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_adapt.report import write_report
from tests.helpers.finished_runs import save_extras, save_run

CHROMIUM = os.environ.get("CHROMIUM")
EVIL = "<script>document.title = 'owned'; console.log('owned')</script>"
PHONE, DESK = {"width": 375, "height": 740}, {"width": 1280, "height": 900}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="needs a browser: make test-browser"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything there is on it, and scripts in its texts."""
    root = tmp_path_factory.mktemp("runs")
    classes = (f"neg{EVIL}", "pos", "an unusually long name of a class")
    for pair in (("films", "phones"), ("films", "books")):
        for method in ("source only", "DANN", f"long name of a method {EVIL}", "bound"):
            folder = save_run(
                root, method, pair=pair, classes=classes, folders=("-".join(pair), method[:9])
            )
            save_extras(folder, EVIL)
    save_run(root, "MCC", collapsed=True, warnings=1, first_warning=f"of one word {'x' * 90}{EVIL}")
    save_run(root, "MMD", error=f"ValueError: {EVIL}")
    return write_report([root], root / "page")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, report: Path) -> Iterator[Any]:
    """The page, of which every plot and table is unfolded; what it says and asks for, beside it."""
    page = chromium.new_page(viewport=DESK)
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("dialog", lambda dialog: page.said.append(dialog.message))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(report.as_uri(), wait_until="load")
    yield page
    page.close()


def unfold(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")


def test_is_quiet_and_asks_for_nothing(page: Any, report: Path) -> None:
    unfold(page)
    page.wait_for_timeout(200)
    assert page.said == []
    assert page.asked == [report.as_uri()]


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_every_plot_has_drawn(page: Any, size: dict[str, int]) -> None:
    page.set_viewport_size(size)
    unfold(page)
    drawn = page.evaluate(
        """[...document.querySelectorAll('svg')].map(svg => {
            const box = svg.getBoundingClientRect();
            const size = mark => mark.getBBox().width + mark.getBBox().height;
            const marks = [...svg.querySelectorAll('use, path')].filter(e => !e.closest('defs'));
            const empty = marks.filter(mark => mark.tagName == 'use' && size(mark) == 0);
            const title = svg.querySelector('title').textContent;
            return [title, box.width, box.height, marks.filter(size).length, empty.length];
        })"""
    )
    assert len(drawn) > 40
    assert [each for each in drawn if each[1] < 100 or each[2] < 70 or each[3] < 5 or each[4]] == []


def test_a_script_in_the_data_stays_a_text(page: Any) -> None:
    unfold(page)
    assert page.evaluate("document.scripts.length") == 0
    assert page.title().startswith("Adaptation report: films → books")
    text = page.inner_text("body")
    for place in ("ValueError: ", "neg", "long name of a method ", "layer 0", "mean rank."):
        assert place + EVIL in text, place


@pytest.mark.parametrize("unfolded", [False, True])
def test_a_phone_scrolls_tables_not_the_page(page: Any, unfolded: bool) -> None:
    page.set_viewport_size(PHONE)
    if unfolded:
        unfold(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
    assert page.evaluate(f"{wide}.length") > 0


def test_the_keyboard_reaches_the_links_and_unfolds(page: Any) -> None:
    focused = "document.activeElement"
    page.keyboard.press("Tab")
    assert page.evaluate(f"{focused}.textContent") == "Skip to the results"
    assert page.evaluate(f"{focused}.getBoundingClientRect().left") >= 0
    links = page.evaluate("[...document.querySelectorAll('nav a')].map(a => a.hash)")
    reached = []
    for _ in links:
        page.keyboard.press("Tab")
        reached.append(page.evaluate(f"{focused}.hash"))
        assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") != "none"
    assert reached == links and len(links) > 3
    assert all(page.locator(link).count() == 1 for link in links)
    summary = page.locator("details.method:not([open]) > summary").first
    name = summary.inner_text()
    summary.focus()
    page.keyboard.press("Enter")
    assert name in page.locator("details.method[open] > summary").all_inner_texts()


def test_the_skip_link_leads_to_the_results(page: Any) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_paper_shows_what_is_folded(page: Any) -> None:
    folded = page.locator("details.method:not([open]) svg").first
    assert not folded.is_visible()
    page.emulate_media(media="print")
    assert folded.is_visible() and folded.bounding_box()["height"] > 100
    assert not page.locator("nav").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_plots_have_the_colour_of_the_text(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    colours = page.evaluate(
        """[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.querySelector('svg text')).fill]"""
    )
    assert colours[0] == colours[2] != colours[1]
