"""One log line, one id and one count for each request, whatever answers it."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any, Literal
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_errors import on_crash
from .connections import PROBES
from .serving_metrics import ServingMetrics
from .usage import Usage

logger = logging.getLogger("quantload.requests")
errors = logging.getLogger("quantload")

RequestLogMode = Literal["all", "no-probes", "off"]

USAGE = "quantload.usage"
"""Key of a request's `Usage` in its ASGI scope."""

CLIENT_LEFT = 499  # nginx's number for it; no client sees it
_LONGEST_PATH = 200
_GOOD_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class RequestLog:
    """ASGI middleware outside of all others.

    Each answer carries `X-Request-ID`: the client's, if it is up to 128 letters, digits and `._:/+=@-`, or a new one.
    The line has no header, query or body in it, so no key and no text; what a client chose of it (path, id) is escaped,
    so that it stays one line. Requests that crash are answered here, so that their answer has an id as well.
    """

    def __init__(
        self, app: ASGIApp, metrics: ServingMetrics, routes: list[BaseRoute], mode: RequestLogMode = "all"
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.routes = [route for route in routes if isinstance(route, Route)]
        self.mode = mode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        watched = _Watched(_request_id(scope), receive, send)
        usage = scope[USAGE] = Usage()
        self.metrics.begin(usage)
        try:
            await self._answer(scope, watched)
        finally:
            status = watched.status or CLIENT_LEFT
            self.metrics.end(
                usage, route=self._route(scope["path"]), status=status, started=watched.started,
                disconnected=watched.left,
            )  # fmt: skip
            if self.mode == "all" or (self.mode == "no-probes" and scope["path"] not in PROBES):
                _log(scope, watched, status, usage)

    async def _answer(self, scope: Scope, watched: _Watched) -> None:
        try:
            await self.app(scope, watched.receive, watched.send)
        except ClientDisconnect:
            watched.left = True
        except Exception as error:
            if watched.status is not None:
                raise  # half an answer is sent: all that is left is to cut the connection, which the server does
            errors.exception("Request %s crashed", watched.request_id)
            response = await on_crash(Request(scope), error)
            await response(scope, watched.receive, watched.send)

    def _route(self, path: str) -> str:
        """The route that serves a path, by its own name for it; `other` for the paths that strangers invent."""
        return next((route.path for route in self.routes if route.path_regex.match(path)), "other")


class _Watched:
    """The two ends of one request, as they go by. `status` is None until the answer begins."""

    def __init__(self, request_id: str, receive: Receive, send: Send) -> None:
        self.request_id = request_id
        self.started = time.monotonic()
        self.status: int | None = None
        self.left = False
        self._ended = False
        self._receive = receive
        self._send = send

    async def receive(self) -> Message:
        """The next message from the client."""
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._ended:
            self.left = True
        return message

    async def send(self, message: Message) -> None:
        """Pass a message on to the client."""
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["X-Request-ID"] = self.request_id
            if not self.left:
                self.status = int(message["status"])
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._ended = True
        await self._send(message)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex


def _log(scope: Scope, watched: _Watched, status: int, usage: Usage) -> None:
    if not logger.isEnabledFor(logging.INFO):
        return
    fields: dict[str, Any] = {
        "method": quote(scope["method"][:16]),
        "path": quote(scope["path"][:_LONGEST_PATH]),
        "status": status,
        "seconds": round(time.monotonic() - watched.started, 6),
        "request_id": watched.request_id,
        "client": scope["client"][0] if scope.get("client") else None,
    }
    text = "{method} {path} {status} in {seconds:.3f} s".format_map(fields)
    if usage.queued_at is not None:
        fields |= {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        text += f", {usage.prompt_tokens} prompt and {usage.completion_tokens} completion tokens"
    if usage.first_token_at is not None:
        fields["first_token_seconds"] = round(usage.first_token_at - watched.started, 6)
        text += f", the first after {usage.first_token_at - watched.started:.3f} s"
    if watched.left:
        fields["client_left"] = True
        text += ", the client left"
    logger.info("%s, id %s, from %s", text, watched.request_id, fields["client"], extra={"fields": fields})
