"""The page of a server: it asks for the key where there is one, shows the load while it runs, then its page."""

from __future__ import annotations

from functools import cache

from .document import document
from .elements import Markup, element, joined


@cache
def shell_page() -> str:
    """The page before anything is known; nothing in it says what the server serves."""
    return document("Load page", _body(), {}, ("page.js", "live.js"))


def _body() -> Markup:
    sign_in = element(
        "form",
        element("h1", "This server wants its API key"),
        element("p", "The key stays in the memory of this page: a reload of the page asks for it again."),
        element("label", "API key ", element("input", type="password", id="key", autocomplete="off", required=True)),
        " ",
        element("button", "Show the load"),
        element("p", "", id="refused", role="alert"),
        id="sign-in",
        hidden=True,
    )
    live = element(
        "section",
        element("h1", "Loading", id="live-title"),
        element("p", "", id="live-line", class_="headline"),
        element("progress", id="live-bar", max="1", value="0", aria_label="Part of the checkpoint that is read"),
        element("dl", class_="tiles", id="live-tiles"),
        element("div", class_="chart", id="live-chart", role="img", aria_label="Memory over the seconds of the load"),
        element("p", "", id="live-phase", role="status"),
        id="live",
        hidden=True,
        aria_labelledby="live-title",
    )
    script = element("noscript", element("p", "This page needs its script. /health and /load_report say the same."))
    return joined([script, sign_in, live, element("div", id="report"), element("p", "", id="trouble", role="alert")])
