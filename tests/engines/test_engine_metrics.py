"""What the processes of an engine measured, as Prometheus reads it from all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

LOAD = """
import sys
from quantload.engines.engine_metrics import publish
from quantload.memory.report import LayerReport, LoadReport

rank, seconds = int(sys.argv[1]), float(sys.argv[2])
layer = LayerReport("up", "linear", "quark_mxfp4", "numba", 2000, 531, 1000)
sizes = dict(bytes_read=600 + rank, checkpoint_bytes=1000, final_bytes=300, peak_bytes=400, staging_peak_bytes=64)
known = dict(baseline_bytes=0, predicted_final_bytes=300, predicted_peak_bytes=400, layers=[layer, layer])
for each in (1.0, seconds):
    publish(LoadReport("m", "quark_mxfp4", "cpu", each, **sizes, **known, rank=rank, world_size=2))
"""


def test_the_gauges_of_all_ranks_are_collected(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for rank, seconds in enumerate(("2.5", "3.5")):
        subprocess.run([sys.executable, "-c", LOAD, str(rank), seconds], check=True, env=environment, timeout=120)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    lines = set(generate_latest(registry).decode().splitlines())
    for rank, seconds in enumerate(("2.5", "3.5")):
        assert {
            f'quantload_load_seconds{{rank="{rank}"}} {seconds}',
            f'quantload_load_bytes_read{{rank="{rank}"}} {600.0 + rank}',
            f'quantload_model_bytes{{kind="final",rank="{rank}"}} 300.0',
            f'quantload_peak_memory_bytes{{device="cpu",rank="{rank}"}} 400.0',
            f'quantload_layers{{rank="{rank}",scheme="quark_mxfp4"}} 2.0',
        } <= lines
