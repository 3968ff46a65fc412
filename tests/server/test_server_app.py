from __future__ import annotations

from typing import Any

import pytest
from quantload.memory.metrics import LoadMetrics
from quantload.server import ServerState, create_app
from server_harness import Client, running
from starlette.routing import Route

OPEN_ROUTES = {
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/models",
    "/v1/models/{model:path}",
    "/tokenize",
    "/detokenize",
    "/load_model",
    "/version",
    "/openapi.json",
    "/load_report",
    "/metrics",
    "/health",
    "/",
    "/load_page",
    "/load_events",
    "/livez",
    "/readyz",
    "/startupz",
}


def error_of(reply: Any) -> dict[str, Any]:
    assert set(reply.json) == {"error"}
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = reply.json["error"]
    return error


def test_the_routes_are_exactly_these() -> None:
    app = create_app(ServerState("tiny"))
    assert {route.path for route in app.routes if isinstance(route, Route)} == OPEN_ROUTES
    assert all(isinstance(route, Route) for route in app.routes)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/reset"),
        ("POST", "/v1/audio/transcriptions"),
        ("POST", "/v1/systemone"),
        ("GET", "/docs"),
        ("GET", "/v1/completions/"),
    ],
)
def test_nothing_else_is_there(client: Client, method: str, path: str) -> None:
    reply = client.get(path) if method == "GET" else client.post(path, {"model": "tiny"})
    assert reply.status == 404
    assert path in error_of(reply)["message"]


def test_a_wrong_method_is_refused(client: Client) -> None:
    reply = client.get("/v1/completions")
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert reply.json["error"]["message"].endswith("is not for GET; use POST")
    error_of(reply)


@pytest.mark.parametrize("body", [b"", b"{", b'{"prompt": NaN}', b"\xff\xfe", b"[" * 100_000, b'"x"'])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_is_no_json_object_is_a_400(client: Client, path: str, body: bytes) -> None:
    reply = client.post(path, body)
    assert reply.status == 400
    assert error_of(reply)["type"] == "invalid_request_error"


def test_another_model_is_a_404(client: Client) -> None:
    reply = client.post("/v1/completions", {"model": "gpt-4", "prompt": "x"})
    assert (reply.status, error_of(reply)["code"]) == (404, "model_not_found")


def test_models_lists_the_one(client: Client) -> None:
    data = client.get("/v1/models").json["data"]
    assert [(entry["id"], entry["object"]) for entry in data] == [("tiny", "model")]


def test_before_the_model_is_there() -> None:
    state = ServerState("tiny")
    state.progress(42, 100)
    with running(state) as client:
        health = client.get("/health")
        assert health.status == 503
        assert health.json["status"] == "loading"
        assert health.json["progress"] == 0.42
        assert int(health.headers["retry-after"]) >= 1
        for reply in (
            client.post("/v1/completions", {"prompt": "x"}),
            client.post("/v1/chat/completions", {}),
            client.get("/v1/models"),
            client.get("/load_report"),
        ):
            assert (reply.status, error_of(reply)["code"]) == (503, "model_loading")
            assert int(reply.headers["retry-after"]) >= 1


def test_after_the_load_failed() -> None:
    state = ServerState("tiny")
    state.fail(ValueError("shard 2 is truncated"))
    with running(state) as client:
        health = client.get("/health")
        assert (health.status, health.json["status"]) == (500, "failed")
        assert health.json["error"] == {"type": "ValueError", "message": "shard 2 is truncated"}
        reply = client.post("/v1/completions", {"prompt": "x"})
        assert (reply.status, error_of(reply)["code"]) == (500, "model_load_failed")


def test_report_and_metrics(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Report:
        def to_dict(self) -> dict[str, int]:
            return {"final_bytes": 7}

    monkeypatch.setattr(model, "load_report", Report(), raising=False)
    state = ServerState("tiny", metrics=LoadMetrics())
    with running(state) as client:
        plain, openmetrics = client.get("/metrics"), client.get("/metrics", Accept="application/openmetrics-text")
        assert "quantload_load_progress_ratio 0.0\n" in plain.text
        assert plain.headers["content-type"].startswith("text/plain")
        assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
        assert openmetrics.text.endswith("# EOF\n")
        state.finish(model, tokenizer)
        assert client.get("/load_report").json == {"final_bytes": 7}
        assert client.get("/health").json == {"status": "ok", "model": "tiny"}
