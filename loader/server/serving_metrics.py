"""Prometheus metrics of a server: its requests, their tokens, the queue and the process, beside those of its load."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from importlib import metadata
from typing import Protocol

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .usage import Usage

REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class MetricsSource(Protocol):
    """What `/metrics` shows besides the server's own, such as a `LoadMetrics`."""

    def collect(self) -> Iterable[Metric]:
        """Every metric family with its samples now."""


class ServingMetrics:
    """Counts requests and tokens, and shows them with the metrics of `loads`, on a registry of its own. Thread-safe.

    Names have the prefix `quantload_`, those of the process are the ones Prometheus clients share. Labels are bounded:
    `route` is one the server has or `other`, `status` what the server answers, `model` the one name it serves.
    """

    def __init__(self, model_name: str, loads: MetricsSource | None = None) -> None:
        registry = CollectorRegistry(auto_describe=False)
        self.registry = registry
        self.model_name = model_name
        self.in_flight: set[Usage] = set()
        self.requests = Counter(
            "quantload_requests",
            "Requests by route and status; 499 where the client left before there was one.",
            ["route", "status"],
            registry=registry,
        )
        self.disconnects = _counter("client_disconnects", "Requests whose client left before the end.", registry)
        self.seconds = Histogram(
            "quantload_request_seconds",
            "Seconds from the head of a request to the end of its answer.",
            ["route"],
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self.queue_seconds = _histogram("queue_seconds", "Seconds a generation waited for its turn.", registry)
        self.first_token_seconds = _histogram(
            "time_to_first_token_seconds", "Seconds from the head of a request to its first token.", registry
        )
        self.token_seconds = Histogram(
            "quantload_time_per_output_token_seconds",
            "Mean seconds between the tokens of a request, from the first on.",
            buckets=TOKEN_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = _counter("prompt_tokens", "Tokens of the prompts that were accepted.", registry)
        self.completion_tokens = _counter("completion_tokens", "Tokens that were generated.", registry)
        registry.register(_Now(self))
        if os.path.exists("/proc/self/stat"):
            ProcessCollector(registry=registry)
        else:
            registry.register(_Process())
        if loads is not None:
            registry.register(_Loads(loads))

    def begin(self, usage: Usage) -> None:
        """Count a request as under way; its generations write to `usage`."""
        self.in_flight.add(usage)

    def end(self, usage: Usage, *, route: str, status: int, started: float, disconnected: bool) -> None:
        """Count a request that ended with `status`; `started` is a moment of `time.monotonic`."""
        self.in_flight.discard(usage)
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(time.monotonic() - started)
        if disconnected:
            self.disconnects.inc()
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.completion_tokens.inc(usage.completion_tokens)
        if usage.queued_at is not None and usage.begun_at is not None:
            self.queue_seconds.observe(usage.begun_at - usage.queued_at)
        if usage.first_token_at is not None:
            self.first_token_seconds.observe(usage.first_token_at - started)
        if usage.seconds_per_token is not None:
            self.token_seconds.observe(usage.seconds_per_token)

    def render(self, accept: str = "") -> bytes:
        """The metrics as text, in the Prometheus format or in OpenMetrics where the Accept header asks for it."""
        text: bytes = choose_encoder(accept)[0](self.registry)
        return text

    def content_type(self, accept: str = "") -> str:
        """The Content-Type of what `render` gives for the same Accept header."""
        return str(choose_encoder(accept)[1])


class _Now(Collector):
    """What is so at the moment of the scrape."""

    def __init__(self, metrics: ServingMetrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterable[Metric]:
        requests = tuple(self.metrics.in_flight)  # at once: the event loop goes on adding
        running = sum(usage.running for usage in requests)
        waiting = sum(usage.waiting for usage in requests)
        yield GaugeMetricFamily("quantload_requests_running", "Requests whose generation has begun.", running)
        yield GaugeMetricFamily("quantload_requests_waiting", "Requests that wait for their generation.", waiting)
        info = {"model": self.metrics.model_name, "version": metadata.version("quantload")}
        yield InfoMetricFamily("quantload_model", "The model that is served, and the version that serves it.", info)


class _Loads(Collector):
    def __init__(self, loads: MetricsSource) -> None:
        self.loads = loads

    def collect(self) -> Iterable[Metric]:
        return self.loads.collect()


class _Process(Collector):
    """The names of `ProcessCollector` that psutil knows, for systems without `/proc`."""

    def __init__(self) -> None:
        self.process = psutil.Process()

    def collect(self) -> Iterable[Metric]:
        with self.process.oneshot():
            memory, cpu = self.process.memory_info(), self.process.cpu_times()
            yield GaugeMetricFamily("process_resident_memory_bytes", "Resident memory size in bytes.", memory.rss)
            yield GaugeMetricFamily("process_virtual_memory_bytes", "Virtual memory size in bytes.", memory.vms)
            yield CounterMetricFamily("process_cpu_seconds", "Total user and system CPU time.", cpu.user + cpu.system)
            start = self.process.create_time()
            yield GaugeMetricFamily("process_start_time_seconds", "Start time since the Unix epoch in seconds.", start)


def _counter(name: str, help_text: str, registry: CollectorRegistry) -> Counter:
    return Counter(f"quantload_{name}", help_text, registry=registry)


def _histogram(name: str, help_text: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(f"quantload_{name}", help_text, buckets=REQUEST_BUCKETS, registry=registry)
