"""Connections that nobody can hold for ever: uvicorn's HTTP protocol, with limits of number and of time.

uvicorn itself waits without end for the head and for the body of a request, and takes connections until the process
has no descriptors left; then nobody gets in, not even who asks for `/health`.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from dataclasses import dataclass, replace
from enum import Enum, auto
from math import inf
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from ..kernels.system_calls import resource_limit
from .api_errors import ApiError

PROBES = frozenset({"/health", "/metrics", "/livez", "/readyz", "/startupz"})
MOST_CONNECTIONS = 1000
WAITING_CONNECTIONS = 2048
"""Those that the system holds until they are accepted."""


@dataclass(frozen=True)
class ConnectionLimits:
    """How many connections there may be, and how long each may keep the server waiting, in seconds.

    `accepted_at_once` are accepted before any of them is counted; it keeps the descriptors left for that from running
    out. `reserve` more than `connections` are taken, for `/health` and `/metrics` alone. The head of a request has
    `head_seconds`, its body `body_seconds` and one second more for every `body_bytes_per_second` bytes that came; a
    body that nobody reads any more, because its request was refused, `unread_seconds`. A connection between two
    requests is kept for `idle_seconds`, one whose client takes no byte of its answer for `stalled_seconds`. When the
    server stops, what waits for a client has `stopping_seconds`.
    """

    connections: int = MOST_CONNECTIONS
    accepted_at_once: int = 32
    reserve: int = 16
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    body_bytes_per_second: int = 16 << 10
    unread_seconds: float = 2.0
    idle_seconds: float = 15.0
    stalled_seconds: float = 60.0
    stopping_seconds: float = 1.0
    check_seconds: float = 0.5

    def stopping(self) -> ConnectionLimits:
        """The limits of a server that was told to stop."""
        brief = self.stopping_seconds
        return replace(
            self, head_seconds=brief, body_seconds=brief, body_bytes_per_second=1 << 40, unread_seconds=brief,
            stalled_seconds=brief,
        )  # fmt: skip


def connection_limits() -> ConnectionLimits:
    """Limits with a number of connections that leaves a quarter of this process's descriptors to everything else."""
    limits = ConnectionLimits()
    descriptors = resource_limit("RLIMIT_NOFILE")
    if descriptors is None:
        return limits
    room = descriptors * 3 // 4 - limits.reserve
    return replace(
        limits,
        connections=max(limits.reserve, min(MOST_CONNECTIONS, room)),
        accepted_at_once=max(1, min(limits.accepted_at_once, descriptors // 32)),
    )


class LimitedConfig(uvicorn.Config):
    """uvicorn's configuration for `app`, over connections with `limits`; the rest is uvicorn's own."""

    def __init__(self, app: ASGIApp, limits: ConnectionLimits | None = None, **rest: Any) -> None:
        self.limits = limits or connection_limits()
        super().__init__(
            app, http=LimitedProtocol, ws="none", loop="asyncio", lifespan="on", server_header=False,
            backlog=self.limits.accepted_at_once, timeout_keep_alive=10**6,  # the protocol closes idle ones itself
            # Else whoever is on this machine could choose what the log says of where a request came from.
            proxy_headers="FORWARDED_ALLOW_IPS" in os.environ, **rest,
        )  # fmt: skip


class LimitedServer(uvicorn.Server):
    """uvicorn over a `LimitedConfig`, with sockets that are given to it."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. asyncio accepts as many connections at once as the system is to hold; here they are two numbers."""
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(WAITING_CONNECTIONS)


class Phase(Enum):
    """What a connection waits for."""

    HEAD = auto()
    BODY = auto()
    UNREAD = auto()
    """The rest of a body that was answered without it."""
    IDLE = auto()
    """The next request."""
    ANSWER = auto()
    """The application: the client has done its part."""


class LimitedProtocol(H11Protocol):
    """One connection, closed when its client takes longer than the limits say.

    Where there are too many, the one that has waited longest for its client makes room. Where all are being answered,
    a new one may ask for the probes only.
    """

    config: LimitedConfig

    def __init__(
        self,
        config: LimitedConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.limits = config.limits
        self.phase = Phase.HEAD
        self.since = self.loop.time()
        self._noted_cycle: Any = None
        self._received = 0
        self._unsent = 0
        self._unsent_since = self.since
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, close another for it, or close it at once."""
        super().connection_made(transport)
        most = self.limits.connections
        while len(self.connections) > most and self._make_room():
            pass
        if len(self.connections) > most:
            if len(self.connections) > most + self.limits.reserve:
                self._drop()
                return
            self.app = _ProbesOnly(self.app)
        self._timer = self.loop.call_later(self.limits.check_seconds, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        self._received += len(data)
        super().data_received(data)
        self._note_phase()

    def on_response_complete(self) -> None:
        """Go on with the next request."""
        super().on_response_complete()
        self._note_phase()

    def shutdown(self) -> None:
        """End the connection: at once, or when the answer under way is complete. A client has no time left."""
        self.limits = self.limits.stopping()
        self.since = self._unsent_since = self.loop.time()
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer for what is no HTTP, in OpenAI's shape."""
        self._refuse(ApiError(400, msg))

    def _note_phase(self) -> None:
        phase = self._find_phase()
        if phase is self.phase and self.cycle is self._noted_cycle:
            return
        self.phase, self._noted_cycle = phase, self.cycle
        self.since, self._received = self.loop.time(), 0

    def _find_phase(self) -> Phase:
        if self.conn.their_state is h11.IDLE:
            return Phase.HEAD if self.cycle is None or self.conn.trailing_data[0] else Phase.IDLE
        if self.conn.their_state is h11.SEND_BODY:
            return Phase.UNREAD if self.cycle.response_complete else Phase.BODY
        return Phase.ANSWER

    def _check(self) -> None:
        """Called every `check_seconds`: enforce the limits of time."""
        waited = self.loop.time() - self.since
        if self._stalled():
            self._drop()
        elif waited > self._patience() and not self.transport.is_closing():
            if self.phase is Phase.UNREAD:
                self._drop()
            elif self.phase is Phase.BODY or self.conn.trailing_data[0]:
                what = "body" if self.phase is Phase.BODY else "head"
                self._refuse(ApiError(408, f"the {what} of the request did not come in time, {waited:.1f} s"))
            else:  # nothing was asked
                self.transport.close()
        self._timer = self.loop.call_later(self.limits.check_seconds, self._check)

    def _patience(self) -> float:
        """How long the phase may last, in seconds."""
        limits = self.limits
        return {
            Phase.HEAD: limits.head_seconds,
            Phase.BODY: limits.body_seconds + self._received / limits.body_bytes_per_second,
            Phase.UNREAD: limits.unread_seconds,
            Phase.IDLE: limits.idle_seconds,
            Phase.ANSWER: inf,
        }[self.phase]

    def _stalled(self) -> bool:
        """Whether the client has taken nothing of what is to be sent for too long."""
        unsent, now = self.transport.get_write_buffer_size(), self.loop.time()
        # While the buffer is not full the application adds to it, and a slow client looks like one that has gone.
        stuck = unsent > 0 and (self.flow.write_paused or self.transport.is_closing())
        if not stuck or unsent < self._unsent:
            self._unsent_since = now
        self._unsent = unsent
        return now - self._unsent_since > self.limits.stalled_seconds

    def _make_room(self) -> bool:
        """Close the connection that has waited longest for its client; whether there was one."""
        waiting = [
            other
            for other in self.connections
            if isinstance(other, LimitedProtocol) and other is not self and other.phase is not Phase.ANSWER
        ]
        if not waiting:
            return False
        min(waiting, key=lambda other: other.since)._drop()
        return True

    def _drop(self) -> None:
        self.connections.discard(self)  # not only when the transport says so: more may come before that
        self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer instead of the application, where it has not begun to, and close the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"connection", b"close"),
            ]
            response = h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status])
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _ProbesOnly:
    """The application for a connection above the limit: the probes, and 503 for everything else."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in PROBES:
            await self.app(scope, receive, send)
            return
        headers = {"Retry-After": "1", "Connection": "close"}
        error = ApiError(503, "too many connections; try again later", code="too_many_connections", headers=headers)
        await error.response()(scope, receive, send)
