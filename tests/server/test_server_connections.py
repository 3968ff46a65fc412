"""Clients that only wait, and many of them: everybody else is still answered."""

from __future__ import annotations

import asyncio
import http.client
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
from quantload.server.binding import bind_socket
from quantload.server.connections import MOST_CONNECTIONS, ConnectionLimits, connection_limits
from server_harness import Client, running_app, wait_for
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

BRIEF = ConnectionLimits(
    connections=16, reserve=2, head_seconds=0.3, body_seconds=0.3, unread_seconds=0.3, idle_seconds=0.4,
    stalled_seconds=0.3, stopping_seconds=0.2, check_seconds=0.05,
)  # fmt: skip
PATIENT = ConnectionLimits(connections=8, reserve=2, check_seconds=0.05)


class Asked:
    """An application that notes what became of its requests."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.go_on = asyncio.Event()

    async def echo(self, request: Request) -> Response:
        try:
            body = await request.body()
        except ClientDisconnect:
            self.ended.append("gone")
            raise
        self.ended.append("read")
        return PlainTextResponse(body)

    async def refuse(self, _request: Request) -> Response:
        return PlainTextResponse("no", 401)

    async def health(self, _request: Request) -> Response:
        return PlainTextResponse("ok")

    async def client(self, request: Request) -> Response:
        return PlainTextResponse(str(request.client.host if request.client else None))

    async def wait(self, request: Request) -> Response:
        while not await request.is_disconnected():
            await asyncio.sleep(0.02)
        return PlainTextResponse("late")

    async def large(self, _request: Request) -> Response:
        return PlainTextResponse(b"x" * (64 << 20))

    def app(self) -> Starlette:
        names = ("client", "echo", "refuse", "health", "wait", "large")
        return Starlette(routes=[Route(f"/{name}", getattr(self, name), methods=["GET", "POST"]) for name in names])


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def brief(asked: Asked) -> Iterator[Client]:
    with running_app(asked.app(), BRIEF) as client:
        yield client


def opened(client: Client, sent: bytes = b"") -> socket.socket:
    """A connection on which something was sent already."""
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=10)
    connection.sendall(sent)
    return connection


def heard(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    said = b""
    try:
        while part := connection.recv(1 << 16):
            said += part
    except ConnectionResetError:
        said += b"[reset]"
    return said


HEAD = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n"


UNFINISHED = {
    b"": b"",
    b"GET /health HTTP/1.1\r\nHos": b"408",
    HEAD: b"408",
    HEAD + b"12345": b"408",
    b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab": b"408",
    HEAD.replace(b"echo", b"refuse") + b"1": b"401",
    HEAD + b"1234567890": b"1234567890",
    HEAD + b"1234567890GET /health HTTP/1.1\r\n": b"408",
}
"""What a client sends and leaves at that, and what is in the answer."""


def test_what_is_never_finished_is_closed(brief: Client) -> None:
    start = time.monotonic()
    with ExitStack() as held:
        for connection, said in [(held.enter_context(opened(brief, sent)), said) for sent, said in UNFINISHED.items()]:
            answer = heard(connection)
            assert said in answer
            assert bool(answer) == bool(said)
            if said == b"408":
                assert b'"type": "invalid_request_error"' in answer
                assert b"connection: close" in answer.lower()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("first", [b"GET /health HTTP/1.1\r\nX-A: ", HEAD.replace(b": 10", b": 10000")])
def test_what_comes_byte_by_byte_is_closed(brief: Client, first: bytes) -> None:
    """It is never silent for as long as a limit, and still does not stay."""
    start = time.monotonic()
    with opened(brief, first) as connection:
        while not is_closed(connection):
            assert time.monotonic() - start < 5
            connection.sendall(b"1")


def is_closed(connection: socket.socket) -> bool:
    """Whether the server closed the connection, within some hundredths of a second."""
    connection.settimeout(0.03)
    try:
        return b"HTTP/1.1 4" in connection.recv(1 << 16)
    except TimeoutError:
        return False


def test_a_body_that_is_slow_but_comes_is_read(asked: Asked) -> None:
    limits = ConnectionLimits(body_seconds=0.1, body_bytes_per_second=200_000, check_seconds=0.02)
    with running_app(asked.app(), limits) as client, opened(client) as connection:
        connection.sendall(HEAD.replace(b": 10", b": 200000"))
        for _ in range(10):
            connection.sendall(b"x" * 20_000)
            time.sleep(0.03)
        assert b"200 OK" in connection.recv(1 << 16)


def test_who_is_closed_while_its_body_is_read_leaves_no_task_behind(brief: Client, asked: Asked) -> None:
    with opened(brief, HEAD) as connection:
        assert b"408" in heard(connection)
    wait_for(lambda: asked.ended == ["gone"], 5)


def test_a_connection_serves_many_requests_and_is_closed_when_there_are_no_more(brief: Client) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", brief.port, timeout=10)
    for number in range(8):
        connection.request("POST", "/echo", str(number).encode())
        assert connection.getresponse().read() == str(number).encode()
        time.sleep(0.05)  # more than a limit in all
    assert connection.sock is not None
    assert heard(connection.sock) == b""


def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(brief: Client) -> None:
    with opened(brief) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(1)
        answer = heard(connection)
    assert len(answer) < 64 << 20


def test_a_client_that_takes_its_answer_slowly_gets_all_of_it(asked: Asked) -> None:
    limits = ConnectionLimits(stalled_seconds=0.8, check_seconds=0.05)
    with running_app(asked.app(), limits) as client, opened(client) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        size = 0
        while part := connection.recv(8 << 20):
            size += len(part)
            time.sleep(0.06)
    assert size > 64 << 20


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHo", HEAD, HEAD + b"1", HEAD.replace(b"echo", b"refuse")])
def test_those_that_only_wait_lock_nobody_out(asked: Asked, sent: bytes) -> None:
    with running_app(asked.app(), PATIENT) as client, ExitStack() as held:
        for _ in range(40):
            held.enter_context(opened(client, sent))
        for path in ("/health", "/echo"):
            assert client.get(path).status == 200


def test_those_that_are_being_answered_are_kept_and_the_probes_get_in(asked: Asked) -> None:
    with running_app(asked.app(), PATIENT) as client, ExitStack() as held:
        waiting = [held.enter_context(opened(client, b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")) for _ in range(8)]
        time.sleep(0.1)
        assert client.get("/health").text == "ok"
        other = client.get("/echo")
        assert (other.status, other.json["error"]["code"]) == (503, "too_many_connections")
        assert int(other.headers["retry-after"]) >= 1
        extra = [held.enter_context(opened(client, b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")) for _ in range(3)]
        assert all(heard(one) for one in extra)
        for one in waiting:
            one.setblocking(False)
            with pytest.raises(BlockingIOError):
                one.recv(1)
        waiting[0].close()
        wait_for(lambda: client.get("/echo").status == 200, 5)


def test_a_burst_takes_no_more_descriptors_than_are_left(asked: Asked, caplog: pytest.LogCaptureFixture) -> None:
    """Connections are counted only after they were accepted, which takes a descriptor."""
    limits = ConnectionLimits(connections=8, reserve=2, accepted_at_once=4)
    most, before = 0, descriptors()
    with running_app(asked.app(), limits) as client, ExitStack() as held:
        for _ in range(100):
            held.enter_context(opened(client, HEAD))
        for _ in range(100):
            most = max(most, descriptors() - before - 100)
            time.sleep(0.001)
        assert client.get("/health").status == 200
    assert most <= 8 + 2 + 4 * 4 + 10  # the loop and its socket
    assert "out of system resource" not in caplog.text


def descriptors() -> int:
    return psutil.Process().num_fds()


def test_a_client_cannot_choose_its_address(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is a proxy, which the variable of uvicorn names."""
    forged = {"X-Forwarded-For": "198.51.100.1 INFO quantload"}
    with running_app(asked.app()) as client:
        assert client.get("/client", **forged).text == "127.0.0.1"
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1")
    with running_app(asked.app()) as client:
        assert client.get("/client", **{"X-Forwarded-For": "198.51.100.1"}).text == "198.51.100.1"


