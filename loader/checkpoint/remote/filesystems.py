"""Whatever else `fsspec` reaches, where it and the library behind the scheme are installed: the last resort."""

from __future__ import annotations

import asyncio
from typing import Any

from ...addresses import scheme_of, without_credentials
from ...errors import UnsupportedCheckpointError
from .blocks import REQUEST_BYTES
from .client import Answer, MissingError, PassingError, RefusedError, RemoteError, Tag

_LOCAL = ("file", "local")
_VERSIONS = ("etag", "ETag", "version", "versionId", "mtime", "LastModified", "last_modified", "created")
"""Where file systems put what tells versions of a file apart."""


def known_schemes() -> list[str]:
    """The schemes that fsspec knows a library for."""
    try:
        from fsspec import available_protocols
    except ImportError:
        return []
    return sorted(each for each in available_protocols() if each not in _LOCAL)


class FilesystemClient:
    """Files below a URL of any of `known_schemes`, with credentials where the library behind looks for them.

    A library that hands out each range as a whole, and may hold it twice, takes `client_bytes` a request.
    """

    client_bytes = 2 * REQUEST_BYTES
    login = "give credentials as the library behind that scheme takes them"

    def __init__(self, given: str, shown: str) -> None:
        from fsspec.core import url_to_fs

        self.shown = shown
        try:
            self._files, self._root = url_to_fs(given)
        except ImportError as error:
            raise UnsupportedCheckpointError(
                f"{shown}: {without_credentials(str(error))} ({scheme_of(given)}:// is read through fsspec)"
            ) from None
        except Exception as error:  # of several kinds, by what is wrong with a URL
            raise UnsupportedCheckpointError(
                f"{shown} cannot be opened: {without_credentials(str(error)[:300])} ({scheme_of(given)}:// is read "
                "through fsspec)"
            ) from None

    def get(self, name: str, start: int, stop: int, tag: Tag | None) -> Answer:
        """Bytes [start, stop) of a file; its version is what the file system says of it just before."""
        path = f"{self._root}/{name}"
        try:
            said = self._files.info(path)
            size = int(said["size"])
            content = self._files.cat_file(path, start=start, end=min(stop, size)) if start < size else b""
        except Exception as error:
            raise _told(error) from None
        return Answer(Tag(size, *_version(said)), (content,) if content else ())

    def names(self) -> list[str] | None:
        """The names of all files below."""
        try:
            found = self._files.find(self._root)
        except NotImplementedError:
            return None
        except Exception as error:
            raise _told(error) from None
        return [str(path).removeprefix(f"{self._root}/") for path in found]


def _version(said: dict[str, Any]) -> tuple[str | None]:
    found = [f"{field} {said[field]}" for field in _VERSIONS if said.get(field) is not None]
    return (", ".join(found) or None,)


def _told(error: Exception) -> RemoteError:
    if isinstance(error, FileNotFoundError):
        return MissingError()
    if isinstance(error, PermissionError):
        return RefusedError("access is refused", credentials=True)
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return PassingError("stalled", "no answer in time")
    said = without_credentials(f"{type(error).__name__}: {error}".partition("\n")[0][:300])
    return PassingError("connection", said) if isinstance(error, OSError) else RefusedError(said, credentials=True)
