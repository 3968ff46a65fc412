"""The API key: a bearer token in front of everything but the probes of who runs the server."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import PolicyError
from .api_errors import ApiError
from .sign_in import sign_in_response

logger = logging.getLogger("quantload")

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/startupz"})
PAGE = "/"
"""What a browser gets there without the key is a 401, too: a page that asks for the key, and says nothing else."""
LONGEST_KEY = 4096  # in bytes; uvicorn takes no longer head of a request than 16 KiB


def checked_key(key: str) -> str:
    """The key as a client can send it: without white space around it, of which a warning says.

    Raises `PolicyError` for an empty key, and one that no header can carry. No message has anything of the key.
    """
    bare = key.strip()
    if not bare:
        raise PolicyError("the API key is empty; give a key, or none at all for a server without one")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in bare):
        raise PolicyError("the API key has a line break or another control character inside, which no client can send")
    if len(_bytes(bare)) > LONGEST_KEY:
        raise PolicyError(f"the API key is longer than {LONGEST_KEY} bytes")
    if bare != key:
        logger.warning("The API key has white space around it, which no client can send; it counts without")
    return bare


def chosen_key(given: str | None, file: Path | None) -> str | None:
    """The key from an option, the environment or a file; None where there is none. Raises `PolicyError`."""
    if given is None:  # what is empty in the environment was not given, for typer
        given = os.environ.get("QUANTLOAD_API_KEY")
    if file is None and os.environ.get("QUANTLOAD_API_KEY_FILE") == "":
        raise PolicyError("QUANTLOAD_API_KEY_FILE is empty; give the name of a file, or leave it out")
    if given is not None and file is not None:
        raise PolicyError("there are two API keys, one of them in a file; leave out --api-key and QUANTLOAD_API_KEY")
    if file is not None:
        return read_key_file(file)
    return None if given is None else checked_key(given)


def read_key_file(path: Path) -> str:
    """The key that is all there is in a file. Raises `PolicyError`."""
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_KEY + 2)
    except OSError as error:
        raise PolicyError(f"the file of the API key, {str(path)!r}, cannot be read: {error.strerror}") from error
    return checked_key(content.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape").strip())


class BearerAuth:
    """ASGI middleware that answers 401 unless `Authorization: Bearer KEY` carries the key.

    It stands before the router, so an unknown path tells a stranger nothing either. Digests are compared, so that the
    time says nothing about the key, not even its length.
    """

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self._digest = hashlib.sha256(_bytes(checked_key(api_key))).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._allowed(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        if scope["path"] == PAGE and scope["method"] == "GET" and "text/html" in Headers(scope=scope).get("accept", ""):
            await sign_in_response(401)(scope, receive, send)
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
        # Header values arrive decoded as latin-1; this gives back the bytes the client sent, in which \xa0 is no space.
        digest = hashlib.sha256(given.strip(" \t").encode("latin-1")).digest()
        return hmac.compare_digest(digest, self._digest) and kind.lower() == "bearer"


def _bytes(key: str) -> bytes:
    """UTF-8, and what was no UTF-8 in a file or in the environment as it was there."""
    return key.encode(errors="surrogateescape")
