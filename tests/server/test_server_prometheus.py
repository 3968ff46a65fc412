"""What `deploy/` holds for Prometheus and Grafana is about metrics that there are, and a real Prometheus takes it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quantload.memory.metrics import LoadMetrics
from quantload.memory.report import LayerReport, LoadReport, PhaseReport
from quantload.server import ServerState
from server_harness import running

DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "quantload.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
KEY = "k3y"
FORMS = {"stat", "bargauge", "timeseries", "table"}
real = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="there is no Prometheus here; Debian has it as the package prometheus",
)


def loaded() -> LoadMetrics:
    sizes: dict[str, Any] = {
        "bytes_read": 8,
        "checkpoint_bytes": 8,
        "final_bytes": 4,
        "peak_bytes": 6,
        "staging_peak_bytes": 1,
    }
    more: dict[str, Any] = {
        "baseline_bytes": 1,
        "predicted_final_bytes": 4,
        "predicted_peak_bytes": 7,
        "limit_bytes": 9,
    }
    layers = [
        LayerReport(f"l.{i}.up", "linear", "mxfp8", "numba", 4, 2, 2, sqnr, saturated_fraction=0.0)
        for i, sqnr in enumerate((31.0, 7.5, float("inf")))
    ]
    report = LoadReport("m", "mxfp8", "cpu", 2.0, **sizes, **more, layers=layers, phases=[PhaseReport("stream", 1.5)])
    metrics = LoadMetrics()
    metrics.on_report(report)
    return metrics


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\b(?:quantload|process)_[a-z_]+\b", text))


def metrics_text() -> str:
    state = ServerState("tiny", metrics=loaded())
    with running(state) as client:
        client.get("/health")
        return client.get("/metrics").text


def test_queries_and_alerts_ask_for_metrics_that_there_are() -> None:
    there = names_in(metrics_text())
    assert "quantload_memory_limit_bytes 9.0" in metrics_text()
    assert "quantload_lowest_sqnr_db 7.5" in metrics_text()
    alerts = re.findall(r"^ +expr: (.*)$", (DEPLOY / "prometheus" / "alerts.yml").read_text(), re.MULTILINE)
    assert len(alerts) == 6
    for text in [*QUERIES, *alerts]:
        assert names_in(text) <= there, text


def test_the_dashboard_has_what_grafana_wants_of_one() -> None:
    assert DASHBOARD["schemaVersion"] >= 39
    assert {"title", "uid", "time", "templating", "panels", "annotations"} <= set(DASHBOARD)
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in FORMS
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        for target in panel["targets"]:
            assert set(re.findall(r"\$\{?(\w+)", json.dumps(target))) <= variables


@pytest.mark.slow
@real
def test_promtool_takes_the_metrics_the_rules_and_what_they_are_to_fire_on() -> None:
    def promtool(*arguments: str, given: str | None = None) -> None:
        done = subprocess.run(
            ["promtool", *arguments], input=given, capture_output=True, text=True, cwd=DEPLOY / "prometheus",
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    promtool("check", "metrics", given=metrics_text())
    promtool("check", "rules", "alerts.yml")
    promtool("test", "rules", "alerts_test.yml")
    promtool("check", "config", "--syntax-only", "prometheus.yml")


class Prometheus:
    """A Prometheus of our own that scrapes a server every second."""

    def __init__(self, folder: Path, target: str, port: int) -> None:
        (folder / "key").write_text(KEY)
        config = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
        config = config.replace("15s", "1s").replace("quantload:8000", target)
        config = config.replace("/run/secrets/quantload_api_key", str(folder / "key"))
        (folder / "prometheus.yml").write_text(config)
        shutil.copy(DEPLOY / "prometheus" / "alerts.yml", folder)
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            ["prometheus", "--config.file", folder / "prometheus.yml", "--storage.tsdb.path", folder / "data",
             "--web.listen-address", f"127.0.0.1:{port}"],
            stdout=subprocess.DEVNULL, stderr=(folder / "log").open("w"),
        )  # fmt: skip

    def result(self, query: str) -> list[dict[str, Any]]:
        """What a query gives; nothing as long as Prometheus does not answer."""
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}") as reply:
                found: list[dict[str, Any]] = json.load(reply)["data"]["result"]
        except (urllib.error.URLError, ConnectionError):
            assert self.process.poll() is None
            return []
        return found

    def wait_for(self, query: str, seconds: float = 60.0) -> list[dict[str, Any]]:
        """What a query gives as soon as that is something."""
        end = time.monotonic() + seconds
        while not (found := self.result(query)):
            assert time.monotonic() < end, f"no data for {query}"
            time.sleep(0.2)
        return found


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    from quantload.server.binding import bind_socket

    with bind_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with running(ServerState("tiny", metrics=loaded()), KEY) as client:
        started = Prometheus(tmp_path, f"127.0.0.1:{client.port}", port)
        try:
            yield started
        finally:
            started.process.terminate()
            started.process.wait(30)


@pytest.mark.slow
@real
def test_prometheus_scrapes_the_server_and_every_query_of_the_dashboard_has_data(prometheus: Prometheus) -> None:
    prometheus.wait_for('up{job="quantload"} == 1')
    for query in QUERIES:
        prometheus.wait_for(query.replace("$instance", ".*"))
    assert prometheus.result("quantload_peak_memory_bytes")[0]["value"][1] == "6"
    assert prometheus.result('quantload_phase_seconds{phase="stream"}')[0]["value"][1] == "1.5"
    firing = prometheus.wait_for('ALERTS{alertstate="firing"}')
    assert [each["metric"]["alertname"] for each in firing] == ["QuantloadLowSqnr"]
