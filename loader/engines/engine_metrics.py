"""Numbers of a load in an engine's process, in Prometheus' default registry: engines serve it, or collect it.

Where engines run several processes they set `PROMETHEUS_MULTIPROC_DIR`, and their `/metrics` has what each of them
wrote.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

from prometheus_client import Gauge

from ..memory.report import LoadReport


@cache
def _gauge(name: str, text: str, *labels: str) -> Gauge:
    """The gauge of a name; a process has one, however many models it loads."""
    return Gauge(f"quantload_{name}", text, [*labels, "rank"], multiprocess_mode="mostrecent")


def publish(report: LoadReport) -> None:
    """Show a report; `rank` is 0 where there is one process."""
    rank = str(report.rank or 0)
    _gauge("load_seconds", "Seconds the load took.").labels(rank).set(report.seconds)
    _gauge("load_bytes_read", "Checkpoint bytes that the rank read.").labels(rank).set(report.bytes_read)
    sizes = _gauge("model_bytes", "Bytes of the rank's part of the model, and of the checkpoint.", "kind")
    sizes.labels("final", rank).set(report.final_bytes)
    sizes.labels("checkpoint", rank).set(report.checkpoint_bytes)
    peak = _gauge("peak_memory_bytes", "Highest memory during the load above the value before it.", "device")
    peak.labels(report.device, rank).set(report.peak_bytes)
    layers = _gauge("layers", "Quantized layers.", "scheme")
    for scheme, count in Counter(layer.scheme for layer in report.layers).items():
        layers.labels(scheme, rank).set(count)
