"""Taking the port before the model is loaded, so that a busy one is known at once."""

from __future__ import annotations

import ipaddress
import socket

from ..errors import PolicyError, QuantloadError

_LONGEST_SHOWN = 100


class BindError(QuantloadError):
    """The server cannot listen where it was told to."""


def bind_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket on `host`:`port` (port 0: any free one). Raises `BindError`; `PolicyError` for no host."""
    if not 0 <= port <= 65535:
        raise BindError(f"there is no port {port}; choose another, from 1 to 65535, or 0 for any free one")
    family, address = _address(host, port)
    try:
        made = socket.create_server(address, family=family, backlog=2048)
        # asyncio sets TCP_NODELAY where a socket says that it is TCP, which accepted ones learn from this one. Without
        # it, an answer's body waits for the client's acknowledgement of the headers: 40 ms.
        return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=made.detach())
    except OSError as error:
        raise BindError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; "
            "stop what holds the port, or choose another host or port"
        ) from error


def _address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """The first address of a host; `PolicyError` for what is no name of one."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:  # an unknown name; a label that is too long, a NUL
        shown = host if len(host) <= _LONGEST_SHOWN else f"{host[:_LONGEST_SHOWN]}..."
        said = getattr(error, "strerror", None) or str(error)
        raise PolicyError(
            f"cannot listen on {shown!r}: {said}; give an address of this machine, such as 127.0.0.1"
        ) from error
    family, _, _, _, address = found[0]
    return family, (str(address[0]), int(address[1]))


def url_of(bound: socket.socket) -> str:
    """The base URL of a bound socket, such as `http://127.0.0.1:8000` or `http://[::1]:8000`."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can reach a bound socket."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback
