"""The page of the server as anybody may have it."""

from __future__ import annotations

from starlette.responses import HTMLResponse, Response

from ..page.shell import shell_page

_HTML = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}


def sign_in_response(status: int = 200) -> Response:
    """The page before anything is known, which asks for the key where there is one."""
    return HTMLResponse(shell_page(), status_code=status, headers=_HTML)
