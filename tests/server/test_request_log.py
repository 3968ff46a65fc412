"""Each request has a line, an id and a count, and no line has what nobody but the client should know."""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any

import pytest
from quantload.cli.logs import _JsonFormatter, _StampedFormatter
from quantload.server import ServerState
from server_harness import Client, running, wait_for

SECRET_TEXT = "the lazy secret fox"
KEY = "sk-very-secret"


class Lines(logging.Handler):
    """The records of the loggers below `quantload`, as they would be printed."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def fields(self) -> list[dict[str, Any]]:
        return [getattr(record, "fields", {}) for record in self.records if record.name == "quantload.requests"]

    def text(self) -> str:
        formats = (_JsonFormatter(), _StampedFormatter())
        return "\n".join(each.format(record) for record in self.records for each in formats)


@pytest.fixture
def lines() -> Any:
    handler = Lines()
    logger = logging.getLogger("quantload")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_line_with_its_tokens_and_id(client: Client, lines: Lines, stream: bool) -> None:
    body = {"prompt": SECRET_TEXT, "max_tokens": 7, "stream": stream}
    reply = client.post(
        "/v1/completions?key=hidden", body, **{"X-Request-ID": "my-1", "Authorization": f"Bearer {KEY}"}
    )
    assert reply.headers["x-request-id"] == "my-1"
    wait_for(lambda: lines.fields)
    [line] = lines.fields
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["request_id"], line["client"], line["completion_tokens"]) == ("my-1", "127.0.0.1", 7)
    assert 1 < line["prompt_tokens"] < 30
    assert 0 < line["first_token_seconds"] <= line["seconds"] < 60
    text = lines.text()
    assert "7 completion tokens" in text
    assert not [secret for secret in ("secret", "hidden", "lazy") if secret in text]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/completions", 400),
    ],
)
def test_every_answer_has_a_new_id_and_a_line(
    client: Client, lines: Lines, method: str, path: str, status: int
) -> None:
    reply = client.get(path) if method == "GET" else client.post(path, b"{")
    assert reply.status == status
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])
    wait_for(lambda: lines.fields)
    assert [(line["path"], line["status"], line["request_id"]) for line in lines.fields] == [
        (path, status, reply.headers["x-request-id"])
    ]
    assert "completion_tokens" not in lines.fields[0]


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "über", "a,b", '"'])
def test_an_id_that_could_not_stand_in_a_line_is_replaced(client: Client, given: str) -> None:
    reply = client.get("/health", **{"X-Request-ID": given})
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])


def test_what_a_client_invents_stays_one_line(client: Client, lines: Lines) -> None:
    client.get("/x%0a2026-11-29T00:00:00Z%1b[31m" + "y" * 4000)
    wait_for(lambda: lines.fields)
    text = _StampedFormatter().format(lines.records[-1])
    assert "\n" not in text
    assert "\x1b" not in text
    assert len(text) < 800


def test_a_refused_key_is_logged_without_it(lines: Lines) -> None:
    with running(ServerState("tiny"), api_key=KEY) as client:
        reply = client.get("/v1/models", Authorization=f"Bearer {KEY}x")
        assert (reply.status, len(reply.headers["x-request-id"])) == (401, 32)
        assert client.get("/v1/models", Authorization=f"Bearer {KEY}").status == 503
        wait_for(lambda: len(lines.fields) == 2)
        assert KEY not in lines.text()
        metrics = client.get("/metrics", Authorization=f"Bearer {KEY}").text
        assert KEY not in metrics
        assert 'quantload_requests_total{route="/v1/models",status="401"} 1.0' in metrics


@pytest.mark.parametrize(("mode", "logged"), [("all", 3), ("no-probes", 1), ("off", 0)])
def test_lines_of_probes_and_of_all_can_be_left_out(lines: Lines, mode: Any, logged: int) -> None:
    with running(ServerState("tiny"), request_log=mode) as client:
        for path in ("/health", "/metrics", "/v1/models"):
            client.get(path)
        time.sleep(0.05)
    assert len(lines.fields) == logged


def test_a_crash_is_a_line_a_traceback_and_an_answer_with_one_id(model: Any, client: Client, lines: Lines) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("boom")

    handle = model.register_forward_pre_hook(fail)
    try:
        reply = client.post("/v1/completions", {"prompt": "the"})
    finally:
        handle.remove()
    assert (reply.status, reply.json["error"]["type"]) == (500, "server_error")
    wait_for(lambda: lines.fields)
    assert lines.fields[0]["status"] == 500
    [crash] = [record for record in lines.records if record.exc_info]
    assert reply.headers["x-request-id"] in crash.getMessage()
    assert "boom" in json.loads(_JsonFormatter().format(crash))["exception"]


@pytest.mark.parametrize(("stream", "status"), [(True, 200), (False, 499)])
def test_a_client_that_left_is_said_to_have(
    model: Any, client: Client, lines: Lines, stream: bool, status: int
) -> None:
    handle = model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    try:
        connection = client.open("POST", "/v1/completions", {"prompt": "the", "max_tokens": 400, "stream": stream})
        if stream:
            connection.getresponse().readline()
        time.sleep(0.1)
        connection.sock and connection.sock.close()
        connection.close()
        wait_for(lambda: lines.fields)
    finally:
        handle.remove()
    [line] = lines.fields
    assert (line["status"], line["client_left"]) == (status, True)
    assert 0 < line["completion_tokens"] < 200


def test_lines_have_a_time_a_level_and_a_logger() -> None:
    record = logging.LogRecord("quantload", logging.WARNING, "", 0, "a %s", ("b",), None)
    record.created, record.msecs = 1795941000.25, 250.0
    assert _StampedFormatter().format(record) == "2026-11-29T08:30:00.250Z WARNING quantload: a b"
    assert json.loads(_JsonFormatter().format(record)) == {
        "time": "2026-11-29T08:30:00.250Z", "level": "warning", "logger": "quantload", "message": "a b",
    }  # fmt: skip
