"""What a notebook or a log shows of the objects that users hold: a line or a small table, never pages."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from quantload import LoadOptions, LoadReport, QuantizationPolicy, cli, load_quantized, plan_quantized
from quantload.checkpoint.resolve import resolve


@pytest.fixture(scope="module")
def model() -> Any:
    return load_quantized(cli.DEMO_MODEL, progress=False)


class Cells(HTMLParser):
    """The text of cells and titles, and the tags there are."""

    def __init__(self, html: str, attributes: bool = False) -> None:
        super().__init__()
        self.attributes = attributes
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert self.attributes or not attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_objects_are_shown_in_one_line(model: Any) -> None:
    draft, checkpoint = plan_quantized(cli.DEMO_MODEL), resolve(cli.DEMO_MODEL)
    for each in (model.load_report, model.load_plan, draft, checkpoint, LoadOptions(), QuantizationPolicy()):
        shown = repr(each)
        assert type(each).__name__ in shown
        assert "\n" not in shown
        assert len(shown) < 320
    assert "35 modules quantized, 1 kept" in repr(model.load_report)
    assert f"peak {model.load_plan.peak_bytes / 2**20:.3f} MiB" in repr(model.load_plan)
    assert "scheme=quark_mxfp4" in repr(model.model.layers[0].self_attn.q_proj)


def test_options_show_what_is_not_the_default_as_a_call_that_makes_them() -> None:
    names = {"LoadOptions": LoadOptions, "QuantizationPolicy": QuantizationPolicy}
    options = LoadOptions(max_memory="16GiB", workers=3, kernels={"linear": "torch"}, stats=False)
    policy = QuantizationPolicy("int8", ignore=("a*",), overrides=(("b", "none"),), scale_mode="mse")
    for each in (options, policy, LoadOptions(), QuantizationPolicy()):
        assert eval(repr(each), names) == each
    assert repr(LoadOptions(workers=3)) == "LoadOptions(workers=3)"


def test_reports_and_plans_are_small_tables_in_a_notebook(model: Any) -> None:
    report: LoadReport = replace(model.load_report, model="<script>alert(1)</script> & 'more'")
    table, framed = report._repr_html_().split("<details>")
    for shown in (table, model.load_plan._repr_html_()):
        cells = Cells(shown)
        assert cells.tags == {"table", "caption", "tr", "td"}
        assert len(shown) < 2000
    below = Cells(f"<details>{framed}", attributes=True)
    assert below.tags == {"details", "summary", "iframe"}, "the page is in a frame, markup of its own"
    assert len(framed) < 1_500_000
    texts = Cells(table).texts
    assert texts[0] == "<script>alert(1)</script> & 'more' as quark_mxfp4 on cpu"
    assert "35 modules (quark_mxfp4)" in texts
    assert dict(zip(*[iter(Cells(model.load_plan._repr_html_()).texts[1:])] * 2, strict=True)).keys() == {
        *("checkpoint", "model", "staging arena", "overhead allowance", "peak")
    }
