"""The page of the server and the probes: what each says while the model loads, when it is there, when it failed."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from quantload.errors import CheckpointError
from quantload.memory.metrics import LoadMetrics
from quantload.memory.report import LoadReport, PhaseReport
from quantload.progress import Moment
from quantload.server import ServerState
from quantload.server.load_progress import WARM_UP, WEIGHTS
from quantload.server.page_routes import MOST_FOLLOWERS
from server_harness import Client, running, wait_for

KEY = "k3y"
HTML = {"Accept": "text/html,*/*"}
PROBES = ("/livez", "/readyz", "/startupz")


def report() -> LoadReport:
    sizes = {"bytes_read": 8, "checkpoint_bytes": 8, "final_bytes": 4, "peak_bytes": 6, "staging_peak_bytes": 1}
    more = {"baseline_bytes": 1, "predicted_final_bytes": 4, "predicted_peak_bytes": 7}
    return LoadReport("tiny", "none", "cpu", 2.0, **sizes, **more, phases=[PhaseReport("stream", 1.5)])  # type: ignore[arg-type]


def statuses(client: Client) -> list[int]:
    return [client.get(path).status for path in PROBES]


def events_of(text: str) -> list[tuple[str, Any]]:
    parts = [part.split("\n") for part in text.split("\n\n") if part]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


def test_a_page_follows_a_load_and_shows_it_when_it_is_done(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "load_report", report(), raising=False)
    state = ServerState("tiny", metrics=LoadMetrics())
    state.progress.begin(WEIGHTS)
    state.progress.watch(Moment("plan", 0.1))
    state.progress.watch(Moment("stream", 0.5, 2, 8, 3, 7, 9, None))
    with running(state) as client:
        assert statuses(client) == [200, 503, 503]
        assert client.get("/load_page").status == 503
        connection = client.open("GET", "/load_events")
        response = connection.getresponse()
        first = b"".join(response.readline() for _ in range(3)).decode()
        state.finish(model, tokenizer, lambda *_: None)
        told = events_of(first + response.read().decode())
        connection.close()
        name, moment = told[0]
        assert name == "moment"
        assert (moment["model"], moment["phase"]) == ("tiny", f"{WEIGHTS}: stream")
        assert (moment["bytes_read"], moment["bytes_total"], moment["memory"], moment["limit_bytes"]) == (2, 8, 3, 9)
        assert moment["bytes_per_second"] > 0
        assert told[-1] == ("ready", {})

        shown = client.get("/load_page").json
        assert "8 B became 4 B in 2 s; peak 6 B where 7 B were predicted." in shown["html"]
        assert shown["data"]["memory"]["phases"] == [{"name": "stream", "from": 0.0, "to": 1.5}]
        assert statuses(client) == [200, 200, 200]
        phases = client.get("/startupz").json["phases"]
        assert [each["name"] for each in phases][-3:] == [f"{WEIGHTS}: plan", f"{WEIGHTS}: stream", WARM_UP]
        assert phases == client.get("/startupz").json["phases"], "the clock of starting stands still"


def test_a_load_that_failed_is_shown_with_what_to_do() -> None:
    state = ServerState("tiny", quantization="mxfp8", device="cpu")
    state.fail(CheckpointError("shard 2 <is> gone"))
    with running(state) as client:
        assert statuses(client) == [500, 500, 500]
        assert events_of(client.get("/load_events").text) == [("failed", {})]
        shown = client.get("/load_page").json
    assert "CheckpointError: shard 2 &lt;is&gt; gone" in shown["html"]
    assert "fetch the checkpoint again" in shown["html"]
    assert "tiny as mxfp8 on cpu" in shown["html"]


def test_who_has_no_key_gets_a_page_that_asks_for_it_and_knows_nothing() -> None:
    state = ServerState("secret-model")
    with running(state, KEY) as client:
        asked = client.get("/", **HTML)
        assert (asked.status, asked.headers["content-type"]) == (401, "text/html; charset=utf-8")
        assert "secret-model" not in asked.text
        assert asked.headers["cache-control"] == "no-store"
        assert client.get("/").json["error"]["code"] == "invalid_api_key"
        for path in ("/load_events", "/load_page"):
            assert client.get(path, **HTML).status == 401
        opened = client.get("/", Authorization=f"Bearer {KEY}", **HTML)
        assert (opened.status, opened.text) == (200, asked.text)
        assert statuses(client) == [200, 503, 503]


def test_only_so_many_pages_follow_a_load() -> None:
    state = ServerState("tiny")
    with running(state) as client:
        held = [client.open("GET", "/load_events") for _ in range(MOST_FOLLOWERS)]
        for each in held:
            each.getresponse().readline()
        assert client.get("/load_events").status == 429
        for each in held:
            each.close()
        wait_for(lambda: _follows(client))
        state.cancel.set()


def _follows(client: Client) -> bool:
    connection = client.open("GET", "/load_events")
    status = connection.getresponse().status
    connection.close()
    return status == 200


def test_followers_are_let_go_when_the_server_stops() -> None:
    state = ServerState("tiny")
    ended = threading.Event()

    def follow(client: Client) -> None:
        assert {name for name, _ in events_of(client.get("/load_events").text)} <= {"moment"}
        ended.set()

    with running(state) as client:
        thread = threading.Thread(target=follow, args=(client,))
        thread.start()
        state.cancel.set()
        thread.join(30)
    assert ended.is_set()


def test_the_seconds_of_each_phase_are_a_metric() -> None:
    metrics = LoadMetrics()
    made = report()
    made.phases.append(PhaseReport("stream", 0.5))
    metrics.on_report(made)
    assert b'quantload_phase_seconds{phase="stream"} 2.0\n' in metrics.render()
