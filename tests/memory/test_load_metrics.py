from __future__ import annotations

import dataclasses
import logging
import math
import threading
from typing import Any

import pytest
from prometheus_client import parser
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from quantload.memory.metrics import LoadMetrics
from quantload.memory.planner import ParameterSize, plan_memory
from quantload.memory.report import LayerReport, LoadReport, PhaseReport

# Section 7 of the design; the parser takes the `_total` off a counter's family but not off its samples.
NAMES = [
    "load_seconds",
    "load_bytes_read_total",
    "load_throughput_bytes_per_second",
    "model_bytes",
    "peak_memory_bytes",
    "predicted_peak_memory_bytes",
    "load_progress_ratio",
    "staging_bytes",
    "layers",
    "layer_sqnr_db",
    "layer_bytes",
    "layer_saturated_ratio",
    "loads_total",
    "source_retries_total",
    "source_bytes_total",
    "reloads_total",
    "reload_seconds_total",
    "cache_loads_total",
    "non_finite_values",
    "lowest_sqnr_db",
    "memory_limit_bytes",
    "phase_seconds",
]

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def layer(name: str, sqnr: float | None = 19.5) -> LayerReport:
    saturated = None if sqnr is None else 0.25
    return LayerReport(name, "linear", "quark_mxfp4", "numba", 2000, 531, 1000, sqnr, 0.1, 2.0, saturated, 0.1)


def report(*layers: LayerReport) -> LoadReport:
    found = list(layers) or [layer("model.layers.0.up_proj")]
    return LoadReport("demo", "quark_mxfp4", "cpu", 2.0, 4000, 4100, 1000, 1300, 64, 77, 1001, 1400, layers=found)


