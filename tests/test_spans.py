"""Spans of OpenTelemetry: one for a load and one for each phase in it, where a program traces, and else nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from quantload import convert_checkpoint, load_quantized
from quantload.cli import DEMO_MODEL
from quantload.errors import MemoryBudgetError
from quantload.options import LoadOptions
from quantload.spans import TRACING, LoadSpans

pytest.importorskip("opentelemetry.sdk.trace")
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

PHASES = ["resolve", "plan", "compile", "check", "stream", "finish"]
Spans = Callable[[], list[ReadableSpan]]


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> TracerProvider:
    """The one that is set in this process, which can be set once only."""
    provider = TracerProvider()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return provider


@pytest.fixture
def ended(provider: TracerProvider) -> Spans:
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return lambda: list(exporter.get_finished_spans())


def test_a_load_has_a_span_and_in_it_one_for_each_phase(provider: TracerProvider, ended: Spans) -> None:
    with provider.get_tracer("of the caller").start_as_current_span("caller") as caller:
        report = load_quantized(DEMO_MODEL, "quark_mxfp4").load_report
        assert trace.get_current_span() is caller
    *phases, whole, _ = ended()
    assert [span.name for span in phases] == [f"quantload.{name}" for name in PHASES]
    assert whole.name == "quantload.load"
    assert {span.parent.span_id for span in phases if span.parent} == {whole.context.span_id}
    assert whole.parent is not None
    assert whole.parent.span_id == caller.get_span_context().span_id
    assert whole.attributes == {
        "quantload.model": str(DEMO_MODEL),
        "quantload.quantization": "quark_mxfp4",
        "quantload.device": "cpu",
        "quantload.bytes_read": report.bytes_read,
        "quantload.peak_bytes": report.peak_bytes,
        "quantload.predicted_peak_bytes": report.predicted_peak_bytes,
    }


def test_an_error_is_recorded_where_it_happened_and_in_the_whole(ended: Spans) -> None:
    with pytest.raises(MemoryBudgetError):
        load_quantized(DEMO_MODEL, "quark_mxfp4", options=LoadOptions(max_memory="1MiB"))
    *before, check, whole = ended()
    assert (check.name, whole.name) == ("quantload.check", "quantload.load")
    for span in (check, whole):
        assert span.status.status_code is trace.StatusCode.ERROR
        assert [event.name for event in span.events] == ["exception"]
    assert all(span.status.status_code is trace.StatusCode.UNSET for span in before)


def test_a_conversion_is_called_so(ended: Spans, tmp_path: Path) -> None:
    convert_checkpoint(DEMO_MODEL, tmp_path / "out", "fp8_per_channel")
    assert ended()[-1].name == "quantload.convert"


def test_nothing_is_imported_and_nothing_done_where_nobody_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, TRACING)
    spans = LoadSpans("load")
    spans.begin("plan")
    spans.say(model="m")
    spans.end(ValueError("nothing"))
    assert TRACING not in sys.modules
