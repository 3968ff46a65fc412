"""Who has no key gets nothing but `/health`, however it asks; who has it gets in, however it was given."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from quantload.errors import PolicyError
from quantload.memory.metrics import LoadMetrics
from quantload.server import ServerState, create_app
from quantload.server.auth import OPEN_PATHS, chosen_key, read_key_file
from server_harness import running

KEY = "sk-Zx81"
ROUTES = sorted({getattr(route, "path", "") for route in create_app(ServerState("tiny")).routes} - OPEN_PATHS)


async def status_of(app: Any, path: str, authorization: bytes | None, method: str = "GET") -> int:
    """The status the application answers with, without a network."""
    headers = [] if authorization is None else [(b"authorization", authorization)]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": headers,
        "query_string": b"api_key=" + KEY.encode(),
    }
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps({"api_key": KEY}).encode(), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app({**scope, "root_path": "", "http_version": "1.1", "scheme": "http"}, receive, send)
    return int(sent[0]["status"])


WRONG = [
    None, b"", b"Bearer", b"Bearer ", b"Bearer wrong", b"Bearer " + KEY[:-1].encode(), b"Bearer " + KEY.encode() + b"x",
    b"Bearer " + KEY.lower().encode(), b"Basic " + KEY.encode(), KEY.encode(), b"Bearer" + KEY.encode(),
    b"Bearer " + KEY.encode() + b"\xa0", b"Bearer x" + KEY.encode(), b"Bearer " + KEY.encode() + b", Bearer x",
    b"Bearer " + b"\xff" * 9000, b"Bearer s\xe9same",
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "PROPFIND"])
def test_no_route_opens_without_the_key(method: str) -> None:
    app = create_app(ServerState("tiny"), KEY)
    for path in [*ROUTES, "/", "/nowhere", "/health/", "//health", "/health/../metrics", "/Health", "/health\x00", "*"]:
        for header in WRONG:
            assert asyncio.run(status_of(app, path, header, method)) == 401, (path, header)
    assert asyncio.run(status_of(app, "/health", None)) == 503  # still loading


@pytest.mark.parametrize(
    "key", [KEY, "sésame", "voilà", "two words", f"{KEY}\n", f"\t {KEY} \r\n", "\udcff\udc80x", "鍵"]
)
def test_the_key_opens_whatever_letters_it_has(key: str) -> None:
    """As bytes that are the UTF-8 of it; white space around it does not count, as no client can send it."""
    app = create_app(ServerState("tiny"), key)
    sent = key.strip().encode(errors="surrogateescape")
    for header in (b"Bearer " + sent, b"bearer  " + sent):
        assert asyncio.run(status_of(app, "/v1/models", header)) == 503
    assert asyncio.run(status_of(app, "/v1/models", b"Bearer " + sent[:-1])) == 401


@pytest.mark.parametrize("key", ["", " ", "\n", "a\nb", "a\x00b", "a\x7fb", "x" * 4097])
def test_a_key_that_no_client_can_send_is_refused_and_not_repeated(key: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(key)
    for give in (
        lambda: create_app(ServerState("tiny"), key),
        lambda: chosen_key(key, None),
        lambda: read_key_file(file),
    ):
        with pytest.raises(PolicyError) as caught:
            give()
        assert key.strip() == "" or key not in str(caught.value)


def test_white_space_around_a_key_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert chosen_key(f"{KEY}\n", None) == KEY
    assert "white space" in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize("content", [KEY, f"{KEY}\n", f"\ufeff{KEY}\r\n", f"  {KEY}  "])
def test_a_key_comes_from_a_file(content: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(content, encoding="utf-8")
    assert chosen_key(None, file) == KEY


def test_what_is_wrong_with_a_key_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PolicyError, match=r"missing.*cannot be read: No such file"):
        chosen_key(None, tmp_path / "missing")
    with pytest.raises(PolicyError, match="Is a directory"):
        chosen_key(None, tmp_path)
    with pytest.raises(PolicyError, match="two API keys"):
        chosen_key("a", tmp_path / "b")
    monkeypatch.setenv("QUANTLOAD_API_KEY", "")  # a secret that was not filled in must not open the server
    with pytest.raises(PolicyError, match="empty"):
        chosen_key(None, None)
    monkeypatch.delenv("QUANTLOAD_API_KEY")
    monkeypatch.setenv("QUANTLOAD_API_KEY_FILE", "")
    with pytest.raises(PolicyError, match="empty"):
        chosen_key(None, None)
    monkeypatch.delenv("QUANTLOAD_API_KEY_FILE")
    assert chosen_key(None, None) is None


def test_the_key_is_in_no_log_and_no_answer(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(1)
    state = ServerState("tiny", metrics=LoadMetrics())
    with running(state, KEY) as client:
        replies = [
            client.get(path, Authorization=f"Bearer {key}")
            for path in ("/metrics", "/health", "/v1/models", "/load_report", "/nowhere")
            for key in (KEY, f"{KEY}x")
        ]
    assert {reply.status for reply in replies} == {200, 401, 404, 503}
    assert all(KEY not in reply.text and KEY not in str(reply.headers) for reply in replies)
    out, err = capfd.readouterr()
    assert KEY not in caplog.text + out + err
    assert KEY not in repr(vars(state))


def test_a_wrong_key_is_told_in_openais_words() -> None:
    with running(ServerState("tiny"), api_key="k") as client:
        reply = client.get("/v1/models", Authorization="Bearer x")
        assert reply.json["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"


def test_digests_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one length, so that the time of the comparison says nothing of the key."""
    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr("quantload.server.auth.hmac.compare_digest", lambda *both: compared.append(both))
    app = create_app(ServerState("tiny"), KEY)
    for header in (None, b"Bearer x", b"Bearer " + b"x" * 1000):
        assert asyncio.run(status_of(app, "/v1/models", header)) == 401
    assert {len(one) for both in compared for one in both} == {32}
    assert len(compared) == 3