@pytest.mark.parametrize(
    "sent",
    [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
     b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
     b"GET /" + b"x" * 70_000,
     b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
     b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_http_is_refused_in_openais_shape(brief: Client, sent: bytes) -> None:
    with opened(brief, sent) as connection:
        head, _, body = heard(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 4")
    assert b'"invalid_request_error"' in body
    assert brief.get("/health").status == 200


def test_half_open_connections_do_not_keep_a_server_from_stopping(asked: Asked) -> None:
    large = b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"
    with ExitStack() as held:
        with running_app(asked.app(), ConnectionLimits(stopping_seconds=0.2, check_seconds=0.05)) as client:
            for sent in (*UNFINISHED, large):
                held.enter_context(opened(client, sent))
            time.sleep(0.2)
            start = time.monotonic()
        assert time.monotonic() - start < 3


def test_answers_are_sent_at_once() -> None:
    """Both sides: the option on what is accepted, and no wait for an acknowledgement on a connection that is kept."""
    with bind_socket("127.0.0.1", 0) as bound:
        assert bound.proto == socket.IPPROTO_TCP
    with running_app(Asked().app(), PATIENT) as client:
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=10)
        seconds = [timed(lambda: ask(connection)) for _ in range(15)]
    assert sorted(seconds)[len(seconds) // 2] < 0.03


def ask(connection: http.client.HTTPConnection) -> None:
    connection.request("GET", "/health")
    assert connection.getresponse().read() == b"ok"


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("descriptors", "expected"),
    [(1024, 752), (256, 176), (20, 16), (1 << 20, MOST_CONNECTIONS), (resource.RLIM_INFINITY, MOST_CONNECTIONS)],
)
def test_the_number_of_connections_leaves_descriptors_for_the_rest(
    descriptors: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (descriptors, descriptors))
    assert connection_limits().connections == expected
