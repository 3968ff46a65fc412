"""What is asked of a library that fetches bytes of remote files, and how its errors are told apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

PassingKind = Literal["throttled", "server_error", "connection", "stalled", "short", "wrong_range"]

STALL_SECONDS = 15.0
"""A connection on which nothing arrives for so long is given up."""
CONNECT_SECONDS = 10.0


class Tag(NamedTuple):
    """What tells one version of a remote file from another: bytes, and what the server says of it, where it does."""

    size: int
    etag: str | None = None
    modified: str | None = None
    version: str | None = None

    def is_another(self, other: Tag) -> bool:
        """Whether another answer is of another version of the file.

        Sizes decide, then strong ETags where both have one, else whatever both have: a server need not say everything
        with every answer.
        """
        if self.size != other.size:
            return True
        if _is_strong(self.etag) and _is_strong(other.etag):
            return self.etag != other.etag
        return (
            _differ(_opaque(self.etag), _opaque(other.etag))
            or _differ(self.modified, other.modified)
            or _differ(self.version, other.version)
        )

    def with_what(self, other: Tag) -> Tag:
        """This one, with what only the other answer of the same version says."""
        return Tag(self.size, self.etag or other.etag, self.modified or other.modified, self.version or other.version)


def _is_strong(etag: str | None) -> bool:
    return etag is not None and not etag.startswith("W/")


def _opaque(etag: str | None) -> str | None:
    return None if etag is None else etag.removeprefix("W/")


def _differ(one: str | None, another: str | None) -> bool:
    return one is not None and another is not None and one != another


class Answer(NamedTuple):
    """What came back for a range: the version it is of, and its bytes as they arrive."""

    tag: Tag
    chunks: Iterable[bytes]


class RemoteError(Exception):
    """Base of what a client raises; its text has no credentials in it."""


class PassingError(RemoteError):
    """What may pass: asked again later, the server may answer."""

    def __init__(self, kind: PassingKind, said: str) -> None:
        super().__init__(said)
        self.kind = kind


class MissingError(RemoteError):
    """There is no such file; the text is what the server answered beside that, if anything."""


class EmptyError(RemoteError):
    """The file has no bytes from there on."""


class ChangedError(RemoteError):
    """The file is another version than the one that was asked for."""


class RefusedError(RemoteError):
    """The server does not let us, whatever we do; `credentials` says whether others could."""

    def __init__(self, said: str, *, credentials: bool = False) -> None:
        super().__init__(said)
        self.credentials = credentials


class Client(Protocol):
    """Files below one remote folder, by their names there; callable from several threads at once.

    Raises `RemoteError`s and nothing else, in `Answer.chunks` too; tries nothing again that the caller could count.
    `client_bytes` is the most memory that one request takes inside of the library, beside the bytes it hands out.
    """

    shown: str
    login: str
    """How credentials are given, for messages."""
    client_bytes: int

    def get(self, name: str, start: int, stop: int, tag: Tag | None) -> Answer:
        """Bytes [start, stop) of a file, which is that of the version `tag` where one is given; `stop` may lie beyond
        the end."""

    def names(self) -> list[str] | None:
        """The names of all files; None where the server does not list them."""


@dataclass
class Counters:
    """What was asked of servers, by result, and what came; counted under the lock of who owns it."""

    requests: dict[str, int] = field(default_factory=dict)
    """Requests by `ok`, the kinds of what may pass, `missing`, `changed` and `refused`."""
    retries: int = 0
    nbytes: int = 0
    connections: int = 0


def total(counters: Iterable[Counters]) -> Counters:
    """The sums of several."""
    summed = Counters()
    for each in counters:
        for result, count in each.requests.items():
            summed.requests[result] = summed.requests.get(result, 0) + count
        summed.retries += each.retries
        summed.nbytes += each.nbytes
        summed.connections = max(summed.connections, each.connections)
    return summed
