"""Object stores and web servers through `obstore`: s3, gs, az, http and https."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from ...addresses import Address, without_credentials
from ...errors import UnsupportedCheckpointError
from .client import (
    CONNECT_SECONDS,
    STALL_SECONDS,
    Answer,
    ChangedError,
    EmptyError,
    MissingError,
    PassingError,
    RefusedError,
    RemoteError,
    Tag,
)

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

_CHUNK = 256 << 10
"""Bytes that are handed out at once: larger ones take more memory, smaller ones more of the processor."""
_STATUS = re.compile(r"status code: (\d{3})")
_TAG_OF_S3 = re.compile(r"<Code>(\w{1,64})</Code>")
_THROTTLED = (429, 503)
_KIND = re.compile(
    r"\bkind: (Timeout|Connect|Interrupted|Request|Decode)\b|IncompleteBody|ConnectionReset|UnexpectedEof"
)
_KINDS = {"s3a": "s3", "azure": "az", "adl": "az", "abfs": "az", "abfss": "az", "https": "http"}
_CLIENT_OPTIONS = (
    *("allow_http", "allow_invalid_certificates", "proxy_url", "proxy_ca_certificate", "proxy_excludes"),
    "user_agent",
)
_LOGIN = {
    "s3": "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and AWS_REGION, or AWS_SKIP_SIGNATURE=true "
    "for a public bucket",
    "gs": "set GOOGLE_SERVICE_ACCOUNT or GOOGLE_APPLICATION_CREDENTIALS to a file of credentials",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or a service "
    "principal",
    "http": "give a user and a password in the URL, or a signed URL of the folder",
}

_GIVEN = {
    "s3": ("AWS_ACCESS_KEY_ID",),
    "gs": ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_APPLICATION_CREDENTIALS"),
    "az": ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_CLIENT_SECRET"),
    "http": (),
}
"""Where credentials are that were given."""


def _login(address: Address) -> str:
    """How credentials are given, and which were, so that they are what was refused."""
    kind = _KINDS.get(address.scheme, address.scheme)
    given = [name for name in _GIVEN[kind] if os.environ.get(name)]
    if given:
        return f"{_LOGIN[kind]} (what {' and '.join(given)} gave was refused)"
    if kind != "http":
        return _LOGIN[kind]
    user = [] if address.user is None else ["the user"] if address.password is None else ["the user", "the password"]
    query = ["the query, which may be a signature that has expired"] if urlsplit(address.url).query else []
    if not (user or query):
        return _LOGIN[kind]
    return f"the server refused the request with what the URL gave: {' and '.join(user + query)}; check that"


def _from_environment(address: Address) -> ClientConfig:
    """What obstore takes from the environment for its HTTP client, and forgets where it is given other options."""
    prefix = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}.get(_KINDS.get(address.scheme, address.scheme), "")
    found: Any = {}
    for name in _CLIENT_OPTIONS if prefix else ():
        value = os.environ.get(f"{prefix}{name.upper()}")
        if value is not None:
            found[name] = value.lower() in ("1", "true", "yes", "on") if name.startswith("allow_") else value
    return cast("ClientConfig", found)


def open_store(address: Address, stall_seconds: float = STALL_SECONDS, retries: RetryConfig | None = None) -> Any:
    """The store of obstore for an address, which tries requests again by itself unless `retries` says otherwise.

    Raises `UnsupportedCheckpointError` without obstore, and for what it cannot open.
    """
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise UnsupportedCheckpointError(
            f"{address.shown} is in an object store or on a web server, which obstore reads: "
            f"pip install 'quantload[objects]'"
        ) from error
    # Nothing limits how long a slow server may take, as long as something comes.
    options: ClientConfig = {
        "timeout": "7days",
        "read_timeout": f"{round(stall_seconds * 1000)}ms",
        "connect_timeout": f"{round(CONNECT_SECONDS * 1000)}ms",
    }
    options |= _from_environment(address)
    if address.scheme == "http":
        options["allow_http"] = True
    if address.user is not None:
        both = f"{address.user}:{address.password or ''}".encode()
        options["default_headers"] = {"authorization": f"Basic {base64.b64encode(both).decode()}"}
    try:
        return from_url(address.url, client_options=options, retry_config=retries)
    except Exception as error:  # of several kinds, by what is wrong with a URL or the environment
        said = without_credentials(_first_line(error))
        raise UnsupportedCheckpointError(f"{address.shown} cannot be opened: {said}") from None


class ObjectClient:
    """Files below a URL, as `obstore` reaches it: credentials, endpoints and regions are where obstore looks for them,
    in the environment (`AWS_*`, `GOOGLE_*`, `AZURE_*`)."""

    client_bytes = 3 << 20

    def __init__(self, address: Address, stall_seconds: float = STALL_SECONDS) -> None:
        self.shown = address.shown
        self.login = _login(address)
        self.store = open_store(address, stall_seconds, {"max_retries": 0})  # Requests counts what is tried again
        self._lists = type(self.store).__name__ != "HTTPStore"  # web servers rarely speak WebDAV
        self._reads_blindly = False
        """Whether something was read where files cannot be listed."""
        self._stall_seconds = stall_seconds

    def get(self, name: str, start: int, stop: int, tag: Tag | None) -> Answer:
        """Bytes [start, stop) of a file, of the version `tag` where one is given."""
        options: dict[str, Any] = {"range": (start, stop)}
        if tag is not None and tag.etag is not None and not tag.etag.startswith("W/"):  # weak ones never match
            options["if_match"] = tag.etag
        try:
            found = self.store.get(name, options=options)
        except Exception as error:  # of its own classes and some of Python's
            said = told(error, self._stall_seconds)
            if isinstance(said, EmptyError):
                return Answer(Tag(0), ())
            if tag is None and self._reads_blindly and isinstance(said, RefusedError) and said.credentials:
                # Who may not list a bucket is told 403 of what is not there.
                raise MissingError(str(said)) from None
            raise said from None
        self._reads_blindly = not self._lists
        meta = found.meta
        modified = meta["last_modified"]
        dated = None if modified is None or modified.timestamp() == 0 else modified.isoformat()
        return Answer(Tag(meta["size"], meta["e_tag"], dated, meta["version"]), self._chunks(found))

    def names(self) -> list[str] | None:
        """The names of all files below; None where the server does not list them, or not for us."""
        if not self._lists:
            return None
        try:
            return [meta["path"] for page in self.store.list() for meta in page]
        except Exception as error:
            said = told(error, self._stall_seconds)
            if isinstance(said, RefusedError):
                self._lists = False
                return None
            raise said from None

    def _chunks(self, found: Any) -> Iterator[bytes]:
        stream = found.stream(min_chunk_size=_CHUNK)
        while True:
            try:
                chunk = next(stream)
            except StopIteration:
                return
            except Exception as error:
                raise told(error, self._stall_seconds) from None
            yield chunk


def told(error: Exception, stall_seconds: float = STALL_SECONDS) -> RemoteError:
    """The error that an error of obstore stands for, by its class and by the status in its text."""
    name, text = type(error).__name__, str(error)
    if isinstance(error, FileNotFoundError):
        return MissingError(_answered(text, ""))
    if name == "PreconditionError":
        return ChangedError("another version")
    if name in ("PermissionDeniedError", "UnauthenticatedError"):
        return RefusedError(_answered(text, "access is refused"), credentials=True)
    if name == "NotSupportedError" or "non-partial response" in text:
        return RefusedError("the server does not send parts of a file (no byte ranges), which a load needs")
    status = _STATUS.search(text)
    if status is not None:
        return _by_status(int(status[1]), text)
    if "UnexpectedRange" in text:
        return PassingError("wrong_range", "the server sent another range than was asked for")
    kind = _KIND.search(text)
    if kind is not None and kind[1] == "Timeout":
        return PassingError("stalled", f"nothing came for {stall_seconds:g} s")
    if kind is not None:
        what = "cannot be reached" if kind[1] == "Connect" else "the connection broke off"
        return PassingError("connection", what)
    return RefusedError(without_credentials(_first_line(error)), credentials=True)


def _by_status(status: int, text: str) -> RemoteError:
    said = _answered(text, f"HTTP {status}")
    if status in _THROTTLED:
        return PassingError("throttled", said)
    if status >= 500 or status == 408:
        return PassingError("server_error", said)
    if status in (404, 410):
        return MissingError(said)
    if status == 416:
        return EmptyError(said)
    return RefusedError(said, credentials=True)


def _answered(text: str, otherwise: str) -> str:
    """What a server said, as far as it is no text of its own: a status, and the code of an error of S3."""
    status, code = _STATUS.search(text), _TAG_OF_S3.search(text)
    parts = [f"HTTP {status[1]}" if status else otherwise, code[1] if code else ""]
    return ", ".join(part for part in parts if part)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