def samples(metrics: LoadMetrics) -> Samples:
    families = parser.text_string_to_metric_families(metrics.render().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


def value(found: Samples, name: str, **labels: str) -> float:
    return found["quantload_" + name, frozenset(labels.items())]


def full_metrics() -> LoadMetrics:
    metrics = LoadMetrics()
    metrics.on_plan(plan_memory([ParameterSize("a", "linear", "quark_mxfp4", 4100, 1001)], 0, 128))
    limited = report()
    limited.limit_bytes, limited.phases = 10_000, [PhaseReport("stream", 1.0)]
    metrics.on_report(limited)
    return metrics


def test_names_are_those_of_the_design_and_no_others() -> None:
    assert {name for name, _ in samples(full_metrics())} == {"quantload_" + name for name in NAMES}


def test_types_and_help() -> None:
    families = list(parser.text_string_to_metric_families(full_metrics().render().decode()))
    counters = {family.name for family in families if family.type == "counter"}
    assert counters == {"quantload_load_bytes_read", "quantload_loads", "quantload_reloads", "quantload_cache_loads",
        "quantload_reload_seconds",
        "quantload_source_requests", "quantload_source_retries", "quantload_source_bytes"}  # fmt: skip
    assert {family.type for family in families} == {"counter", "gauge"}
    assert all(family.documentation for family in families)


def test_values_of_a_report() -> None:
    found = samples(full_metrics())
    assert value(found, "load_seconds") == 2.0
    assert value(found, "load_bytes_read_total") == 4000
    assert value(found, "load_throughput_bytes_per_second") == 2000
    assert value(found, "load_progress_ratio") == 1.0
    assert value(found, "model_bytes", kind="final") == 1000
    assert value(found, "model_bytes", kind="checkpoint") == 4100
    assert value(found, "peak_memory_bytes", device="cpu") == 1300
    assert value(found, "predicted_peak_memory_bytes") == 1400
    assert value(found, "staging_bytes", kind="limit") == 128
    assert value(found, "staging_bytes", kind="peak") == 64
    assert value(found, "layers", scheme="quark_mxfp4") == 1
    assert value(found, "layer_sqnr_db", layer="model.layers.0.up_proj") == 19.5
    assert value(found, "layer_bytes", layer="model.layers.0.up_proj", scheme="quark_mxfp4") == 531
    assert value(found, "layer_saturated_ratio", layer="model.layers.0.up_proj") == 0.25
    assert value(found, "loads_total", result="success") == 1
    assert value(found, "loads_total", result="failure") == 0


def test_what_was_asked_of_servers_counts_over_all_loads() -> None:
    metrics = LoadMetrics()
    for requests in ({"ok": 7, "throttled": 2}, {"ok": 3}):
        one = report()
        one.note_source(requests, 2, 5000, 8)
        metrics.on_report(one)
    found = samples(metrics)
    assert value(found, "source_requests_total", result="ok") == 10
    assert value(found, "source_requests_total", result="throttled") == 2
    assert value(found, "source_retries_total") == 4
    assert value(found, "source_bytes_total") == 10_000


def test_a_plan_alone_is_shown_while_the_load_runs() -> None:
    metrics = LoadMetrics()
    plan = plan_memory([ParameterSize("a", "linear", "quark_mxfp4", 4100, 1001)], 0, 128)
    metrics.on_plan(plan)
    metrics.on_progress(1025, 4100)
    found = samples(metrics)
    assert value(found, "predicted_peak_memory_bytes") == plan.peak_bytes
    assert value(found, "model_bytes", kind="checkpoint") == 4100
    assert value(found, "load_progress_ratio") == 0.25
    assert ("quantload_peak_memory_bytes", frozenset({("device", "cpu")})) not in found


def test_each_rank_has_its_own_gauges_where_several_hold_a_model() -> None:
    metrics, of_ranks = LoadMetrics(), report()
    of_ranks.note_ranks([(10, 4, 6), (11, 5, 7)], replicated_bytes=1)
    metrics.on_report(of_ranks)
    found = samples(metrics)
    assert [value(found, "rank_bytes_read", rank=rank) for rank in "01"] == [10, 11]
    assert [value(found, "rank_model_bytes", rank=rank) for rank in "01"] == [4, 5]
    assert [value(found, "rank_peak_memory_bytes", rank=rank) for rank in "01"] == [6, 7]


def test_bytes_read_count_over_all_loads_and_never_fall() -> None:
    metrics = LoadMetrics()
    metrics.on_progress(1000, 4000)
    metrics.on_progress(3000, 4000)
    assert value(samples(metrics), "load_bytes_read_total") == 3000
    metrics.on_failure()
    assert value(samples(metrics), "load_progress_ratio") == 0.75
    metrics.on_progress(500, 4000)
    assert value(samples(metrics), "load_bytes_read_total") == 3500
    metrics.on_report(report())  # its 4000 bytes hold the 500 of its progress
    found = samples(metrics)
    assert value(found, "load_bytes_read_total") == 7000
    assert (value(found, "loads_total", result="failure"), value(found, "loads_total", result="success")) == (1, 1)
    metrics.on_progress(100, 4000)
    assert value(samples(metrics), "load_bytes_read_total") == 7100
    assert value(samples(metrics), "load_progress_ratio") == 0.025


def test_results_of_loads_and_reloads() -> None:
    metrics = LoadMetrics()
    metrics.on_failure()
    metrics.on_failure(cancelled=True)
    metrics.on_reload("success")
    metrics.on_reload("success")
    metrics.on_reload("failure")
    found = samples(metrics)
    assert value(found, "loads_total", result="failure") == 1
    assert value(found, "loads_total", result="cancelled") == 1
    assert value(found, "reloads_total", result="success") == 2
    assert value(found, "reloads_total", result="failure") == 1
    with pytest.raises(ValueError, match="reload result 'ok'"):
        metrics.on_reload("ok")  # type: ignore[arg-type]


def test_loads_with_a_cache_by_what_became_of_it() -> None:
    metrics = LoadMetrics()
    for result in ("written", "hit", "hit", None):
        loaded = report()
        loaded.cache = result
        metrics.on_report(loaded)
    found = samples(metrics)
    counts = {result: value(found, "cache_loads_total", result=result) for result in ("hit", "written", "rebuilt")}
    assert counts == {"hit": 2, "written": 1, "rebuilt": 0}


def test_layers_without_statistics_have_sizes_only() -> None:
    metrics = LoadMetrics()
    metrics.on_report(report(layer("a", None), layer("b", math.nan), layer("c", math.inf), layer('d"\\\n', 5.0)))
    found = samples(metrics)
    assert {dict(labels)["layer"] for name, labels in found if name == "quantload_layer_sqnr_db"} == {"c", 'd"\\\n'}
    assert value(found, "layer_sqnr_db", layer="c") == math.inf
    assert value(found, "layer_bytes", layer="a", scheme="quark_mxfp4") == 531
    assert value(found, "layers", scheme="quark_mxfp4") == 4


def test_too_many_layers_show_the_worst_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    metrics = LoadMetrics("on", max_layers=3)
    with caplog.at_level(logging.WARNING, logger="quantload"):
        metrics.on_report(report(*(layer(f"l{i}", 30.0 - i) for i in range(10)), layer("none", None)))
    assert "3 layers with the lowest SQNR of 11" in caplog.text
    found = samples(metrics)
    assert {dict(labels)["layer"] for name, labels in found if name == "quantload_layer_bytes"} == {"l7", "l8", "l9"}
    assert value(found, "layers", scheme="quark_mxfp4") == 11


@pytest.mark.parametrize(
    ("mode", "count", "shown"), [("auto", 512, 512), ("auto", 513, 0), ("on", 513, 513), ("off", 1, 0)]
)
def test_each_layer_has_gauges_where_there_are_few_or_they_are_asked_for(
    mode: Any, count: int, shown: int, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = LoadMetrics(mode)
    with caplog.at_level(logging.INFO, logger="quantload"):
        metrics.on_report(report(*(layer(f"l{i}", 30.0) for i in range(count))))
    found = samples(metrics)
    assert sum(name == "quantload_layer_bytes" for name, _ in found) == shown
    assert value(found, "layers", scheme="quark_mxfp4") == count
    assert ("--layer-metrics on" in caplog.text) == ((mode, shown) == ("auto", 0))


def test_openmetrics_where_it_is_asked_for() -> None:
    accept = "application/openmetrics-text; version=1.0.0,text/plain;version=0.0.4;q=0.5"
    metrics = full_metrics()
    text = metrics.render(accept).decode()
    assert text.endswith("# EOF\n")
    assert metrics.content_type(accept).startswith("application/openmetrics-text")
    assert metrics.content_type().startswith("text/plain")
    names = {sample.name for family in parse_openmetrics(text) for sample in family.samples}
    assert names == {"quantload_" + name for name in NAMES}


def test_two_servers_in_one_process_do_not_meet() -> None:
    first, second = LoadMetrics(), LoadMetrics()
    first.on_report(report())
    assert value(samples(second), "loads_total", result="success") == 0


def test_scrapes_and_updates_from_many_threads() -> None:
    metrics = LoadMetrics()
    one = dataclasses.replace(report(), bytes_read=100)
    errors: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(30):
                metrics.on_report(one)
                samples(metrics)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert value(samples(metrics), "loads_total", result="success") == 120
    assert value(samples(metrics), "load_bytes_read_total") == 12_000
