"""Names this server answers to, so that a web page elsewhere cannot use it through its visitor's browser.

A page can turn its own name to 127.0.0.1 ("DNS rebinding") and then reads what a server there says; the browser
still sends the page's name as `Host`. It can also send a request without reading the answer; then `Origin` is its own.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import PolicyError
from .api_errors import ApiError

ANY_HOST = "*"
_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


def checked_hosts(names: Collection[str]) -> frozenset[str]:
    """Names for `HostCheck`, in lower case. Raises `PolicyError` for what is no name, such as a URL."""
    found = frozenset(name.strip().rstrip(".").lower() for name in names)
    for name in found:
        if name != ANY_HOST and not _NAME.fullmatch(name) and _address(name) is None:
            raise PolicyError(
                f"{name!r} is no host name; give one without scheme and port, such as models.example.com, "
                "*.example.com for all names under it, or * for any name"
            )
    return found


class HostCheck:
    """ASGI middleware that answers 403 to a `Host` that is a name other than the allowed, or an `Origin` elsewhere.

    Always allowed are the names and addresses of this machine itself (`localhost`, 127.0.0.1, ::1), and addresses in
    `Host`: no page can have one as its name. A request without the headers does not come from a page.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self.app = app
        self.allowed = checked_hosts(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            error = self._refusal(Headers(scope=scope))
            if error is not None:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        hosts = headers.getlist("host")
        for host in hosts:
            name = _name_of(f"//{host}")
            if name is None or not (self._allows(name) or _address(name) is not None):
                return _refused("to", host, "host_not_allowed")
        for origin in headers.getlist("origin"):
            name = _name_of(origin)
            if name is None or not (self._allows(name) or urlsplit(origin).netloc.lower() in map(str.lower, hosts)):
                return _refused("pages from", origin, "origin_not_allowed")
        return None

    def _allows(self, name: str) -> bool:
        if ANY_HOST in self.allowed or name in self.allowed or name == "localhost" or name.endswith(".localhost"):
            return True
        address = _address(name)
        if address is not None:
            return address.is_loopback
        return any(f"*.{name[at + 1 :]}" in self.allowed for at, letter in enumerate(name) if letter == ".")


def _name_of(url: str) -> str | None:
    """The host of a URL in lower case, without port, brackets and a dot at its end; None where there is none."""
    try:
        name = urlsplit(url).hostname
    except ValueError:  # brackets that hold no address
        return None
    return name.rstrip(".") if name else None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return None


def _refused(what: str, given: str, code: str) -> ApiError:
    return ApiError(
        403, f"this server does not answer {what} {given[:200]!r}; `--allowed-host NAME` allows a name", code=code
    )
