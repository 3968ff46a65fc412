"""An application on a real port, and requests to it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from quantload.server import ServerState, create_app
from quantload.server.binding import bind_socket
from quantload.server.connections import ConnectionLimits, LimitedConfig, LimitedServer
from quantload.server.request_log import RequestLogMode


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        lines = [line.removeprefix("data: ") for line in self.text.split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Client:
    """Requests to one port, each on a connection of its own."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def open(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, headers)
        return connection

    def get(self, path: str, **headers: str) -> Reply:
        return self._reply(self.open("GET", path, None, **headers))

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self._reply(self.open("POST", path, body, **headers))

    @staticmethod
    def _reply(connection: http.client.HTTPConnection) -> Reply:
        response = connection.getresponse()
        reply = Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode())
        connection.close()
        return reply


@contextmanager
def running(state: ServerState, api_key: str | None = None, request_log: RequestLogMode = "all") -> Iterator[Client]:
    """The application of `state` on a free loopback port, in a thread, until the block ends."""
    with running_app(create_app(state, api_key, request_log)) as client:
        yield client


@contextmanager
def running_app(app: Any, limits: ConnectionLimits | None = None) -> Iterator[Client]:
    """An application on a free loopback port, in a thread, until the block ends."""
    with bind_socket("127.0.0.1", 0) as bound:
        server = LimitedServer(LimitedConfig(app, limits, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield Client(bound.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {condition}"
        time.sleep(0.01)
