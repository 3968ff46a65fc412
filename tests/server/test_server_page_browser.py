"""The page of a server in a real browser: it asks for the key, follows the load, shows what became of it.

Of the group `browser`, as `tests/page/test_page_browser.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from quantload.errors import CheckpointError
from quantload.memory.report import LoadReport
from quantload.progress import Moment
from quantload.server import ServerState
from quantload.server.load_progress import WEIGHTS
from server_harness import running

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY = "sésame"


@pytest.fixture
def page() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here; Debian has it as the package chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser.new_context().new_page()
        browser.close()


def loading(fraction: float) -> Moment:
    read = round(fraction * (8 << 30))
    return Moment("stream", 10 * fraction, read, 8 << 30, read // 4, 2 << 30, 3 << 30, None)


def test_a_load_is_followed_to_its_page(page: Any, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"bytes_read": 8 << 30, "checkpoint_bytes": 8 << 30, "final_bytes": 2 << 30, "peak_bytes": 2 << 30}
    more = {
        "staging_peak_bytes": 1,
        "baseline_bytes": 1,
        "predicted_final_bytes": 2 << 30,
        "predicted_peak_bytes": 2 << 30,
    }
    monkeypatch.setattr(model, "load_report", LoadReport("tiny", "none", "cpu", 9.0, **sizes, **more), raising=False)  # type: ignore[arg-type]
    state = ServerState("tiny")
    state.progress.begin(WEIGHTS)
    state.progress.watch(loading(0.25))
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text))
    with running(state) as client:
        page.goto(client.url)
        page.get_by_text("25 % read").wait_for()
        assert "2 GiB of 8 GiB" in page.locator("#live-tiles").inner_text()
        assert "Limit\n3 GiB" in page.locator("#live-tiles").inner_text()
        assert page.locator("#live-phase").inner_text() == f"Phase: {WEIGHTS}: stream"
        state.progress.watch(loading(0.75))
        page.get_by_text("75 % read").wait_for()
        page.locator("#live-chart svg").wait_for()
        state.finish(model, tokenizer)
        page.get_by_text("8.00 GiB became 2.00 GiB in 9 s").wait_for()
        assert page.locator("#live").is_hidden()
        assert page.locator("[data-chart] svg").count() == 3
        assert page.title() == "tiny as none - quantload"
    assert complaints == []


def test_the_key_is_asked_for_and_kept_nowhere(page: Any) -> None:
    state = ServerState("tiny")
    state.fail(CheckpointError("shard 2 is gone"))
    with running(state, KEY) as client:
        page.goto(client.url)
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button").click()
        page.get_by_text("does not take this key").wait_for()
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        page.get_by_text("CheckpointError: shard 2 is gone").wait_for()
        assert page.get_by_text("Fetch the checkpoint again").count() == 1
        held = page.evaluate("[document.cookie, JSON.stringify({...localStorage, ...sessionStorage}), location.href]")
        assert held == ["", "{}", f"{client.url}/"]
        assert KEY not in page.content()
        page.reload()
        page.get_by_label("API key").wait_for()
