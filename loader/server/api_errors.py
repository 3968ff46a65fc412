"""Errors in the shape OpenAI clients read: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..shortage import refused, shortage_behind

logger = logging.getLogger("quantload")

MAX_MESSAGE = 2000
MAX_PARAM = 200

_TYPES = {429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200: HTTP status, what to tell the client, and the parameter and code OpenAI would name."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        message, param = _quotable(self.message, MAX_MESSAGE), self.param and _quotable(self.param, MAX_PARAM)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def _quotable(text: str, limit: int) -> str:
    """`text` as an answer can hold it: what quotes a request may be as long as the request, or not encode."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
    return text.encode(errors="backslashreplace").decode()


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 about one parameter of the request."""
    return ApiError(400, message, param=param, code=code)


async def on_api_error(_request: Request, error: Exception) -> Response:
    """Answer for an `ApiError` that left an endpoint."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer for what the router (404, 405) and transformers' handlers (4xx with a `detail`) raise."""
    assert isinstance(error, HTTPException)
    message = error.detail if isinstance(error.detail, str) else str(error.detail)
    if error.status_code == 404:
        message = f"there is nothing at {request.method} {request.url.path}"
    headers = getattr(error, "headers", None)
    if error.status_code == 405:
        message = (
            f"{request.url.path} is not for {request.method}; use {(headers or {}).get('Allow', 'another method')}"
        )
    return ApiError(error.status_code, message, headers=headers).response()


def out_of_memory(message: str) -> ApiError:
    """A 503 for what there was no memory for: shorter requests, or the same one later, may be answered."""
    return ApiError(503, message, code="out_of_memory", headers={"Retry-After": "1"})


async def on_crash(_request: Request, error: Exception) -> Response:
    """Answer for a bug: the traceback goes to the log (by the server), never to the client."""
    if shortage_behind(error) is not None:
        return out_of_memory(str(refused("this request", error))).response()
    return ApiError(500, f"internal error ({type(error).__name__}); the server's log has the details").response()
