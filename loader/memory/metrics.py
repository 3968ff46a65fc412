"""Prometheus metrics of loads: live progress, then the numbers of the last report."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .planner import MemoryPlan
from .report import CacheResult, LayerReport, LoadReport

logger = logging.getLogger("quantload")

Result = Literal["success", "failure", "cancelled"]
RESULTS: tuple[Result, ...] = get_args(Result)
LayerMetrics = Literal["auto", "on", "off"]
AUTO_LAYERS = 512
MAX_LAYERS = 4096


class LoadMetrics:
    """Counts loads and reloads, and shows the last load, on a registry of its own. Thread-safe.

    The labels of a layer are its name and scheme. `layers` says whether each has its own gauges: `auto` for models of
    up to 512 quantized layers; `on` for all, but no more than `max_layers`, those with the lowest SQNR, so that a
    scrape stays bounded. The log says what is left out. Names have the prefix `quantload_`.
    """

    def __init__(self, layers: LayerMetrics = "auto", max_layers: int = MAX_LAYERS) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._lock = threading.Lock()
        self._layer_gauges: LayerMetrics = layers
        self._max_layers = max_layers
        self._started: float | None = None
        self._bytes_read = 0
        self._all_bytes_read = 0
        self._progress = 0.0
        self._live_seconds = 0.0
        self._plan: MemoryPlan | None = None
        self._report: LoadReport | None = None
        self._layers: list[LayerReport] = []
        self._loads: Counter[str] = Counter(dict.fromkeys(RESULTS, 0))
        self._reloads: Counter[str] = Counter(dict.fromkeys(RESULTS, 0))
        self._reload_seconds = 0.0
        self._cached: Counter[str] = Counter(dict.fromkeys(get_args(CacheResult), 0))
        self._requests: Counter[str] = Counter()
        self._source_retries = self._source_bytes = 0
        self.registry.register(_LoadCollector(self))

    def on_plan(self, plan: MemoryPlan) -> None:
        """Show a prediction: checkpoint size, predicted peak and the limit of the staging arena."""
        with self._lock:
            self._plan = plan

    def on_progress(self, bytes_read: int, total: int) -> None:
        """Show that `bytes_read` of `total` bytes of the load under way are read; fewer than before is a new load."""
        with self._lock:
            now = time.perf_counter()
            if self._started is None or bytes_read < self._bytes_read:
                self._started, self._bytes_read = now, 0
            self._count(bytes_read)
            self._progress = min(1.0, bytes_read / total) if total > 0 else 0.0
            self._live_seconds = now - self._started

    def on_report(self, report: LoadReport) -> None:
        """Count a load that succeeded and show its report."""
        layers = self._shown(report)
        with self._lock:
            self._report, self._layers = report, layers
            self._count(report.bytes_read)
            self._loads["success"] += 1
            for each in report.source_requests:
                self._requests[each.result] += each.count
            self._source_retries += report.source_retries or 0
            self._source_bytes += report.source_bytes or 0
            if report.cache is not None:
                self._cached[report.cache] += 1
            self._end(progress=1.0)

    def on_failure(self, *, cancelled: bool = False) -> None:
        """Count a load that failed or was cancelled; the progress stays where it stopped."""
        with self._lock:
            self._loads["cancelled" if cancelled else "failure"] += 1
            self._end(progress=self._progress)

    def on_reload(self, result: Result, seconds: float = 0.0) -> None:
        """Count a reload, and the seconds it took.

        Raises `ValueError` for a result that is not `success`, `failure` or `cancelled`.
        """
        if result not in RESULTS:
            raise ValueError(f"reload result {result!r}; give one of {', '.join(RESULTS)}")
        with self._lock:
            self._reloads[result] += 1
            self._reload_seconds += seconds

    def render(self, accept: str = "") -> bytes:
        """The metrics as text, in the Prometheus format or in OpenMetrics where the Accept header asks for it."""
        text: bytes = choose_encoder(accept)[0](self.registry)
        return text

    def content_type(self, accept: str = "") -> str:
        """The Content-Type of what `render` gives for the same Accept header."""
        return str(choose_encoder(accept)[1])

    def collect(self) -> list[Metric]:
        """Every metric family with its samples now."""
        with self._lock:
            return [*self._speed(), *self._memory(), *self._layer_metrics(), *self._counters()]

    def _count(self, bytes_read: int) -> None:
        self._all_bytes_read += max(0, bytes_read - self._bytes_read)
        self._bytes_read = bytes_read

    def _end(self, progress: float) -> None:
        self._started, self._bytes_read, self._progress = None, 0, progress

    def _shown(self, report: LoadReport) -> list[LayerReport]:
        if self._layer_gauges == "off":
            return []
        if self._layer_gauges == "auto" and len(report.layers) > AUTO_LAYERS:
            logger.info(
                "Metrics show no gauges for each of the %d layers; the load report has them (--layer-metrics on)",
                len(report.layers),
            )
            return []
        if len(report.layers) <= self._max_layers:
            return list(report.layers)
        logger.warning(
            "Metrics show the %d layers with the lowest SQNR of %d; the load report has them all",
            self._max_layers,
            len(report.layers),
        )
        return sorted(report.layers, key=_sqnr_or_infinity)[: self._max_layers]

    def _speed(self) -> Iterable[Metric]:
        report, live = self._report, self._started is not None
        seconds = self._live_seconds if live or report is None else report.seconds
        read = self._bytes_read if live or report is None else report.bytes_read
        yield _gauge("load_seconds", "Seconds the load took, or has taken so far.", seconds)
        yield CounterMetricFamily(
            "quantload_load_bytes_read", "Checkpoint bytes read, all loads of this process.", value=self._all_bytes_read
        )
        rate = read / seconds if seconds > 0 else 0.0
        yield _gauge("load_throughput_bytes_per_second", "Checkpoint bytes read per second of the load.", rate)
        phases = _labelled("phase_seconds", "Seconds of each phase of the last load.", "phase")
        passed: dict[str, float] = {}
        for each in report.phases if report is not None else ():
            passed[each.name] = passed.get(each.name, 0.0) + each.seconds  # a load that was begun again has two
        for name, took in passed.items():
            phases.add_metric([name], took)
        yield phases
        yield _gauge("load_progress_ratio", "Share of the checkpoint that is read, 0 to 1.", self._progress)

    def _memory(self) -> Iterable[Metric]:
        plan, report = self._plan, self._report
        model = _labelled("model_bytes", "Bytes of the finished model and of its checkpoint.", "kind")
        peak = _labelled("peak_memory_bytes", "Highest memory during the load above the value before it.", "device")
        staging = _labelled("staging_bytes", "Staging arena: its limit and the most that was in use.", "kind")
        predicted = _gauge("predicted_peak_memory_bytes", "Peak the plan predicted from the headers.")
        limit = _gauge("memory_limit_bytes", "What the load was allowed to take; absent where there was no limit.")
        if report is not None and report.limit_bytes is not None:
            limit.add_metric([], report.limit_bytes)
        if report is not None:
            model.add_metric(["final"], report.final_bytes)
            model.add_metric(["checkpoint"], report.checkpoint_bytes)
            predicted.add_metric([], report.predicted_peak_bytes)
            peak.add_metric([report.device], report.peak_bytes)
            staging.add_metric(["peak"], report.staging_peak_bytes)
        if plan is not None:
            staging.add_metric(["limit"], plan.staging_bytes)
            if report is None:
                model.add_metric(["checkpoint"], plan.checkpoint_bytes)
                predicted.add_metric([], plan.peak_bytes)
        return [model, peak, predicted, limit, staging, *_of_ranks(report)]

    def _layer_metrics(self) -> Iterable[Metric]:
        count = _labelled("layers", "Quantized layers.", "scheme")
        sqnr = _labelled("layer_sqnr_db", "Signal to quantization noise ratio of a layer's weights.", "layer")
        size = _labelled("layer_bytes", "Bytes of a quantized layer's parameters.", "layer", "scheme")
        saturated = _labelled("layer_saturated_ratio", "Share of a layer's weights that saturated.", "layer")
        schemes = Counter(layer.scheme for layer in self._report.layers) if self._report is not None else Counter()
        for scheme, layers in sorted(schemes.items()):
            count.add_metric([scheme], layers)
        lowest = _gauge("lowest_sqnr_db", "The lowest SQNR of all quantized layers.")
        known = [layer.sqnr_db for layer in self._report.layers if layer.sqnr_db is not None] if self._report else []
        finite = [each for each in known if math.isfinite(each)]
        if finite:
            lowest.add_metric([], min(finite))
        for layer in self._layers:
            size.add_metric([layer.name, layer.scheme], layer.bytes_out)
            if layer.sqnr_db is not None and not math.isnan(layer.sqnr_db):
                sqnr.add_metric([layer.name], layer.sqnr_db)
            if layer.saturated_fraction is not None:
                saturated.add_metric([layer.name], layer.saturated_fraction)
        return [count, sqnr, lowest, size, saturated]

    def _counters(self) -> Iterable[Metric]:
        for name, help_text, counts in (
            ("loads", "Loads by result.", self._loads),
            ("reloads", "Reloads of weights into a loaded model by result.", self._reloads),
            ("cache_loads", "Loads with a cache by what became of it.", self._cached),
        ):
            family = CounterMetricFamily(f"quantload_{name}", help_text, labels=["result"])
            for result, value in counts.items():
                family.add_metric([result], value)
            yield family
        requests = CounterMetricFamily(
            "quantload_source_requests", "Requests to servers that checkpoints were read from.", labels=["result"]
        )
        for result, count in sorted(self._requests.items()):
            requests.add_metric([result], count)
        yield requests
        yield CounterMetricFamily(
            "quantload_source_retries", "Requests to servers that were made again.", value=self._source_retries
        )
        yield CounterMetricFamily("quantload_source_bytes", "Bytes that came from servers.", value=self._source_bytes)
        yield CounterMetricFamily(
            "quantload_reload_seconds", "Seconds that reloads took, all together.", value=self._reload_seconds
        )
        values = _labelled("non_finite_values", "Values of the loaded weights that are NaN or infinite.", "kind")
        found = () if self._report is None else self._report.non_finite
        for kind in ("nan", "infinite", "overflowed") if self._report is not None else ():
            values.add_metric([kind], sum(getattr(each, kind) for each in found))
        yield values


def _of_ranks(report: LoadReport | None) -> Iterable[Metric]:
    """What each rank of a model that several processes hold together read, holds, and took at most."""
    if report is None or not report.rank_bytes_read:
        return
    for name, text, values in (
        ("rank_bytes_read", "Checkpoint bytes that a rank read.", report.rank_bytes_read),
        ("rank_model_bytes", "Bytes of a rank's part of the model.", report.rank_final_bytes),
        ("rank_peak_memory_bytes", "Highest memory of a rank during the load.", report.rank_peak_bytes),
    ):
        family = _labelled(name, text, "rank")
        for rank, value in enumerate(values):
            family.add_metric([str(rank)], value)
        yield family


class _LoadCollector(Collector):
    def __init__(self, metrics: LoadMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics.collect()


def _gauge(name: str, help_text: str, value: float | None = None) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"quantload_{name}", help_text, value=value)


def _labelled(name: str, help_text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"quantload_{name}", help_text, labels=labels)


def _sqnr_or_infinity(layer: LayerReport) -> float:
    return math.inf if layer.sqnr_db is None or math.isnan(layer.sqnr_db) else layer.sqnr_db
