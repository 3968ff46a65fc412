"""`bench/remote.py` and its server: what they run, and what they conclude."""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import remote as bench
import shaped_server


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("obstore")
    results = tmp_path / "results"
    command = ["bench", "--scale", "0.002", "--rounds", "1", "--rates", "0", "--latencies", "0.001", "--no-sweep"]
    monkeypatch.setattr(sys, "argv", [*command, "--dir", str(tmp_path / "work"), "--results", str(results)])
    bench.main()
    (path,) = results.glob("remote-20*-part.json")
    result = json.loads(path.read_text())
    runs = {run["way"]: run for run in result["runs"]}
    assert {"fetch", "load", "download"} <= set(runs)
    assert all(run["sent_bytes"] >= result["checkpoint_bytes"] for run in runs.values())
    assert runs["load"]["peak_bytes"] <= runs["load"]["predicted_peak_bytes"]
    assert "quantload, from the server" in capsys.readouterr().out


def result_of(fetch: float, load: float, sent: int) -> dict[str, Any]:
    common = {"rate": 50e6, "latency": 0.05, "peak_bytes": 90 << 20, "sent_bytes": sent, "answers": 7}
    load_facts = {"predicted_peak_bytes": 100 << 20}
    runs = [
        *({"way": "fetch", "seconds": seconds, **common} for seconds in (fetch, fetch * 9, fetch)),
        *({"way": "load", "seconds": seconds, **common, **load_facts} for seconds in (load, load, load * 9)),
    ]
    sweep = [{"connections": 8, "seconds": 2.0, "sent_bytes": 10**9, "peak_bytes": 90 << 20}]
    return {"runs": runs, "sweep": sweep, "checkpoint_bytes": 1000}


def test_goals_compare_medians_at_each_shape() -> None:
    goals = bench.goals_of(result_of(10.0, 10.4, 1040))
    assert [goal.met for goal in goals] == [True, True, True]
    assert [goal.met for goal in bench.goals_of(result_of(10.0, 11.0, 1100))] == [False, False, True]
    assert goals[0].checkpoint == "50 MB/s, 50 ms"


def test_tables_have_a_row_for_each_way_and_number_of_connections() -> None:
    table = bench.render(result_of(10.0, 10.4, 1040))
    assert "| 50 MB/s | 50 ms | quantload, from the server | 10.40 | 1.04x | 90 |" in table
    assert "| 8 | 2.00 | 500 | 90 |" in table
    assert "runai" not in table


def test_the_server_sends_ranges_and_counts_them(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)))
    server = shaped_server.ShapedServer(tmp_path, rate=0.0, connection_rate=0.0, latency=0.0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", f"/{shaped_server.BUCKET}/a", headers={"Range": "bytes=10-19"})
    answer = connection.getresponse()
    assert (answer.status, answer.read(), answer.headers["Content-Range"]) == (
        206,
        bytes(range(10, 20)),
        "bytes 10-19/256",
    )
    connection.request("GET", f"/{shaped_server.BUCKET}?list-type=2&prefix=")
    assert b"<Key>a</Key>" in connection.getresponse().read()
    connection.request("GET", "/-/sent")
    assert json.loads(connection.getresponse().read()) == {"bytes": 10, "answers": 1}
    connection.close()


def test_a_pace_is_one_for_all_who_send(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    pace = shaped_server.Pace(1000.0)
    for _ in range(3):
        pace.let_pass(500)
    assert slept == [0.5, 1.0]
    shaped_server.Pace(0.0).let_pass(1 << 40)
