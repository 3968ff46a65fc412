"""`--api-key`: a bearer token in front of everything but `/health`."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .api_errors import ApiError

OPEN_PATHS = frozenset({"/health"})


class BearerAuth:
    """ASGI middleware that answers 401 unless `Authorization: Bearer KEY` carries the key.

    It stands before the router, so an unknown path tells a stranger nothing either. The comparison takes the same
    time for every wrong key of one length.
    """

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        if not api_key:
            raise ValueError("the API key is empty; give a key, or None for no key")
        self.app = app
        self.expected = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._allowed(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            401,
            "wrong or missing API key; send it as `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _allowed(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        # Header values arrive decoded as latin-1; this gives back the bytes the client sent.
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self.expected)
