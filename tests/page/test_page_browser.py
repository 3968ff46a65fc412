"""Pages in a real browser: they are drawn soon, fetch nothing, are used with keys alone, and axe finds nothing serious.

A group of its own (`-m browser`): it needs Chromium, playwright's client and axe, and says so where one is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from quantload import errors
from quantload.memory.attempt import Attempt, describe_failure
from quantload.memory.report import LoadReport, PhaseReport, TimelinePoint
from quantload.page.document import report_page
from quantload.page.failure import failure_page
from quantload.progress import Moment
from reports import layer, layers_with_single_experts, report

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FIRST_PAINT_MS = 3000
FIRST_PAINT = """() => new Promise((painted) => new PerformanceObserver((seen) => {
    for (const each of seen.getEntriesByName('first-contentful-paint')) painted(each.startTime)
}).observe({type: 'paint', buffered: true}))"""
SERIOUS = {"serious", "critical"}
SIZES = {"wide": (1280, 800), "phone": (390, 844)}

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here; Debian has it as the package chromium")
    with playwright.sync_playwright() as started:
        # A container has no user namespaces and little shared memory.
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the text of a page; what it fetches, and whatever it complains of, fails the test."""
    contexts, complaints = [], []

    def open_page(text: str, size: str = "wide", scheme: str = "light") -> Any:
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        width, height = SIZES[size]
        # axe is put into the page from outside, which its policy would refuse.
        contexts.append(
            browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height}, bypass_csp=True)
        )
        page = contexts[-1].new_page()
        page.on("console", lambda said: complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith("file:") else complaints.append(asked.url))
        page.goto((tmp_path / "page.html").as_uri())
        return page

    yield open_page
    for each in contexts:
        each.close()
    assert complaints == []


def failed() -> str:
    error = errors.MemoryBudgetError("the load needs 3 GiB, the limit is 2 GiB")
    where = Moment("stream", 2.0, 1 << 30, 4 << 30, 1 << 30, 3 << 30, 2 << 30)
    points = [TimelinePoint(i / 5, i << 24, i << 24) for i in range(10)]
    error.attempt = Attempt(where, 1 << 30, points, [PhaseReport("plan", 0.5), PhaseReport("stream", 1.5)])
    said = describe_failure(error, model="org/model", quantization="auto", device="cpu", command="quantload load m")
    return failure_page(said)


ATTENTION = [layer("m.1.up", 3.0, divergence=0.02), layer("m.2.up", None, divergence=2e-6)]
PAGES: dict[str, Callable[[], str]] = {
    "good": lambda: report_page(report(command="quantload load org/model -q quark_mxfp4")),
    "attention": lambda: report_page(report(ATTENTION, limit_bytes=1 << 20)),
    "failed": failed,
    "30000": lambda: report_page(report(layers_with_single_experts(30_000))),
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_the_screen(
    show: Open, name: str, size: str, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = show(PAGES[name](), size, scheme)
    found = axe.Axe().run(page).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in SERIOUS] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_thirty_thousand_layers_are_painted_soon(show: Open) -> None:
    page = show(PAGES["30000"]())
    # What is loaded need not be painted yet: the observer is told of a paint that was and of one that comes.
    assert page.evaluate(FIRST_PAINT) < FIRST_PAINT_MS


def test_every_chart_is_drawn_in_the_colours_of_the_scheme(show: Open) -> None:
    page = show(PAGES["good"]())
    assert page.locator("[data-chart] svg").count() == page.locator("[data-chart]").count() == 3
    lines = "[...document.querySelectorAll('#chart-memory path')].map((each) => each.getAttribute('stroke')).join()"
    light = page.evaluate(lines)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"(light) => {lines} !== light", arg=light)
    drawn = show(report_page(report(limit_bytes=2 << 30)))
    assert "limit 2 GiB" in drawn.locator("#chart-memory").text_content()
    far_above = show(report_page(report(limit_bytes=90 << 30)))
    assert "limit" not in far_above.locator("#chart-memory").text_content()
    assert "Too high to be drawn: limit 90 GiB." in far_above.locator(".above").inner_text()


def test_the_heatmap_is_read_with_the_arrow_keys(show: Open) -> None:
    page = show(PAGES["good"]())
    cell = page.locator(".heatmap td[tabindex='0']")
    cell.focus()
    assert "model.layers.0.self_attn.q_proj: 19.0 dB" in page.locator("#cell-said").inner_text()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    said = page.locator("#cell-said").inner_text()
    assert "model.layers.1.self_attn.k_proj" in said
    assert "at the largest code" in said
    assert page.locator(".heatmap td[tabindex='0']").count() == 1
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")  # there is nothing above
    assert "layers.0" in page.locator("#cell-said").inner_text()


def test_the_tab_key_reaches_everything_there_is_to_use(show: Open) -> None:
    page = show(PAGES["good"]())
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.className || document.activeElement.tagName"))
    assert {"copy", "SUMMARY", "scroll", "scroll heatmap"} <= {each.split(" q")[0] for each in reached}


def test_the_command_is_copied_or_selected(show: Open) -> None:
    page = show(PAGES["good"]())
    again = page.locator("#again")
    again.get_by_role("button", name="Copy").click()
    again.get_by_role("button", name="Copied").or_(again.get_by_role("button", name="Selected")).wait_for()
    selected = page.evaluate("getSelection().toString()")
    assert selected in ("", "quantload load org/model -q quark_mxfp4")


def test_a_notebook_shows_the_page_in_a_frame_that_draws_its_charts(show: Open) -> None:
    made = LoadReport.from_dict(report())
    page = show(f"<!doctype html><html lang=en><title>t</title><main>{made._repr_html_()}</main></html>")
    page.get_by_text("Charts and details").click()
    frame = page.frame_locator("iframe")
    frame.locator("#chart-memory svg").wait_for()
    assert frame.locator(".headline").inner_text().startswith(f"{made.checkpoint_bytes / (1 << 30):.2f} GiB became")
