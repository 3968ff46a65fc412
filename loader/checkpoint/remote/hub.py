"""Repositories of the hub, read in ranges through `huggingface_hub`: its session, its token, its endpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from ...addresses import without_credentials
from ...errors import ModelNotFoundError
from .client import STALL_SECONDS, Answer, MissingError, PassingError, RefusedError, RemoteError, Tag

_CHUNK = 256 << 10
_WHOLE_BYTES = 64 << 20
"""A file that is sent whole although a part was asked for is read through if it has no more bytes."""
_EXPIRED = (400, 401, 403, 404, 410)
_MOST_EXPIRED = 100
"""Signed addresses that have expired, after which each request asks the hub for one of its own."""
_LOGIN = "accept its licence on the hub, then run 'hf auth login' or set HF_TOKEN"


class HubClient:
    """The files of a commit of a repository; which one `revision` is, is asked once.

    Raises `ModelNotFoundError` where there is no such repository or revision, or the hub cannot be reached.
    """

    client_bytes = 1 << 20
    login = _LOGIN

    def __init__(self, repo: str, revision: str | None, stall_seconds: float = STALL_SECONDS) -> None:
        self._repo, self._stall_seconds = repo, stall_seconds
        self.shown = f"hf://{repo}"
        try:
            info = HfApi().model_info(repo, revision=revision, timeout=stall_seconds)
        except HFValidationError:
            raise ModelNotFoundError(f"{repo!r} is no valid hub id (owner/name)") from None
        except GatedRepoError:
            raise ModelNotFoundError(f"{repo!r} is gated; {_LOGIN}") from None
        except RevisionNotFoundError:
            raise ModelNotFoundError(
                f"{repo!r} has no revision {revision!r}; name a branch, a tag or a commit"
            ) from None
        except RepositoryNotFoundError:
            raise ModelNotFoundError(
                f"{repo!r} is no repository on the hub; check the spelling, or log in with 'hf auth login' if it is "
                f"private"
            ) from None
        except OfflineModeIsEnabled:
            raise ModelNotFoundError(
                f"{self.shown} cannot be read while HF_HUB_OFFLINE is set; unset it, or give {repo!r} without hf://, "
                f"which is looked for in the cache"
            ) from None
        except Exception as error:  # its releases raise the errors of different network libraries
            raise ModelNotFoundError(f"{self.shown} cannot be read: {_told(error)}; try again") from None
        self._commit = str(info.sha)
        self._locations: dict[str, str] = {}
        """Where the hub sent us for a file: a signed address, asked for directly from then on, as the hub counts how
        often it is asked."""
        self._expired = 0
        self._names = [each.rfilename for each in info.siblings or ()]

    def get(self, name: str, start: int, stop: int, tag: Tag | None) -> Answer:
        """Bytes [start, stop) of a file of the commit; another version of it there cannot be."""
        if name not in self._names:
            raise MissingError
        location = self._locations.get(name)
        url = location or hf_hub_url(self._repo, name, revision=self._commit)
        credentials = {} if location else build_hf_headers()
        headers = {**credentials, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        request = get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=self._stall_seconds)
        try:
            response = request.__enter__()
        except Exception as error:
            raise _told(error) from None
        try:
            if response.status_code == 416:
                request.__exit__(None, None, None)
                return Answer(Tag(0, version=self._commit), ())
            if location and response.status_code in _EXPIRED:
                self._locations.pop(name, None)
                self._expired += 1
                raise PassingError(
                    "server_error", f"HTTP {response.status_code} from a signed address that has expired"
                )
            hf_raise_for_status(response)
            if response.history and self._expired < _MOST_EXPIRED:
                self._locations[name] = str(response.url)
            size, first = _extent(response, start)
        except BaseException as error:
            request.__exit__(None, None, None)
            if isinstance(error, Exception):
                raise _told(error) from None
            raise
        return Answer(Tag(size, version=self._commit), _chunks(request, response, start - first, stop - start))

    def names(self) -> list[str]:
        """The names of all files of the commit."""
        return self._names


def _extent(response: Any, start: int) -> tuple[int, int]:
    """Bytes of the whole file, and the offset of the first that comes."""
    if response.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start:
            raise PassingError("wrong_range", "the server sent another range than was asked for")
        return int(found[2]), start
    length = int(response.headers.get("Content-Length", -1))
    if not 0 <= length <= _WHOLE_BYTES:
        raise RefusedError("the server does not send parts of a file (no byte ranges), which a load needs")
    return length, 0


def _chunks(request: AbstractContextManager[Any], response: Any, skipped: int, count: int) -> Iterator[bytes]:
    """`count` bytes of an answer after the first `skipped`."""
    try:
        for chunk in response.iter_raw(_CHUNK):
            part = chunk[skipped : skipped + count]
            skipped = max(skipped - len(chunk), 0)
            count -= len(part)
            if part:
                yield part
            if not count:
                return
    except GeneratorExit:
        raise
    except Exception as error:
        raise _told(error) from None
    finally:
        request.__exit__(None, None, None)


def _told(error: Exception) -> RemoteError:
    """The error that an error of the hub's library stands for, or of the HTTP library below it: httpx, httpx2."""
    if isinstance(error, RemoteError):
        return error
    if isinstance(error, GatedRepoError):
        return RefusedError("it is gated", credentials=True)
    if isinstance(error, (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)):
        return MissingError()
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = f"HTTP {status}"
        if status in (429, 503):
            return PassingError("throttled", said)
        return PassingError("server_error", said) if status >= 500 else RefusedError(said, credentials=True)
    kinds = {each.__name__ for each in type(error).__mro__}
    if "TimeoutException" in kinds:
        return PassingError("stalled", "the hub did not answer in time")
    if "TransportError" in kinds or isinstance(error, OSError):
        return PassingError("connection", "the connection to the hub failed")
    return RefusedError(without_credentials(f"{type(error).__name__}: {error}".partition("\n")[0][:300]))
