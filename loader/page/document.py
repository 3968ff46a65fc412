"""The page itself: one HTML file with its styles, scripts and data in it, which fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from .charts import chart_data
from .costs import other_schemes
from .elements import Markup, element, joined
from .fitted import fitted
from .heatmap import quality_map
from .sections import (
    SQNR,
    again,
    all_modules,
    headline,
    kept,
    memory,
    next_steps,
    section,
    throughput,
    tiles,
    where_bytes_went,
    worst_layers,
)
from .uses import uses

CHARTS = "echarts.common.min.js"
DATA_ID = "chart-data"


def report_page(report: Mapping[str, Any]) -> str:
    """The page of a load that came to its end, from `LoadReport.to_dict()`."""
    return document(f"{report['model']} as {report['quantization']}", report_body(report), chart_data(report))


def report_body(report: Mapping[str, Any]) -> Markup:
    """What stands in `main` of that page."""
    quality = element("div", element("div", quality_map(report)), worst_layers(report), class_="beside")
    quality = joined([element("p", SQNR), quality]) if report["layers"] else element("p", "Nothing was quantized.")
    return joined(
        [
            element("h1", f"{report['model']} as {report['quantization']} on {report['device']}"),
            element("p", headline(report), class_="headline"),
            tiles(report),
            next_steps(report),
            uses(report),
            memory(report),
            fitted(report),
            where_bytes_went(report),
            section("What the weights lost", quality, name="quality"),
            kept(report),
            throughput(report),
            other_schemes(report),
            again(report),
            all_modules(report),
        ]
    )


def document(title: str, body: Markup, data: Mapping[str, Any], scripts: Sequence[str] = ("page.js",)) -> str:
    """A whole HTML file; `data` is for the charts, `scripts` are those of `assets/` beside the library's."""
    code = [_script(name) for name in (CHARTS, *scripts)]
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {' '.join(map(_hash, code))}"
    if len(scripts) > 1:
        policy += "; connect-src 'self'"  # the page of a server asks that server
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title} \N{MIDDLE DOT} quantload"),
        element("style", Markup(asset("page.css"))),
    )
    page = element(
        "html",
        head,
        element(
            "body",
            element("main", body),
            element("footer", "Made by quantload. Charts: Apache ECharts, under the Apache License 2.0."),
            as_data(data),
            *(element("script", Markup(each)) for each in code),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def in_notebook(page: str) -> Markup:
    """A page to be opened below a cell of a notebook, in a frame from which its script reaches nothing else."""
    frame = element("iframe", srcdoc=page, sandbox="allow-scripts", title="Load page", width="100%", height="800")
    return element("details", element("summary", "Charts and details"), frame)


def as_data(data: Mapping[str, Any]) -> Markup:
    """Numbers and names for a script; nothing in them ends the element."""
    plain = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return element("script", Markup(plain.replace("<", "\\u003c")), type="application/json", id=DATA_ID)


@cache
def asset(name: str) -> str:
    """A file of the folder `assets`."""
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def _script(name: str) -> str:
    return asset(name).strip() + "\n"


def _hash(code: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
