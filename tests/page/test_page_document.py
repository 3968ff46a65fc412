"""A page is one file that fetches nothing, in which what a checkpoint says is text and never markup."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantload import errors
from quantload.kernels.formats import WeightFormat
from quantload.memory.attempt import Attempt, describe_failure
from quantload.memory.report import FitReport, FitRow, KeptReport, PhaseReport, TimelinePoint
from quantload.page.advice import ADVICE, UNEXPECTED, advice_for
from quantload.page.costs import BITS, costs
from quantload.page.document import as_data, report_body, report_page
from quantload.page.elements import VOID, element, prose
from quantload.page.failure import failure_page
from quantload.page.heatmap import divergence_colour
from quantload.page.notices import notices
from quantload.page.sections import headline
from quantload.progress import Moment
from quantload.schemes.registry import get_entry
from reports import GIB, layer, layers_with_single_experts, plain_layers, report

MOST_BYTES = 1_500_000
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(1)> \"' & \udc80"


class Page(HTMLParser):
    """The elements of a page: each is closed where it was opened, and nothing is fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""
        self.texts: list[str] = []
        self.data = ""
        self._kind: str | None = None
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert not {"src", "href", "action", "onclick", "onerror", "background", "poster"} & set(given), given
        self.tags.append(tag)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(given["content"])
        if tag == "script":
            self._kind = given.get("type")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["script"]:
            self.texts.append(data)
        elif self._kind is None:
            self.scripts.append(data)
        else:
            self.data += data


def failed(error: BaseException, **more: Any) -> dict[str, Any]:
    return describe_failure(error, **{"model": "m", "quantization": "auto", "device": "cpu", **more})


@pytest.mark.parametrize(
    "page",
    [
        report_page(report()),
        report_page(report([])),
        report_page(report(layers_with_single_experts(2000))),
        report_page(report(layers_with_single_experts(30_000))),
        failure_page(failed(errors.MissingShardError("gone"))),
    ],
    ids=["good", "nothing quantized", "2000 layers", "30000 layers", "failed"],
)
def test_a_page_is_one_file_of_bounded_size_with_its_scripts_known_by_their_hashes(page: str) -> None:
    found = Page(page)
    assert len(page.encode()) <= MOST_BYTES
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in found.scripts}
    assert hashes == set(re.findall(r"'sha256-[^']+'", found.policy))
    assert "default-src 'none'" in found.policy
    assert "connect-src" not in found.policy
    assert "Licensed to the Apache Software Foundation" in found.scripts[0]
    json.loads(found.data)


def test_what_a_checkpoint_says_is_text() -> None:
    hostile = report(
        [layer(f"{ATTACK}.{i}.{ATTACK}", scheme=ATTACK, kernel=ATTACK) for i in range(3)],
        model=ATTACK, unexpected=[ATTACK], command=ATTACK, versions={ATTACK: ATTACK}, digest=ATTACK,
        kept=[vars(KeptReport(ATTACK, ATTACK, 5))], phases=[vars(PhaseReport(ATTACK, 1.0))],
    )  # fmt: skip
    harmless = report([layer(f"a.{i}.a") for i in range(3)], unexpected=["a"], digest="a", command="a")
    said = failed(errors.CheckpointError(ATTACK), model=ATTACK, command=ATTACK)
    assert Page(report_page(hostile)).tags.count("script") == Page(report_page(harmless)).tags.count("script") == 3
    assert "img" not in {*Page(report_page(hostile)).tags, *Page(failure_page(said)).tags}
    assert report_page(hostile).encode()  # no lone surrogate is left


@settings(max_examples=30)
@given(st.text(max_size=40), st.text(max_size=40))
def test_text_and_attributes_come_back_as_they_were(text: str, value: str) -> None:
    shown = Page(element("p", text, title=value))
    assert "".join(shown.texts) == text.replace("\r\n", "\n").replace("\r", "\n") or "\r" in text
    assert json.loads(Page(as_data({"a": text})).data) == {"a": text}


def test_a_person_can_repeat_the_first_line() -> None:
    gib = report(checkpoint_bytes=57 * GIB, final_bytes=16 * GIB, peak_bytes=round(16.03 * GIB), seconds=35.0)
    assert headline({**gib, "limit_bytes": round(16.1 * GIB)}) == (
        "57.0 GiB became 16.0 GiB in 35.0 s; peak 16.03 GiB of 16.10 GiB allowed."
    )
    assert "predicted" in headline(gib)


def test_a_good_load_has_nothing_to_look_at_and_a_bad_one_says_what_to_do() -> None:
    assert notices(report()) == []
    bad = report(
        [layer("a.1.low", 3.0), layer("a.1.clamped", saturated_fraction=0.3)], limit_bytes=1 << 20, state="incomplete",
        fallback_conversions=1, unexpected=["t"], initialized=["p"], untied=["q"],
        non_finite=[{"name": "w", "nan": 1, "infinite": 0, "overflowed": 0, "first": [0]}],
    )  # fmt: skip
    found = notices(bad)
    assert len(found) == 9
    assert all(each.do for each in found)
    low = next(each for each in found if "below" in each.what)
    assert "--override 'a.1.low=fp8_per_channel'" in low.do


@pytest.mark.parametrize("scheme", BITS)
def test_bits_of_a_weight_are_those_of_its_format(scheme: str) -> None:
    def nbytes(form: WeightFormat | None, rows: int, columns: int) -> int:
        if form is None:
            return 2 * rows * columns
        shapes = zip(form.tensors, form.shapes(rows, columns), strict=True)
        return sum(tensor.dtype.itemsize * shape[0] * shape[1] for tensor, shape in shapes)

    entry = get_entry(scheme)
    for form, (bits, row) in zip((entry.linear, entry.experts), BITS[scheme], strict=True):
        for rows, columns in ((512, 4096), (4096, 512)):
            scale_of_all = 4
            assert 0 <= nbytes(form, rows, columns) - (rows * columns * bits / 8 + rows * row) <= scale_of_all


