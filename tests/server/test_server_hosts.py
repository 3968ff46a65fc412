"""Which names in `Host` and `Origin` are answered: a page elsewhere cannot use a server on its visitor's machine."""

from __future__ import annotations

import logging
import re
import socket
from typing import Any

import pytest
from quantload.errors import PolicyError
from quantload.server import ServerState, create_app, serve
from server_harness import Client, running_app
from starlette.testclient import TestClient

OURS = [
    "localhost", "localhost:8000", "LocalHost.", "a.localhost", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "[::1]",
    "203.0.113.5:80", "[2001:db8::1]",
]  # fmt: skip
OTHERS = [
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example#localhost",
    "localhost@evil.example", "evillocalhost", "x@evil.example:80", "", ":8000", "[::1", "[evil.example]", "\xff",
]  # fmt: skip


def asked(allowed: Any, path: str = "/health", **headers: str) -> tuple[int, Any]:
    client = TestClient(create_app(ServerState("tiny"), allowed_hosts=allowed), base_url="http://localhost:8000")
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    reply = client.get(path, headers=encoded)
    return reply.status_code, reply.json()


@pytest.mark.parametrize("host", OURS)
def test_the_names_of_this_machine_are_answered(host: str) -> None:
    assert asked([], host=host)[0] == 503


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/nowhere"])
@pytest.mark.parametrize("host", OTHERS)
def test_other_names_are_not(host: str, path: str) -> None:
    status, body = asked([], path, host=host)
    assert (status, body["error"]["code"], body["error"]["type"]) == (403, "host_not_allowed", "invalid_request_error")


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        (["models.example"], "Models.Example.:80", 503),
        (["models.example"], "a.models.example", 403),
        (["*.models.example"], "a.b.models.example", 503),
        (["*.models.example"], "models.example", 403),
        (["*.models.example"], "evilmodels.example", 403),
        (["*"], "anything.example", 503),
        (None, "anything.example", 503),
    ],
)
def test_names_can_be_allowed(allowed: Any, host: str, status: int) -> None:
    assert asked(allowed, host=host)[0] == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 503),
        ("http://127.0.0.1", 503),
        ("http://198.51.100.7", 503),  # the page and the server have the same name
        ("http://198.51.100.7:81", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("file://", 403),
        ("chrome-extension://abcdef", 403),
        ("https://models.example", 503),
    ],
)
def test_a_page_elsewhere_is_not_answered(origin: str, status: int) -> None:
    got, body = asked(["models.example"], host="198.51.100.7", origin=origin)
    assert got == status
    assert status == 503 or body["error"]["code"] == "origin_not_allowed"


@pytest.mark.parametrize(
    "name", ["http://a.example", "a.example:80", "a/b", "a b", "*.*.example", "*example", "", "é.example"]
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(PolicyError, match="is no host name"):
        create_app(ServerState("tiny"), allowed_hosts=[name])


def test_two_names_in_one_request_do_not_help() -> None:
    client = TestClient(create_app(ServerState("tiny"), allowed_hosts=[]), base_url="http://localhost")
    assert client.get("/health", headers=[(b"host", b"localhost"), (b"host", b"evil.example")]).status_code == 403


def test_a_request_without_a_name_is_answered() -> None:
    """Probes of HTTP/1.0 send none; a browser always does."""
    app = create_app(ServerState("tiny"), allowed_hosts=[])
    with running_app(app) as client, socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert b" 503 " in connection.recv(1000)


@pytest.mark.parametrize(
    ("host", "allowed", "expected"),
    [
        ("127.0.0.1", (), 403),
        ("127.0.0.1", ("evil.example",), 503),
        ("0.0.0.0", (), 503),
        ("0.0.0.0", ("a.example",), 403),
    ],
)
def test_serve_checks_names_on_local_addresses(
    host: str, allowed: tuple[str, ...], expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    statuses: list[int] = []

    def ask(*_: Any) -> Any:
        found = re.search(r"Listening on http://[0-9.]+:(\d+)", caplog.text)
        assert found
        statuses.append(Client(int(found[1])).get("/health", Host="evil.example").status)
        raise ValueError("enough")

    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="enough"):
        serve(ask, lambda: None, model_name="tiny", host=host, port=0, allowed_hosts=allowed)
    assert statuses == [expected]
