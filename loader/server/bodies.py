"""Reading the bodies of requests, none of them and not all together larger than they may be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from .api_errors import ApiError, bad_request


class Bodies:
    """Bodies that are being read or worked on; together they have `most` bytes at most."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    @asynccontextmanager
    async def body(self, request: Request, limit: int) -> AsyncIterator[bytearray]:
        """The body of a request, which counts until the block ends.

        Raises `ApiError`: 413 above `limit` bytes, without reading on, 503 where too much is being sent at once.
        """
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise _too_large(limit)
        body = bytearray()
        try:
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit:
                    raise _too_large(limit)
                if self.held + len(chunk) > self.most:
                    raise ApiError(
                        503, "too much is being sent at once; try again later", code="server_busy",
                        headers={"Retry-After": "1"},
                    )  # fmt: skip
                self.held += len(chunk)
                body += chunk
            yield body
        except ClientDisconnect as error:
            raise bad_request("the client left before its request was complete") from error
        finally:
            self.held -= len(body)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes; no prompt of this model needs as much")