def test_other_schemes_are_counted_from_what_is_not_quantized() -> None:
    made = report([layer("a.0.up", bytes_out=17 << 15)])
    found = {cost.scheme: cost for cost in costs(made)}
    assert found["quark_mxfp4"].is_this
    assert found["none"].final_bytes == made["final_bytes"] - (17 << 15) + (2 << 20)
    assert found["none"].peak_bytes - found["none"].final_bytes == 96 << 20
    mixed = report([layer("a.0.up"), layer("a.0.down", scheme="nl4")])
    assert {"quark_mxfp4", "nl4"} <= {cost.scheme for cost in costs(mixed) if not cost.is_this}
    assert "this load, 2 schemes" in report_body(mixed)
    assert costs(report([])) == []
    assert "quantload compare MODEL" in report_body(report([]))


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        (
            {"command": "quantload load m -q nl4 --html a.html --json --report=r --fit 1GiB"},
            "quantload serve m -q nl4 --fit 1GiB",
        ),
        ({"command": "quantload load 'a b' -q nl4"}, "quantload generate &#x27;a b&#x27; -q nl4 --prompt"),
        ({}, None),
        ({"output": "out dir"}, "quantload load &#x27;out dir&#x27;"),
        ({"command": "torchrun x"}, None),
    ],
)
def test_the_page_says_what_to_do_with_what_was_loaded(more: dict[str, Any], shown: str | None) -> None:
    page = report_body(report(plain_layers(1), **more))
    assert shown in page if shown is not None else "What to do with it" not in page


def test_the_page_says_what_was_chosen_to_fit() -> None:
    rows = [FitRow("v_proj", "first", "mxfp8", 16, 3 << 20, 0.25), FitRow("head", "", "nl4", 1, 5 << 20, 0.75)]
    chosen = FitReport(16 * GIB, "the load", 15 * GIB, round(15.9 * GIB), 0.0125, rows=rows)
    page = report_body(report(plain_layers(1), fit=dataclasses.asdict(chosen)))
    for said in (
        "below 16.00 GiB",
        "take 15.90 GiB",
        "12.5 thousandths",
        "v_proj, first third",
        "mxfp8",
        ">head<",
        "75%",
    ):
        assert said in page
    assert "What was chosen to fit" not in report_body(report(plain_layers(1)))


def test_every_error_has_its_advice() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BaseException)]
    for kind in kinds:  # its own, or that of the error it is a kind of
        names = [each.__name__ for each in kind.__mro__]
        assert kind is errors.QuantloadError or advice_for(names) not in (ADVICE["QuantloadError"], UNEXPECTED), kind
    assert advice_for(["TruncatedShardError", "CheckpointError"]) is ADVICE["TruncatedShardError"]
    assert advice_for(["FileNotFoundError", "OSError"]) is ADVICE["OSError"]
    assert advice_for(["KeyError", "Exception"]) is UNEXPECTED


def test_the_page_of_a_failed_load_says_what_happened_how_far_it_came_and_what_to_do() -> None:
    error = errors.MemoryBudgetError("needs 3 GiB")
    where = Moment("stream", 2.0, GIB, 4 * GIB, GIB, 3 * GIB, 2 * GIB, None)
    error.attempt = Attempt(where, GIB, [TimelinePoint(0.0, 0, 0)], [PhaseReport("stream", 2.0)])
    try:
        raise errors.QuantloadError("around it") from error
    except errors.QuantloadError as outer:
        said = " ".join(Page(failure_page(failed(outer, command="quantload load m"))).texts)
    assert "in the phase 'stream'" in said
    assert "1.00 GiB of 4.00 GiB read" in said
    assert "QuantloadError: around it" in said
    assert "quantload load m" in " ".join(said.split())
    before = " ".join(Page(failure_page(failed(error.__class__("x")))).texts)
    assert "before the load began" in before
    assert "End what else holds memory" in before


def test_a_table_of_very_many_layers_is_put_together() -> None:
    assert "put together by name" in report_body(report(layers_with_single_experts(2001)))
    assert "Every quantized module" in report_body(report(plain_layers(400)))


def test_backticks_are_code() -> None:
    assert prose("say `a <b>` to it") == "say <code>a &lt;b&gt;</code> to it"


def test_a_measured_divergence_has_a_heatmap_of_its_own_and_names_the_worst() -> None:
    layers = plain_layers(4)
    assert "Divergence" not in report_page(report(layers))
    layers[7] = dataclasses.replace(layers[7], divergence=0.0125)
    layers[8] = dataclasses.replace(layers[8], divergence=2e-6)
    text = report_page(report(layers))
    Page(text)
    assert text.count('class="scroll heatmap"') == 2
    assert f"{layers[7].name}: 12.5 thousandths of a nat a token, quark_mxfp4" in text
    assert '<td class="q0" title="' in text
    assert "The 2 modules that move the predictions most" in text
    unknown = [dataclasses.replace(each, sqnr_db=None) for each in layers]
    assert report_page(report(unknown)).count('class="scroll heatmap"') == 1


def test_the_colour_of_a_divergence_is_that_of_its_size() -> None:
    assert [divergence_colour(each) for each in (0.0, 1e-5, 9e-4, 1e-3, 0.01, 3.0)] == [6, 5, 3, 2, 0, 0]
